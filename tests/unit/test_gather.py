"""Gathering: one result out of several, or an error."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.engine import IteratorResult
from sqlalchemy.engine.result import SimpleResultMetaData

from shardkit.core.errors import UnroutableQuery
from shardkit.orm.planning.gather import Interleaved, Rows, gather


def gathered(merge: Rows | Interleaved, *shards: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    names = [f"c{number}" for number in range(max((len(row) for rows in shards for row in rows), default=1))]
    results: Any = {
        number: IteratorResult(SimpleResultMetaData(names), iter(rows)) for number, rows in enumerate(shards)
    }
    return [tuple(row) for row in gather(results, merge)]


def test_rows_follow_each_other() -> None:
    assert gathered(Rows(), [(1, "a")], [], [(2, "b"), (2, "b")]) == [(1, "a"), (2, "b"), (2, "b")]
    assert gathered(Rows(), [], []) == []


def test_rows_come_in_the_order_of_the_input() -> None:
    order = Interleaved({0: (1, 3), 1: (0, 2)})
    assert gathered(order, [("b",), ("d",)], [("a",), ("c",)]) == [("a",), ("b",), ("c",), ("d",)]
    with pytest.raises(UnroutableQuery, match="order of the input"):
        gathered(order, [("b",)], [("a",), ("c",)])


def test_a_merged_result_is_a_result() -> None:
    results: Any = {
        number: IteratorResult(SimpleResultMetaData(["n", "name"]), iter([(number, "x")]))
        for number in (4, 7)
    }
    merged = gather(results, Rows())
    assert [(row.n, row.name) for row in merged.all()] == [(4, "x"), (7, "x")]
