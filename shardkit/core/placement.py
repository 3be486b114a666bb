"""Placement: which slots each shard should own, and the fewest that have to move for it.

`plan` is a pure function from a topology, with its pins, and the weights wanted to a `Placement`: the transfers of a
job and the tokens it ends with. Adding, draining, reweighting and pinning, one or several, are all the same call. The
commands drive it, the mover carries out what it says; nothing here makes a topology, asks a server, or knows of rows.

Quotas are slots by largest remainder, where those left over by rounding go first to shards that hold them already: so
every count is within one slot of the exact share, and no other such rounding moves fewer slots. Which slots make up a
surplus, and who receives them, is `allocation`.

Pinned slots are counted among those of their shard and never given away; a shard that has more of them than its share
holds just these, and the others share the rest. A pinned position counts for nothing: it is a hole in its slot. A slot
that ends up in several hands, as the hole of a former pin, is taken to be of the shard that holds most of it, and is
made whole again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from .allocation import Run, append, reassigned
from .documents import listed, whole
from .errors import TopologyInvalid, WeightInvalid
from .keyrange import POSITION_MIN, SLOTS, Arc, ArcSet, slot_arc
from .ring import Ring
from .slotmap import PINNED, barred, slot_runs
from .topology import Topology, assigned


@dataclass(frozen=True, slots=True)
class Transfer:
    """The arcs that pass from one shard to another, by their ids."""

    source: int
    target: int
    arcs: ArcSet


@dataclass(frozen=True, slots=True)
class Placement:
    """What a job has to move, and where it ends.

    ``transfers`` has one entry a (source, target), sorted; no arc is in two of them, so they can be carried out in any
    order. ``tokens`` and ``owners`` are those of the topology after all of them. ``slots_moved`` counts the slots that
    change their owner, ``slots_minimum`` is the least that any placement within one slot of the exact shares could
    move; positions that are pinned alone come on top of both.
    """

    transfers: tuple[Transfer, ...]
    tokens: tuple[int, ...]
    owners: tuple[int, ...]
    slots_moved: int
    slots_minimum: int

    def to_json(self) -> dict[str, Any]:
        """The placement as JSON values; `from_json` is the exact inverse."""
        return {
            "transfers": [
                {"source": t.source, "target": t.target, "arcs": [list(arc) for arc in t.arcs]}
                for t in self.transfers
            ],
            "tokens": list(self.tokens),
            "owners": list(self.owners),
            "slots_moved": self.slots_moved,
            "slots_minimum": self.slots_minimum,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The placement of a document made by `to_json`; `TopologyInvalid` if it is none."""
        try:
            transfers = tuple(
                Transfer(
                    whole(entry["source"]),
                    whole(entry["target"]),
                    ArcSet(Arc(whole(first), whole(last)) for first, last in listed(entry["arcs"])),
                )
                for entry in listed(document["transfers"])
            )
            tokens, owners = (tuple(map(whole, listed(document[name]))) for name in ("tokens", "owners"))
            return cls(
                transfers, tokens, owners, whole(document["slots_moved"]), whole(document["slots_minimum"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TopologyInvalid(f"This is no placement document: {error!r}.") from error


# --- quotas -------------------------------------------------------------------------------------------------


def quotas(weights: Mapping[int, int], current: Mapping[int, int], slots: int = SLOTS) -> dict[int, int]:
    """Slots that each shard should own, by shard id; they add up to ``slots``.

    Each is the exact share, rounded down or up. Rounded up are first those that hold more than the share rounded down
    in ``current`` (slots owned now; absent is none), as they then have one slot less to give away; then those that
    receive in any case; within these by largest remainder. `WeightInvalid` if the weights give no placement.
    """
    total = _total(weights)
    quota: dict[int, int] = {}
    rounded_up: list[tuple[int, int, int]] = []
    for shard_id, weight in weights.items():
        quota[shard_id], remainder = divmod(slots * weight, total)
        if remainder:
            rank = _rounding_rank(current.get(shard_id, 0), quota[shard_id])
            rounded_up.append((rank, -remainder, shard_id))
    left_over = slots - sum(quota.values())
    for _, _, shard_id in sorted(rounded_up)[:left_over]:
        quota[shard_id] += 1
    return quota


def _rounding_rank(held: int, rounded_down: int) -> int:
    if held > rounded_down:
        return 0
    return 1 if held < rounded_down or not held else 2


def _total(weights: Mapping[int, int]) -> int:
    for shard_id, weight in weights.items():
        if type(weight) is not int or weight < 0:
            raise WeightInvalid(
                f"The weight of shard {shard_id} is {weight!r}; a weight is a whole number from 0 up.",
                shard_id=shard_id,
                weight=weight,
            )
    total = sum(weights.values())
    if not total:
        raise WeightInvalid("No shard has a weight above 0, so there is none to own the keys.")
    return total


def _over(weights: Mapping[int, int], pinned: Mapping[int, int]) -> set[int]:
    """The shards that have more pinned slots than their share of what the others of them leave: these are all they
    get."""
    _total(weights)
    over: set[int] = set()
    while True:
        slots = SLOTS - sum(pinned[shard_id] for shard_id in over)
        total = sum(weight for shard_id, weight in weights.items() if shard_id not in over)
        more = {s for s in weights if s not in over and pinned[s] * total > slots * weights[s]}
        if not more:
            return over
        over |= more


def _minimum(weights: Mapping[int, int], held: Mapping[int, int], slots: int) -> int:
    """The least number of slots that must move among shards that share ``slots``, whatever the rounding: what they hold
    above their share rounded up must leave, and what they lack of their share rounded down must arrive, which covers
    what comes from other shards."""
    total = sum(weights.values())
    leave = sum(max(0, held[s] - -(-slots * weight // total)) for s, weight in weights.items())
    arrive = sum(max(0, slots * weight // total - held[s]) for s, weight in weights.items())
    others = slots - sum(held[s] for s in weights)
    return max(leave + others, arrive)


# --- the plan -----------------------------------------------------------------------------------------------


def initial(weights: Mapping[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens and owners of a first topology: one arc a shard, in the order of the ids. `WeightInvalid` as `quotas`."""
    runs: list[Run] = []
    first = 0
    for shard_id, count in sorted(quotas(weights, {}).items()):
        if count:
            runs.append(Run(first, first + count, shard_id))
            first += count
    return _tokens(runs)


def plan(topology: Topology, weights: Mapping[int, int]) -> Placement:
    """The placement of ``topology`` and its pins under ``weights``, given by shard id for all of its shards; 0 drains a
    shard but for what is pinned to it.

    Deterministic, and independent of the order of shards and weights. `WeightInvalid` if a weight is missing, negative
    or of a shard that there is not, or all are 0.
    """
    _check_ids(topology, weights)
    runs = slot_runs(topology)
    fixed = {pin.slot: pin.shard for pin in topology.pins if pin.is_slot}
    free = barred(runs, fixed)
    pinned = dict.fromkeys(weights, 0)
    for shard_id in fixed.values():
        pinned[shard_id] += 1
    held = dict.fromkeys(weights, 0)
    for run in free:
        if run.owner != PINNED:
            held[run.owner] += run.width
    over = _over(weights, pinned)
    sharing = {shard_id: weight for shard_id, weight in weights.items() if shard_id not in over}
    slots = SLOTS - sum(pinned[shard_id] for shard_id in over)
    with_pins = {shard_id: held[shard_id] + pinned[shard_id] for shard_id in sharing}
    wanted = quotas(sharing, with_pins, slots)
    excess = {
        shard_id: with_pins[shard_id] - wanted[shard_id] if shard_id in sharing else held[shard_id]
        for shard_id in sorted(weights)
    }
    displaced = _displaced(runs, fixed)
    minimum = _minimum(sharing, with_pins, slots) + displaced
    return _placement(topology, free, reassigned(free, excess), fixed, displaced, minimum)


def _check_ids(topology: Topology, weights: Mapping[int, int]) -> None:
    missing = [shard.name for shard in topology.shards if shard.id not in weights]
    if missing:
        raise WeightInvalid(f"No weight is given for: {', '.join(sorted(missing))}.", missing=sorted(missing))
    unknown = sorted(weights.keys() - topology.by_id.keys())
    if unknown:
        raise WeightInvalid(f"There is no shard with the id {unknown[0]}.", unknown=unknown)


def _displaced(runs: Sequence[Run], fixed: Mapping[int, int]) -> int:
    """How many pinned slots are not where they are pinned."""
    ends = [run.end for run in runs]
    return sum(runs[bisect_right(ends, slot)].owner != shard_id for slot, shard_id in fixed.items())


def _placement(
    topology: Topology,
    runs: Sequence[Run],
    received: Sequence[Run],
    fixed: Mapping[int, int],
    displaced: int,
    minimum: int,
) -> Placement:
    goal: list[Run] = []
    moved = displaced
    for source, part in _parts(runs, received):
        if source == PINNED:
            for slot in range(part.first, part.end):
                append(goal, Run(slot, slot + 1, fixed[slot]))
            continue
        if source != part.owner:
            moved += part.width
        append(goal, part)
    tokens, owners = _tokens(goal)
    for shard_id in {pin.shard for pin in topology.pins if not pin.is_slot}:
        alone = ArcSet(pin.arc for pin in topology.pins if pin.shard == shard_id and not pin.is_slot)
        tokens, owners = assigned(tokens, owners, alone, shard_id)
    transfers = _transfers(topology, Ring(tokens, owners), tokens)
    # Without a transfer there is no next topology either, so one that cuts an arc in two keeps its tokens.
    if not transfers:
        tokens, owners = topology.tokens, topology.owners
    return Placement(transfers, tokens, owners, moved, minimum)


def _transfers(topology: Topology, goal: Ring, tokens: Sequence[int]) -> tuple[Transfer, ...]:
    """What changes its owner, between any two tokens of before and after."""
    arcs: dict[tuple[int, int], list[Arc]] = {}
    first = POSITION_MIN
    for token in sorted({*topology.tokens, *tokens}):
        source, target = topology.ring.owner_at(token), goal.owner_at(token)
        if source != target:
            arcs.setdefault((source, target), []).append(Arc(first, token))
        first = token + 1
    return tuple(Transfer(*pair, ArcSet(arcs[pair])) for pair in sorted(arcs))


def _parts(runs: Sequence[Run], received: Sequence[Run]) -> Iterator[tuple[int, Run]]:
    """All slots in order as (owner before, run after), none of them across a run of before."""
    upcoming = iter(sorted(received))
    taken = next(upcoming, None)
    for run in runs:
        at = run.first
        while at < run.end:
            if taken is None or taken.first >= run.end:
                end, owner = run.end, run.owner
            elif at < taken.first:
                end, owner = taken.first, run.owner
            else:
                end, owner = min(taken.end, run.end), taken.owner
            yield run.owner, Run(at, end, owner)
            at = end
            if taken is not None and at == taken.end:
                taken = next(upcoming, None)


def _tokens(runs: Sequence[Run]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(slot_arc(run.first, run.width).last for run in runs), tuple(run.owner for run in runs)
