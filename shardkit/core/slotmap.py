"""The ring as slots: whose each slot is, where arcs and pins need not end with slots.

Driven by `placement`. Positions that are pinned alone are holes that count for nothing; where the rest of a slot is in
several hands, it is taken to be of the shard that holds most of it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .allocation import Run, append
from .keyrange import POSITION_MIN, Arc, slot_arc, slot_of
from .topology import Topology

PINNED = -1
"""The owner of slots that stay where they are: no shard, so that none of them is given away or received."""


def slot_runs(topology: Topology) -> list[Run]:
    """All slots in order, as runs of one owner each."""
    pieces: list[Run] = []
    divided: dict[int, dict[int, int]] = {}
    for arc, owner in _arcs(topology):
        low, high = slot_of(arc.first), slot_of(arc.last)
        begin = low if arc.first == slot_arc(low).first else low + 1
        end = high + 1 if arc.last == slot_arc(high).last else high
        if begin < end:
            pieces.append(Run(begin, end, owner))
        for slot in {low, high}:
            if not begin <= slot < end:
                within = slot_arc(slot)
                part = min(arc.last, within.last) - max(arc.first, within.first) + 1
                shares = divided.setdefault(slot, {})
                shares[owner] = shares.get(owner, 0) + part
    for pin in topology.pins:
        if not pin.is_slot and pin.slot in divided:
            divided[pin.slot][topology.ring.owner_at(pin.arc.first)] -= 1
    for slot, shares in divided.items():
        most = max(shares, key=lambda owner: (shares[owner], -owner))
        pieces.append(Run(slot, slot + 1, most))
    runs: list[Run] = []
    for piece in sorted(pieces):
        append(runs, piece)
    return runs


def _arcs(topology: Topology) -> Iterator[tuple[Arc, int]]:
    first = POSITION_MIN
    for token, owner in zip(topology.tokens, topology.owners, strict=True):
        yield Arc(first, token), owner
        first = token + 1


def barred(runs: Sequence[Run], fixed: Mapping[int, int]) -> list[Run]:
    """The runs with the slots of ``fixed`` in runs of `PINNED`."""
    slots = iter(sorted(fixed))
    slot = next(slots, None)
    found: list[Run] = []
    for run in runs:
        at = run.first
        while slot is not None and slot < run.end:
            if at < slot:
                append(found, Run(at, slot, run.owner))
            append(found, Run(slot, slot + 1, PINNED))
            at = slot + 1
            slot = next(slots, None)
        if at < run.end:
            append(found, Run(at, run.end, run.owner))
    return found
