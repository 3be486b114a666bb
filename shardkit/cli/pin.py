"""`shardkit shard pin` and `unpin`: a key, or its slot, has a place of its own, whatever the weights say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from shardkit.core.errors import NothingToDo, Refused, UsageError
from shardkit.core.keyrange import Arc, ArcSet, hex_position, slot_arc, slot_of
from shardkit.core.move import Mode
from shardkit.core.placement import Placement
from shardkit.core.ring import position
from shardkit.core.topology import Pin, ShardedTable, Topology
from shardkit.storage import sharing
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections

from . import placing, plans
from .asking import confirm, refuse_silence
from .options import AsJson, CatalogUrl, MoveMode, Parallel, Patience, PlanOnly, Yes, one_of
from .output import count, narrate
from .route import Family, KeyFamily, guess, narrate_type, parse
from .running import PARALLEL, PATIENCE

KeyText = Annotated[str, typer.Argument(metavar="KEY", help="The value of the shard key.")]
Name = Annotated[str, typer.Argument(help="The shard that it is to be on.")]
Table = Annotated[
    str | None,
    typer.Option(
        "--table", metavar="TABLE", envvar="SHARDKIT_TABLE", help="KEY is a key of this sharded table."
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact", envvar="SHARDKIT_EXACT", help="Pin the key's position alone, not its whole slot."
    ),
]


@dataclass(frozen=True, slots=True)
class Place:
    """A key as it was typed, and where it lies on the ring."""

    text: str
    family: KeyFamily
    position: int

    @property
    def slot(self) -> Arc:
        """The arc of its slot."""
        return slot_arc(slot_of(self.position))

    def arc(self, exact: bool) -> Arc:
        """What is pinned of it."""
        return Arc(self.position, self.position) if exact else self.slot


def pin(
    key: KeyText,
    name: Name,
    catalog: CatalogUrl,
    table: Table = None,
    type_: Family = None,
    exact: Exact = False,
    plan_only: PlanOnly = False,
    yes: Yes = False,
    mode: MoveMode = Mode.AUTO,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    as_json: AsJson = False,
) -> None:
    """Move the slot of a key to a shard, while applications go on, and keep it there through later rebalances.

    A slot is a 65,536th of the ring, so other keys come along; with --exact only those of the same position, of which
    integer keys can have some. What is told of them is counted if that takes no time.
    """
    job = None
    with Catalog.open(catalog) as opened, ShardConnections("shardkit plan") as shards:
        topology = placing.current(opened)
        place = _place(topology, key, table, type_)
        shard = topology.named(name)
        arc = place.arc(exact)
        _refuse(topology, arc, shard.leaving, name)
        told = {"key": key, "type": place.family.value, "shard": name, "exact": exact}
        wish = placing.Wish(
            f"pin {_called(arc)} to {name}",
            "pin",
            lambda now, version: now.pinned(version, arc, shard.id),
            told,
        )
        placement, planned = placing.look(opened, shards, topology, wish, mode)
        shared = _shared(topology, shards, arc)
    _narrate_sharing(place, exact, shared)
    entry = {**_described(place, exact), "shard": name, "shares": shared}
    if not plan_only:
        job = _carried(catalog, wish, placement, planned, yes, placing.How(mode, parallel, patience))
    placing.show_done(catalog, {"pin": entry, "plan": planned, "job": job}, as_json, plan_only=plan_only)


def unpin(
    key: KeyText,
    catalog: CatalogUrl,
    table: Table = None,
    type_: Family = None,
    plan_only: PlanOnly = False,
    yes: Yes = False,
    mode: MoveMode = Mode.AUTO,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    as_json: AsJson = False,
) -> None:
    """Let a key, or the slot that was pinned for it, be placed by weight again."""
    job = None
    with Catalog.open(catalog) as opened, ShardConnections("shardkit plan") as shards:
        topology = placing.current(opened)
        place = _place(topology, key, table, type_)
        found = topology.pin_of(place.position)
        if found is None:
            raise NothingToDo(
                f"Neither the key {key!r} nor its slot {slot_of(place.position)} is pinned.",
                hint="`shardkit shard list` shows what is.",
            )
        arc = found.arc
        told = {"key": key, "type": place.family.value, "exact": not found.is_slot}
        wish = placing.Wish(
            f"unpin {_called(arc)}", "unpin", lambda now, version: now.unpinned(version, arc), told
        )
        placement, planned = placing.look(opened, shards, topology, wish, mode)
    entry = {**_described(place, not found.is_slot), "shard": topology.by_id[found.shard].name}
    if not plan_only:
        job = _carried(catalog, wish, placement, planned, yes, placing.How(mode, parallel, patience))
    placing.show_done(catalog, {"unpinned": entry, "plan": planned, "job": job}, as_json, plan_only=plan_only)


# --- what is pinned -------------------------------------------------------------------------------------------------


def called(pin: Pin) -> str:
    """A pin for people."""
    return _called(pin.arc)


def _called(arc: Arc) -> str:
    return f"position {hex_position(arc.first)}" if arc.width == 1 else f"slot {slot_of(arc.first)}"


def _place(topology: Topology, key: str, table: str | None, type_: KeyFamily | None) -> Place:
    one_of(table=table is not None, type=type_ is not None)
    declared = sorted({each.key_type for each in topology.tables})
    family = (
        KeyFamily(_table(topology, table).key_type) if table is not None else type_ or guess(key, declared)
    )
    place = Place(key, family, position(parse(key, family)))
    if table is None:
        narrate_type(declared, family, guessed=type_ is None)
    return place


def _table(topology: Topology, name: str) -> ShardedTable:
    found = [each for each in topology.tables if name in (each.name, str(each))]
    if len(found) != 1:
        listed = ", ".join(str(each) for each in found or topology.tables) or "none"
        what = "Several sharded tables are" if found else "No sharded table is"
        raise UsageError(f"{what} named {name!r}; there are: {listed}.", hint="Name it as SCHEMA.TABLE.")
    return found[0]


def _refuse(topology: Topology, arc: Arc, leaving: bool, name: str) -> None:
    if leaving:
        raise Refused(
            f"Shard {name} is to leave, so nothing can be pinned to it.",
            hint=f"`shardkit shard reweight {name}=WEIGHT` keeps it.",
        )
    for other in topology.pins:
        if other.arc != arc and (other.arc.first <= arc.last and arc.first <= other.arc.last):
            raise Refused(
                f"The {called(other)} is pinned to {topology.by_id[other.shard].name}, and {_called(arc)} "
                f"{'lies in it' if other.is_slot else 'holds it'}.",
                hint="`shardkit shard unpin` with that key first.",
            )


def _shared(topology: Topology, shards: ShardConnections, arc: Arc) -> dict[str, Any] | None:
    """``rows``, ``keys`` and ``some`` (keys, as text) of the arc; None if they could not be counted quickly."""
    rows, keys, some = 0, 0, list[str]()
    arcs = ArcSet([arc])
    for shard in topology.shards:
        if owned := topology.owned(shard.id) & arcs:
            found = sharing.found(shards.get(shard), topology.tables, owned)
            if found is None:
                return None
            rows, keys, some = rows + found.rows, keys + found.keys, [*some, *found.some]
    return {"rows": rows, "keys": keys, "some": some}


def _narrate_sharing(place: Place, exact: bool, shared: dict[str, Any] | None) -> None:
    what = f"Position {hex_position(place.position)}" if exact else f"Slot {slot_of(place.position)}"
    if shared is None:
        narrate(f"{what}: not counted, as that would take long.")
        return
    others = [key for key in shared["some"] if key != place.text]
    listed = f", among them: {', '.join(others)}" if others else ""
    narrate(f"{what} holds {count(shared['rows'], 'row')} of {count(shared['keys'], 'key')}{listed}.")


def _described(place: Place, exact: bool) -> dict[str, Any]:
    return {
        "key": place.text,
        "type": place.family.value,
        "position": place.position,
        "position_hex": hex_position(place.position),
        "slot": slot_of(place.position),
        "exact": exact,
    }


def _carried(
    catalog: str,
    wish: placing.Wish,
    placement: Placement,
    planned: dict[str, Any],
    yes: bool,
    how: placing.How,
) -> dict[str, Any] | None:
    if placement.transfers:
        plans.refuse_problems(planned)
        refuse_silence(yes)
        confirm(planned, yes)
    return placing.carry_out(catalog, wish, placement, how)
