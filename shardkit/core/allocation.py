"""Allocation: which slots leave the shards that have too many, and which of the others receive them.

Driven by `placement`, which knows how many slots each shard should have; here they are chosen so that few arcs come of
it, because few arcs keep lookups, predicates and publications short after years of changes:

- Where a shard that has too many borders on one that has too few, the border between them shifts: no new arc.
- What is left of a surplus is given away in whole arcs where some add up to it, so that none is cut; else in whole
  arcs as far as none is large enough, and one cut at the end of an arc.
- Cuts are made next to slots given away already. Failing that, two neighbours cut at the border between them, so that
  two cuts cost one new arc.
- Of the slots given away, the longest stretch goes to the largest need.

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
    if runs and (last := runs[-1]).owner == run.owner:
        runs[-1] = Run(last.first, run.end, run.owner)
    else:
        runs.append(run)


def reassigned(runs: Sequence[Run], excess: Mapping[int, int]) -> list[Run]:
    """The slots that change their owner, as runs of the owners they come to.

    ``runs`` are all slots in order; ``excess`` is, by shard, how many slots it has too many (below 0: too few), and
    adds up to 0. A shard only gives or only receives, and exactly so many.
    """
    surplus = {shard_id: count for shard_id, count in excess.items() if count > 0}
    need = {shard_id: -count for shard_id, count in excess.items() if count < 0}
    shifted, runs = _shifted(runs, surplus, need)
    return shifted + _dealt(_given_away(runs, surplus), need)


# --- borders --------------------------------------------------------------------------------------------------------


def _shifted(
    runs: Sequence[Run], surplus: dict[int, int], need: dict[int, int]
) -> tuple[list[Run], list[Run]]:
    """What passes over borders, as received, and all runs after that; ``surplus`` and ``need`` shrink by it."""
    received: list[Run] = []
    after: list[Run] = []

    def passing(source: int, target: int, width: int) -> int:
        count = min(surplus.get(source, 0), need.get(target, 0), width)
        if count:
            surplus[source] -= count
            need[target] -= count
        return count

    def assign(first: int, end: int, owner: int) -> None:
        received.append(Run(first, end, owner))
        append(after, received[-1])

    for run in runs:
        first = run.first
        before = after[-1].owner if after else run.owner
        # Of a thousand shards few give and few receive: most borders stay.
        if not (
            (surplus.get(run.owner) and need.get(before)) or (surplus.get(before) and need.get(run.owner))
        ):
            append(after, run)
            continue
        if after and (count := passing(run.owner, after[-1].owner, run.width)):
            first += count
            assign(run.first, first, after[-1].owner)
        taken = first
        while after and first < run.end and (count := passing(after[-1].owner, run.owner, after[-1].width)):
            giver = after.pop()
            taken -= count
            if giver.first < taken:
                after.append(Run(giver.first, taken, giver.owner))
        if taken < first:
            assign(taken, first, run.owner)
        if first < run.end:
            append(after, Run(first, run.end, run.owner))
    return received, after


# --- what is given away ---------------------------------------------------------------------------------------------


def _given_away(runs: Sequence[Run], surplus: Mapping[int, int]) -> list[Run]:
    """The runs that leave: of each shard in ``surplus`` exactly so many slots."""
    owned: dict[int, list[Run]] = {shard_id: [] for shard_id, count in surplus.items() if count}
    for run in runs:
        if run.owner in owned:
            owned[run.owner].append(run)
    given: list[Run] = []
    cuts: dict[int, int] = {}
    for shard_id in owned:
        whole, missing = _whole_runs(owned[shard_id], surplus[shard_id])
        given += whole
        if missing:
            cuts[shard_id] = missing
    gone = set(given)
    wide = [run for run in runs if run.width >= cuts.get(run.owner, SLOTS + 1) and run not in gone]
    return given + _cut(wide, cuts, {border for run in given for border in (run.first, run.end)})


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

    ``borders`` are where a cut costs no new arc, because what lies beyond leaves too.
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


def _dealt(given: Sequence[Run], need: Mapping[int, int]) -> list[Run]:
    """The slots of ``given``, cut and owned as received: each shard in ``need`` gets exactly so many."""
    received: list[Run] = []
    stretches = [(first - end, first, end) for first, end in _stretches(given)]
    needs = [(-count, target) for target, count in need.items() if count]
    heapq.heapify(stretches)
    heapq.heapify(needs)
    while stretches:
        _, first, end = heapq.heappop(stretches)
        lacking, target = heapq.heappop(needs)
        upto = min(end, first - lacking)
        received.append(Run(first, upto, target))
        if upto < end:
            heapq.heappush(stretches, (upto - end, upto, end))
        elif lacking + upto - first:
            heapq.heappush(needs, (lacking + upto - first, target))
    return received


def _stretches(given: Iterable[Run]) -> list[tuple[int, int]]:
    """Runs as (first, end) without their owners, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for first, end, _ in sorted(given):
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return joined
