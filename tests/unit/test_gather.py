"""Gathering: one result out of several, or an error."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy.engine import IteratorResult
from sqlalchemy.engine.result import SimpleResultMetaData

from shardkit.core.errors import IdentityConflict, UnroutableQuery
from shardkit.orm.gather import Aggregates, Interleaved, Merge, Rows, gather


def gathered(merge: Merge, *shards: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    names = [f"c{number}" for number in range(max((len(row) for rows in shards for row in rows), default=1))]
    results: Any = {
        number: IteratorResult(SimpleResultMetaData(names), iter(rows)) for number, rows in enumerate(shards)
    }
    return [tuple(row) for row in gather(results, merge)]


def test_rows_follow_each_other() -> None:
    assert gathered(Rows(), [(1, "a")], [], [(2, "b"), (2, "b")]) == [(1, "a"), (2, "b"), (2, "b")]
    assert gathered(Rows(), [], []) == []


def test_one_identity_is_on_one_shard() -> None:
    rows = [(1, "a"), (1, "b")]
    assert gathered(Rows(((0,),)), rows, [(2, "a")]) == [*rows, (2, "a")]
    with pytest.raises(
        IdentityConflict, match=r"Shards 0 and 1 both returned a row with the primary key \(1,\)"
    ):
        gathered(Rows(((0,),)), rows, [(1, "c")])
    with pytest.raises(IdentityConflict):
        gathered(Rows(((0,), (1, 0))), [(1, "a")], [(2, "a"), (1, "a")])
    assert gathered(Rows(((0, 1),)), [(1, "a")], [(1, "b")]) == [(1, "a"), (1, "b")]


def test_rows_come_in_the_order_of_the_input() -> None:
    order = Interleaved({0: (1, 3), 1: (0, 2)})
    assert gathered(order, [("b",), ("d",)], [("a",), ("c",)]) == [("a",), ("b",), ("c",), ("d",)]
    with pytest.raises(UnroutableQuery, match="order of the input"):
        gathered(order, [("b",)], [("a",), ("c",)])


def test_aggregates_merge_as_sql_does() -> None:
    every = Aggregates(("count", "sum", "min", "max"))
    assert gathered(every, [(2, 7, 3, 4)], [(0, None, None, None)], [(1, -1, -1, -1)]) == [(3, 6, -1, 4)]
    assert gathered(every, [(0, None, None, None)], [(0, None, None, None)]) == [(0, None, None, None)]


def test_a_sum_keeps_the_type_that_the_server_gave() -> None:
    ((total,),) = gathered(Aggregates(("sum",)), [(Decimal(2**63),)], [(Decimal("9" * 30),)])
    assert total == Decimal(2**63 + int("9" * 30))
    assert type(total) is Decimal
    ((small,),) = gathered(Aggregates(("sum",)), [(1,)], [(2,)])
    assert type(small) is int


def test_what_is_no_integer_is_refused() -> None:
    for value in (1.5, True, "1", Decimal("NaN")):
        with pytest.raises(UnroutableQuery, match="no integer"):
            gathered(Aggregates(("sum",)), [(value,)], [(1,)])
    with pytest.raises(UnroutableQuery, match="out of the range"):
        gathered(Aggregates(("sum",)), [(2**62,)], [(2**62,)])


def test_a_merged_result_is_a_result() -> None:
    results: Any = {
        number: IteratorResult(SimpleResultMetaData(["n", "name"]), iter([(number, "x")]))
        for number in (4, 7)
    }
    merged = gather(results, Rows())
    assert [(row.n, row.name) for row in merged.all()] == [(4, "x"), (7, "x")]
