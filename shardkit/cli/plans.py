"""A placement as the operator sees it before anything moves: shards, transfers, estimates, what stands in the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from shardkit.core.errors import PreflightFailed
from shardkit.core.keyrange import POSITION_MIN, SLOT_BITS, SLOTS, ArcSet, hex_position
from shardkit.core.move import Mode
from shardkit.core.placement import Placement, Transfer
from shardkit.core.topology import Topology
from shardkit.rebalance import preflight
from shardkit.storage import inspection, servers, tables
from shardkit.storage.connections import ShardConnections

from .output import percent, size, table


def slots(arcs: ArcSet) -> int:
    """How many slots arcs are worth."""
    return round(arcs.width / (1 << SLOT_BITS))


def arcs_document(arcs: ArcSet) -> list[list[str]]:
    """Arcs for ``--json``: first and last position of each, 16 hex digits in ring order."""
    return [[hex_position(arc.first), hex_position(arc.last)] for arc in arcs]


def describe(
    topology: Topology,
    placement: Placement,
    shards: ShardConnections,
    mode: Mode = Mode.AUTO,
    *,
    back: bool = False,
) -> dict[str, Any]:
    """The plan of a move by ``mode`` as a document.

    ``slots_moved``, ``slots_minimum``; ``shards`` (``name``, ``weight``, ``slots_before``, ``slots_after``); ``pins``;
    ``transfers`` (``source``, ``target``, ``slots``, ``arcs``, ``rows_estimate``, ``bytes_estimate``); ``notes``,
    which an application may notice while rows move; ``problems``, for which the run would be refused (``back``: a run
    that keeps its sources).
    """
    after = dict.fromkeys(topology.by_id, 0)
    first = POSITION_MIN
    for token, owner in zip(placement.tokens, placement.owners, strict=True):
        after[owner] += token + 1 - first
        first = token + 1
    return {
        "slots_moved": placement.slots_moved,
        "slots_minimum": placement.slots_minimum,
        "shards": [
            {
                "name": shard.name,
                "weight": shard.weight,
                "slots_before": slots(topology.owned(shard.id)),
                "slots_after": round(after[shard.id] / (1 << SLOT_BITS)),
            }
            for shard in topology.shards
        ],
        "pins": pins(topology),
        "transfers": [_transfer(topology, transfer, shards) for transfer in placement.transfers],
        "notes": [*_locked(topology, placement, shards, mode), *_notes(topology, shards)],
        "problems": _problems(topology, placement, shards, mode, back),
    }


def pins(topology: Topology) -> list[dict[str, Any]]:
    """The pins as documents: ``shard``, ``slot``, ``position_hex`` (of a single position, else null), and whether the
    arc is ``there`` already."""
    return [
        {
            "shard": topology.by_id[pin.shard].name,
            "slot": pin.slot,
            "position_hex": None if pin.is_slot else hex_position(pin.arc.first),
            "there": topology.owned(pin.shard).issuperset(ArcSet([pin.arc])),
        }
        for pin in topology.pins
    ]


def draw_pins(console: Console, listed: Sequence[Mapping[str, Any]]) -> None:
    """Draw the pins, if there are any."""
    for pin in listed:
        what = f"slot {pin['slot']}" if pin["position_hex"] is None else f"position {pin['position_hex']}"
        there = "" if pin["there"] else " (not there yet)"
        console.print(f"Pinned: {what} to {pin['shard']}{there}", soft_wrap=True)


def _transfer(topology: Topology, transfer: Transfer, shards: ShardConnections) -> dict[str, Any]:
    source = topology.by_id[transfer.source]
    share = transfer.arcs.width / topology.owned(source.id).width
    described = (tables.describe(shards.get(source), declared) for declared in topology.tables)
    found = [each for each in described if each is not None]
    return {
        "source": source.name,
        "target": topology.by_id[transfer.target].name,
        "slots": slots(transfer.arcs),
        "arcs": arcs_document(transfer.arcs),
        "rows_estimate": round(sum(each.rows_estimate for each in found) * share),
        "bytes_estimate": round(sum(each.bytes for each in found) * share),
    }


def _notes(topology: Topology, shards: ShardConnections) -> list[str]:
    one = shards.get(topology.shards[0])
    return [
        text
        for declared in topology.tables
        if tables.describe(one, declared) is not None
        for text in inspection.unique_without_key(one, declared)
    ]


def _locked(topology: Topology, placement: Placement, shards: ShardConnections, mode: Mode) -> list[str]:
    """From which shards rows move in locked steps."""
    sources = [topology.by_id[shard_id] for shard_id in sorted({t.source for t in placement.transfers})]
    if mode is Mode.AUTO:
        sources = [shard for shard in sources if not servers.replicates_logically(shards.get(shard))]
    elif mode is Mode.LOGICAL:
        sources = []
    return [
        f"rows leave shard {shard.name} in locked steps"
        + (", as its wal_level is not logical" if mode is Mode.AUTO else "")
        + ": applications wait some tens of milliseconds for each"
        for shard in sources
    ]


def _problems(
    topology: Topology, placement: Placement, shards: ShardConnections, mode: Mode, back: bool
) -> list[str]:
    reasons: dict[str, None] = {}
    for transfer in placement.transfers:
        try:
            preflight.check(
                topology,
                topology.by_id[transfer.source],
                topology.by_id[transfer.target],
                shards,
                mode,
                back=back,
            )
        except PreflightFailed as error:
            reasons.update(dict.fromkeys(error.fields["reasons"]))
    return list(reasons)


def refuse_problems(plan: dict[str, Any]) -> None:
    """`PreflightFailed` if something stands in the way of the plan."""
    if plan["problems"]:
        raise PreflightFailed(
            "The rows cannot be moved:\n" + "\n".join(f"  - {text}" for text in plan["problems"]),
            reasons=plan["problems"],
        )


def draw(console: Console, plan: dict[str, Any]) -> None:
    """Draw the plan."""
    shares = [
        [
            shard["name"],
            shard["weight"],
            shard["slots_before"],
            shard["slots_after"],
            percent(shard["slots_after"], SLOTS),
        ]
        for shard in plan["shards"]
    ]
    numbers = ("weight", "slots before", "slots after", "share after")
    console.print(table(("shard", *numbers), shares, right=numbers))
    draw_pins(console, plan["pins"])
    if not plan["transfers"]:
        console.print("Nothing has to move: every shard holds its share.")
        return
    moves = [
        [
            f"{move['source']} -> {move['target']}",
            move["slots"],
            len(move["arcs"]),
            f"about {move['rows_estimate']:,}",
            f"about {size(move['bytes_estimate'])}",
        ]
        for move in plan["transfers"]
    ]
    numbers = ("slots", "arcs", "rows", "bytes")
    console.print(table(("transfer", *numbers), moves, right=numbers))
    console.print(
        f"{plan['slots_moved']:,} of {SLOTS:,} slots move; the minimum is {plan['slots_minimum']:,}."
        + (" Pinned positions come on top." if any(pin["position_hex"] for pin in plan["pins"]) else ""),
        soft_wrap=True,
    )
    for note in plan["notes"]:
        console.print(f"Note: {note}", soft_wrap=True)
    for problem in plan["problems"]:
        console.print(f"In the way: {problem}", soft_wrap=True)
