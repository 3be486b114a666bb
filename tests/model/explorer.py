"""A breadth-first explorer of explicit states: every state that can be reached, and the shortest way to a bad one.

States are tuples, told apart by their hash; a model gives the first one, those that can follow, what is wrong with
one, and whether one is an end. It knows nothing of what is modelled.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


class Violation(Exception):
    """A step would break a promise: says which."""


class Model(Protocol[S]):
    """What is explored."""

    def first(self) -> S:
        """Where it begins."""
        ...

    def successors(self, state: S) -> Iterable[tuple[str, S]]:
        """What can happen next, in words, and what then is so; `Violation` where a promise breaks."""
        ...

    def problem(self, state: S) -> str | None:
        """What is wrong in a state."""
        ...

    def unfinished(self, state: S) -> str | None:
        """Why a state cannot be the last one; None if it can."""
        ...


@dataclass
class Outcome:
    """What was found: the states seen, and the first violation with the shortest way to it."""

    states: int
    violation: str | None = None
    trace: list[str] = field(default_factory=list)
    exhausted: bool = True
    """Whether every state was seen; not so after a violation or at the limit."""

    def __str__(self) -> str:
        if self.violation is None:
            return f"{self.states} states, {'all' if self.exhausted else 'not all'} of them, no violation"
        steps = "\n".join(f"  {number:2} {label}" for number, label in enumerate(self.trace, 1))
        return f"{self.states} states, then {self.violation}:\n{steps}"


class _Search(Generic[S]):
    def __init__(self, model: Model[S]) -> None:
        self.model = model
        self.order: list[S] = [model.first()]
        self.number: dict[S, int] = {self.order[0]: 0}
        self.parents = array("l", [-1])
        self.edges = array("l")
        self.bounds = array("l", [0])

    def expand(self, here: int) -> str | None:
        """Look at one state and number those that follow; what is wrong."""
        state = self.order[here]
        found = self.model.problem(state)
        if found is not None:
            return found
        moves = 0
        for _, following in self.model.successors(state):
            moves += 1
            there = self.number.get(following)
            if there is None:
                there = self.number[following] = len(self.order)
                self.order.append(following)
                self.parents.append(here)
            self.edges.append(there)
        self.bounds.append(len(self.edges))
        return None if moves else self._stuck(state)

    def _stuck(self, state: S) -> str | None:
        reason = self.model.unfinished(state)
        return None if reason is None else f"nothing can go on, and {reason}"

    def trace(self, here: int) -> list[str]:
        path = [here]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        path.reverse()
        labels: list[str] = []
        for before, after in pairwise(path):
            target = self.order[after]
            labels.append(
                next(label for label, state in self.model.successors(self.order[before]) if state == target)
            )
        return labels

    def hopeless(self) -> int | None:
        """The first state from which no end can be reached any more."""
        good = bytearray(1 if self.model.unfinished(state) is None else 0 for state in self.order)
        changed = True
        while changed:
            changed = False
            for here in range(len(self.order) - 1, -1, -1):
                if not good[here] and any(
                    good[self.edges[at]] for at in range(self.bounds[here], self.bounds[here + 1])
                ):
                    good[here] = 1
                    changed = True
        bad = good.find(0)
        return None if bad < 0 else bad


def explore(model: Model[S], *, limit: int = 5_000_000, progress: bool = True) -> Outcome:
    """Every state, or the first violation. With ``progress``, a state from which no end is to be reached is one too."""
    with _without_collector():
        return _explore(model, limit, progress)


@contextmanager
def _without_collector() -> Iterator[None]:
    """States hold no cycles, and looking for some among millions of tuples takes most of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _explore(model: Model[S], limit: int, progress: bool) -> Outcome:
    search = _Search(model)
    here = 0
    while here < len(search.order):
        if here >= limit:
            return Outcome(here, exhausted=False)
        try:
            found = search.expand(here)
        except Violation as error:
            found = str(error)
        if found is not None:
            return Outcome(here + 1, found, search.trace(here), exhausted=False)
        here += 1
    if progress and (lost := search.hopeless()) is not None:
        return Outcome(here, "from here no end can be reached", search.trace(lost), exhausted=False)
    return Outcome(here)
