"""Allocation: which slots leave the shards that have too many, and which of the others receive them.

Driven by `placement`, which knows how many slots each shard should have; here they are chosen so that few arcs come of
it, because few arcs keep lookups, predicates and publications short after years of changes:

- A shard gives away exactly its surplus: whole arcs where some add up to it, so that no arc is cut; else whole arcs as
  far as none is large enough, and one cut at the end of an arc.
- Cuts are made where they cost no new arc: next to a shard that receives, or to slots given away already. Failing
  that, two neighbours cut at the border between them, so that two cuts cost one new arc.
- Slots given away go to a receiver that they touch, then the longest stretch to the largest need.

Pure, and a function of the slots alone: neither shard ids nor their order decide anything but ties.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from .keyrange import SLOTS

_SUBSET_RUNS = 64
"""How many of a shard's largest runs are tried for a sum: it bounds the memory of the search."""


class Run(NamedTuple):
    """The slots from ``first`` up to but not including ``end``, and who owns them."""

    first: int
    end: int
    owner: int

    @property
    def width(self) -> int:
        """Number of slots."""
        return self.end - self.first


def append(runs: list[Run], run: Run) -> None:
    """Adds the run that follows the last one; two of one owner become one."""
    if runs and runs[-1].owner == run.owner:
        runs[-1] = Run(runs[-1].first, run.end, run.owner)
    else:
        runs.append(run)


# --- what is given away -------------------------------------------------------------------------------------


def given_away(runs: Sequence[Run], surplus: Mapping[int, int], need: Mapping[int, int]) -> list[Run]:
    """The runs that leave: of each shard in ``surplus`` exactly so many slots."""
    owned: dict[int, list[Run]] = {shard_id: [] for shard_id in surplus}
    for run in runs:
        if run.owner in owned:
            owned[run.owner].append(run)
    given: list[Run] = []
    cuts: dict[int, int] = {}
    for shard_id, count in surplus.items():
        whole, missing = _whole_runs(owned[shard_id], count)
        given += whole
        if missing:
            cuts[shard_id] = missing
    kept = set(runs).difference(given)
    borders = {border for run in given for border in (run.first, run.end)}
    borders |= {border for run in runs if run.owner in need for border in (run.first, run.end)}
    wide = [run for run in runs if run in kept and run.width >= cuts.get(run.owner, SLOTS + 1)]
    return given + _cut(wide, cuts, borders)


def _whole_runs(owned: Sequence[Run], count: int) -> tuple[list[Run], int]:
    """Whole runs to give away towards ``count`` slots, and the slots that are missing still: no more than the largest
    of the runs that stay has."""
    exact = _subset(owned, count)
    if exact:
        return exact, 0
    largest = sorted(owned, key=lambda run: (-run.width, run.first))
    taken: list[Run] = []
    for run in largest:
        if run.width >= count:
            break
        taken.append(run)
        count -= run.width
    return taken, count


def _subset(owned: Sequence[Run], count: int) -> list[Run] | None:
    """Few runs that add up to exactly ``count`` slots, or None.

    A subset sum over bits: bit n of ``reached[i]`` says that some of the first i runs add up to n.
    """
    if sum(run.width for run in owned) == count:
        return list(owned)
    fitting = sorted((run for run in owned if run.width <= count), key=lambda run: (-run.width, run.first))
    mask = (1 << count + 1) - 1
    reached = [1]
    for run in fitting[:_SUBSET_RUNS]:
        reached.append((reached[-1] | reached[-1] << run.width) & mask)
        if reached[-1] >> count & 1:
            break
    else:
        return None
    chosen: list[Run] = []
    for before, run in zip(reached[-2::-1], fitting[len(reached) - 2 :: -1], strict=True):
        if not before >> count & 1:
            chosen.append(run)
            count -= run.width
    return chosen


def _cut(wide: Sequence[Run], cuts: Mapping[int, int], borders: set[int]) -> list[Run]:
    """One piece of each shard in ``cuts``, of so many slots, at an end of one of its runs in ``wide`` (sorted).

    ``borders`` are where a cut costs no new arc, because what lies beyond leaves too or receives.
    """
    pieces: dict[int, Run] = {}

    def cut(run: Run, border: int) -> None:
        count = cuts[run.owner]
        first = border if border == run.first else border - count
        pieces[run.owner] = Run(first, first + count, run.owner)

    for run in wide:
        for border in (run.first, run.end):
            if run.owner not in pieces and border in borders:
                cut(run, border)
    left = [run for run in wide if run.owner not in pieces]
    for before, after in _pairs(left):
        cut(before, before.end)
        cut(after, after.first)
    for run in sorted(left, key=lambda run: (-run.width, run.first)):
        if run.owner not in pieces:
            cut(run, run.end)
    return list(pieces.values())


def _pairs(wide: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Neighbouring runs of two shards, as many as the greedy rule finds, no shard twice: the shard with the fewest
    neighbours chooses first, and of those the one with the fewest."""
    neighbours: dict[int, dict[int, tuple[Run, Run]]] = {}
    for before, after in pairwise(wide):
        if before.end == after.first:
            neighbours.setdefault(before.owner, {}).setdefault(after.owner, (before, after))
            neighbours.setdefault(after.owner, {}).setdefault(before.owner, (before, after))
    pairs: list[tuple[Run, Run]] = []
    paired: set[int] = set()
    for shard_id in sorted(neighbours, key=lambda each: (len(neighbours[each]), each)):
        free = [other for other in neighbours[shard_id] if other not in paired]
        if shard_id not in paired and free:
            other = min(free, key=lambda each: (len(neighbours[each]), each))
            pairs.append(neighbours[shard_id][other])
            paired |= {shard_id, other}
    return pairs


# --- who receives it ----------------------------------------------------------------------------------------


def dealt(runs: Sequence[Run], given: Sequence[Run], need: Mapping[int, int]) -> list[Run]:
    """The slots of ``given``, cut and owned as received: each shard in ``need`` gets exactly so many."""
    missing = dict(need)
    shares: list[Run] = []

    def deal(first: int, end: int, target: int) -> None:
        shares.append(Run(first, end, target))
        missing[target] -= end - first

    owner_before = {run.end: run.owner for run in runs if run.owner in need}
    owner_after = {run.first: run.owner for run in runs if run.owner in need}
    stretches: list[tuple[int, int, int]] = []
    for first, end in _stretches(given):
        touching = owner_before.get(first)
        if touching is not None and missing[touching]:
            upto = min(end, first + missing[touching])
            deal(first, upto, touching)
            first = upto
        touching = owner_after.get(end)
        if touching is not None and missing[touching] and first < end:
            since = max(first, end - missing[touching])
            deal(since, end, touching)
            end = since
        if first < end:
            stretches.append((first - end, first, end))
    needs = [(-count, target) for target, count in missing.items() if count]
    heapq.heapify(stretches)
    heapq.heapify(needs)
    while stretches:
        _, first, end = heapq.heappop(stretches)
        lacking, target = heapq.heappop(needs)
        upto = min(end, first - lacking)
        deal(first, upto, target)
        if upto < end:
            heapq.heappush(stretches, (upto - end, upto, end))
        if missing[target]:
            heapq.heappush(needs, (-missing[target], target))
    return shares


def _stretches(given: Iterable[Run]) -> list[tuple[int, int]]:
    """Runs as (first, end) without their owners, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for first, end, _ in sorted(given):
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return joined
