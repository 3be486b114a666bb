"""The checker on histories made by hand: it passes those that one copy of a row allows, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.history.checker import check
from tests.history.records import Kind, Operation, Outcome, Row, line, load, parse

A, B, C, INC, INC2 = (letter.ljust(9, "0") for letter in ("a", "b", "c", "i", "i1"))
"""Tokens; of increments the last two."""
ONE = Row(10, 1, 0, A)
TWO = Row(10, 2, 0, f"{A} {B}")
UNKNOWN, FAILED = Outcome.UNKNOWN, Outcome.FAILED


def insert(
    began: int, ended: int, born: int = 10, token: str = A, outcome: Outcome = Outcome.DONE
) -> Operation:
    row = Row(born, 1, 0, token) if outcome is Outcome.DONE else None
    return Operation(Kind.INSERT, 1, began, ended, outcome, token, born, row)


def write(
    began: int, ended: int | None, token: str, row: Row | None, outcome: Outcome = Outcome.DONE
) -> Operation:
    return Operation(Kind.WRITE, 1, began, ended, outcome, token, 0, row)


def read(began: int, ended: int, row: Row | None) -> Operation:
    return Operation(Kind.READ, 1, began, ended, Outcome.DONE, row=row)


def delete(
    began: int, ended: int | None, row: Row | None, born: int = 10, outcome: Outcome = Outcome.DONE
) -> Operation:
    return Operation(Kind.DELETE, 1, began, ended, outcome, "", born, row)


def scatter(began: int, ended: int, *keys: int, count: int | None = None) -> Operation:
    if count is not None:
        return Operation(Kind.COUNT, 0, began, ended, Outcome.DONE, rows=count)
    return Operation(Kind.LIST, 0, began, ended, Outcome.DONE, keys=keys, rows=len(keys))


GONE_PERHAPS = delete(3, None, None, 10, UNKNOWN)

GOOD = {
    "nothing": [],
    "one after the other": [insert(1, 2), write(3, 4, B, TWO), read(5, 6, TWO), delete(7, 8, TWO), read(9, 10, None)],
    "read before it was inserted": [read(1, 2, None), insert(3, 4)],
    "read while it is written": [insert(1, 2), write(3, 9, B, TWO), read(4, 5, ONE), read(6, 7, TWO)],
    "unknown, and it took place": [insert(1, 2), write(3, None, B, None, UNKNOWN), read(5, 6, ONE), read(8, 9, TWO)],
    "unknown, and it did not": [insert(1, 2), write(3, None, B, None, UNKNOWN), read(5, 6, ONE)],
    "failed, and it did not": [insert(1, 2), write(3, 4, B, None, FAILED), read(5, 6, ONE)],
    "inserted again": [insert(1, 2), delete(3, 4, ONE), insert(20, 21, 20, B), read(22, 23, Row(20, 1, 0, B))],
    "absent between": [insert(1, 2), delete(3, 9, ONE), read(4, 5, None), read(6, 7, None)],
    "unknown deletion seen": [insert(1, 2), GONE_PERHAPS, read(5, 6, ONE), read(7, 8, None)],
    "write to what is deleted": [insert(1, 2), delete(3, 4, ONE), write(5, 6, B, None)],
    "increments": [
        insert(1, 2), write(3, 4, INC, Row(10, 2, 1, f"{A} {INC}")), write(5, 6, INC2, Row(10, 3, 2, f"{INC} {INC2}")),
    ],
    "stable row counted": [insert(1, 2), scatter(3, 4, count=1), scatter(3, 4, 1)],
    "counted or not while it comes": [insert(3, 6), scatter(2, 4, count=0), scatter(2, 7, 1), scatter(1, 2, count=0)],
    "not counted after it went": [insert(1, 2), delete(3, 4, ONE), scatter(5, 6), scatter(3, 6, 1)],
    "unsure after an unknown deletion": [insert(1, 2), GONE_PERHAPS, scatter(5, 6), scatter(7, 8, 1)],
}  # fmt: skip

BAD = {
    "stale read": [insert(1, 2), write(3, 4, B, TWO), read(5, 6, ONE)],
    "read from the future": [insert(1, 2), read(3, 4, TWO), write(5, 6, B, TWO)],
    "two reads in the wrong order": [insert(1, 2), write(3, 99, B, TWO), read(4, 5, TWO), read(6, 7, ONE)],
    "lost update": [insert(1, 2), write(3, 8, B, TWO), write(3, 8, C, Row(10, 2, 0, f"{A} {C}"))],
    "lost later": [
        insert(1, 2), write(3, 4, B, TWO), read(5, 6, Row(10, 2, 0, f"{A} {C}")), write(4, 9, C, None, UNKNOWN),
    ],
    "lost increment": [
        insert(1, 2), write(3, 4, INC, Row(10, 2, 1, f"{A} {INC}")), write(5, 6, INC2, Row(10, 3, 1, f"{INC} {INC2}")),
    ],
    "done twice": [insert(1, 2), write(3, 4, B, TWO), read(5, 6, Row(10, 3, 0, f"{A} {B} {B}"))],
    "acknowledged and not there": [insert(1, 2), write(3, 4, B, TWO), read(3, 4, ONE), read(5, 6, ONE)],
    "failed and there": [insert(1, 2), write(3, 4, B, None, FAILED), read(5, 6, TWO)],
    "written by nobody": [insert(1, 2), read(5, 6, TWO)],
    "resurrected": [insert(1, 2), delete(3, 4, ONE), read(5, 6, ONE)],
    "written after its deletion": [insert(1, 2), delete(3, 8, ONE), write(3, 8, B, TWO)],
    "old row after the new one": [insert(1, 2), delete(3, 4, ONE), insert(20, 21, 20, B), read(22, 23, ONE)],
    "missing": [insert(1, 2), read(3, 4, None)],
    "missing again": [insert(1, 2), delete(3, 4, ONE), insert(20, 21, 20, B), read(22, 23, None)],
    "gone before its deletion": [insert(1, 2), read(3, 4, None), delete(5, 6, ONE)],
    "write that found nothing": [insert(1, 2), write(3, 4, B, None)],
    "write that found nothing, and is there": [insert(1, 2), write(3, 9, B, None), read(4, 8, TWO)],
    "deleted twice": [insert(1, 2), delete(3, 4, ONE), delete(5, 6, ONE)],
    "stable row not counted": [insert(1, 2), scatter(3, 4, count=0)],
    "stable row missed": [insert(1, 2), scatter(3, 4)],
    "stable row twice": [insert(1, 2), scatter(3, 4, 1, 1)],
    "counted twice": [insert(1, 2), scatter(3, 4, count=2)],
    "counted after it went": [insert(1, 2), delete(3, 4, ONE), scatter(5, 6, 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_good_history_passes(name: str) -> None:
    assert check(GOOD[name], {0: [1]}).problems == []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_is_found(name: str) -> None:
    report = check(BAD[name], {0: [1]})
    assert report.found == len(report.problems) > 0


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    done = [insert(1, 2), read(3, 4, ONE), scatter(5, 6, 1)]
    begun = [write(7, None, B, None, UNKNOWN), write(8, None, C, None, UNKNOWN)]
    ended = write(8, 9, C, Row(10, 2, 0, f"{A} {C}"))
    (tmp_path / "1").write_bytes(b"".join(map(line, [*done, *begun, ended])) + line(begun[0])[:10])
    assert load([tmp_path / "1"]) == [*done, ended, begun[0]]
    for operation in [*done, *begun, ended]:
        assert parse(line(operation)) == operation


def test_counts_are_told() -> None:
    report = check([*GOOD["unknown, and it took place"], scatter(3, 4, 1)], {0: [1]})
    assert (report.operations, report.unknown, report.effective) == (5, 1, 1)
    assert (report.scatters, report.rows_scattered) == (1, 1)
