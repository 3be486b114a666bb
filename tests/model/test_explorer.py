"""The explorer finds what there is to find, by the shortest way."""

from __future__ import annotations

from collections.abc import Iterator

from .explorer import Violation, explore


class Walk:
    """Numbers from 0 by steps of 1 and 3, within bounds; some are bad, some are traps."""

    def __init__(self, *, bad: int | None = None, trap: int | None = None, end: int = 10) -> None:
        self.bad, self.trap, self.end = bad, trap, end

    def first(self) -> int:
        return 0

    def successors(self, state: int) -> Iterator[tuple[str, int]]:
        if state in (self.trap, self.end):
            return
        if state == 99:
            raise Violation("too far")
        for step in (1, 3):
            if state + step <= self.end:
                yield f"+{step}", state + step

    def problem(self, state: int) -> str | None:
        return "bad" if state == self.bad else None

    def unfinished(self, state: int) -> str | None:
        return None if state == self.end else "it is not the end"


class Circle(Walk):
    """5 leads back to itself alone."""

    def successors(self, state: int) -> Iterator[tuple[str, int]]:
        yield from [("stay", 5)] if state == 5 else super().successors(state)


def test_every_state_is_seen_once() -> None:
    outcome = explore(Walk())
    assert (outcome.states, outcome.violation, outcome.exhausted) == (11, None, True)


def test_the_way_to_a_bad_state_is_the_shortest() -> None:
    outcome = explore(Walk(bad=7))
    assert outcome.violation == "bad"
    assert sorted(outcome.trace) == ["+1", "+3", "+3"]
    assert "+3" in str(outcome)


def test_a_state_without_a_way_on_has_to_be_an_end() -> None:
    outcome = explore(Walk(trap=6))
    assert outcome.violation == "nothing can go on, and it is not the end"
    assert outcome.trace == ["+3", "+3"]


def test_going_round_for_ever_is_no_end() -> None:
    outcome = explore(Circle())
    assert outcome.violation == "from here no end can be reached"
    assert explore(Circle(), progress=False).violation is None


def test_a_violation_on_the_way_is_found() -> None:
    outcome = explore(Walk(end=99))
    assert outcome.violation is None
    outcome = explore(Walk(end=102))
    assert outcome.violation == "too far"


def test_what_the_limit_leaves_out_is_said() -> None:
    outcome = explore(Walk(), limit=3)
    assert not outcome.exhausted
    assert "not all" in str(outcome)
