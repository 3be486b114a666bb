"""Merging of raw rows in Python: totals, order, distinct rows, identities."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from shardkit.core.errors import IdentityConflict, UnmergeableQuery
from shardkit.orm.planning.arranging import Arrangement, Key
from shardkit.orm.planning.totals import Totals

INT, TEXT, FLOAT, NUMERIC = 23, 25, 701, 1700


class _Result:
    """As much of a result as a merge looks at: a cursor with rows of the driver."""

    def __init__(self, oids: Sequence[int], rows: list[Any]) -> None:
        self.cursor = self
        self.description = [(f"c{number}", oid) for number, oid in enumerate(oids)]
        self._rows = rows

    def fetchall(self) -> list[Any]:
        return self._rows

    def close(self) -> None:
        pass


class _Finish:
    def run(self, statement: Any, parameters: Mapping[str, Any]) -> Any:
        raise AssertionError("nothing has to be asked of a server")

    def answer(self, description: Sequence[Any], rows: Iterable[Any]) -> Any:
        return [column[0] for column in description], list(rows)

    def instead(self, statement: Any) -> Any:
        raise AssertionError("the statement is not run")


def put_together(merge: Any, oids: Sequence[int], *shards: Sequence[Any]) -> list[Any]:
    results: Any = {number: _Result(oids, list(rows)) for number, rows in enumerate(shards)}
    found: Any = merge.merged(results, _Finish())
    return list(found[1])


# --- totals ---------------------------------------------------------------------------------------------------------


def test_totals_merge_as_sql_does() -> None:
    every = Totals(("count", "sum", "min", "max"))
    assert every.of([(2, 7, 3, 4), (0, None, None, None), (1, -1, -1, -1)]) == (3, 6, -1, 4)
    assert every.of([(0, None, None, None), (0, None, None, None)]) == (0, None, None, None)


def test_a_sum_keeps_the_type_that_the_server_gave() -> None:
    (total,) = Totals(("sum",)).of([(Decimal(2**63),), (Decimal("9" * 30),)])
    assert total == Decimal(2**63 + int("9" * 30))
    assert type(total) is Decimal
    (small,) = Totals(("sum",)).of([(1,), (2,)])
    assert type(small) is int


def test_what_is_no_integer_is_refused() -> None:
    for value in (1.5, True, "1", Decimal("NaN")):
        with pytest.raises(UnmergeableQuery, match="no integer"):
            Totals(("sum",)).of([(value,), (1,)])
    with pytest.raises(UnmergeableQuery, match="out of the range"):
        Totals(("sum",)).of([(2**62,), (2**62,)])


# --- order ----------------------------------------------------------------------------------------------------------


def arranged(
    width: int, order: Iterable[tuple[int, bool, bool]] = (), distinct: Iterable[int] = (), **more: Any
) -> Arrangement:
    return Arrangement(
        width=width,
        identities=more.get("identities", ()),
        order=tuple(Key(*key) for key in order),
        distinct=tuple(Key(place, None, None) for place in distinct),
        exact=True,
        limit=None,
        offset=None,
    )


ORDERS = {
    (False, False): [-1, 0, 5, None],
    (False, True): [None, -1, 0, 5],
    (True, True): [None, 5, 0, -1],
    (True, False): [5, 0, -1, None],
}


@pytest.mark.parametrize(("descending", "nulls_first"), ORDERS)
def test_nulls_stand_where_they_are_asked_to(descending: bool, nulls_first: bool) -> None:
    plan = arranged(1, [(0, descending, nulls_first)])
    found = put_together(plan.merge(None, None), [INT], [(5,), (None,)], [(-1,)], [(0,)])
    assert [value for (value,) in found] == ORDERS[descending, nulls_first]


@pytest.mark.parametrize("descending", [False, True])
def test_nan_is_above_all_numbers(descending: bool) -> None:
    for oid, kind in ((FLOAT, float), (NUMERIC, Decimal)):
        plan = arranged(1, [(0, descending, False)])
        shards: Any = [[(kind("nan"),), (kind("-inf"),)], [(kind("inf"),), (kind("1.5"),)], [(None,)]]
        found = [value for (value,) in put_together(plan.merge(None, None), [oid], *shards)]
        assert found.pop() is None
        if descending:
            found.reverse()
        assert found[:3] == [kind("-inf"), kind("1.5"), kind("inf")]
        assert math.isnan(found[3])


def test_hidden_columns_order_and_are_cut_off() -> None:
    plan = arranged(1, [(1, False, False), (2, True, True)])
    rows = [("b", 2, uuid.UUID(int=1)), ("c", 1, uuid.UUID(int=1)), ("a", 1, uuid.UUID(int=2))]
    random.Random(1).shuffle(rows)
    assert put_together(plan.merge(None, None), [TEXT, INT, 2950], rows[:1], rows[1:]) == [
        ("a",),
        ("c",),
        ("b",),
    ]


def test_limit_and_offset_are_of_the_whole() -> None:
    plan = arranged(1, [(0, False, False)])
    shards = [[(1,), (4,)], [(2,), (3,)]]
    assert put_together(plan.merge(2, 1), [INT], *shards) == [(2,), (3,)]
    assert put_together(plan.merge(None, 3), [INT], *shards) == [(4,)]
    assert put_together(plan.merge(0, None), [INT], *shards) == []
    assert put_together(plan.merge(5, 50), [INT], *shards) == []


def test_equal_rows_of_two_shards_are_one_where_they_have_to_be_distinct() -> None:
    shards: Any = [[(1, None), (1.0, None)], [(1, None), (2, date(2020, 1, 1))], [(None, None)]]
    found = put_together(arranged(2, distinct=[0, 1]).merge(None, None), [INT, 1082], *shards)
    assert found == [(1, None), (2, date(2020, 1, 1)), (None, None)]


def test_nan_is_one_value() -> None:
    nan = Decimal("NaN")
    assert len(put_together(arranged(1, distinct=[0]).merge(None, None), [NUMERIC], [(nan,)], [(nan,)])) == 1


def test_a_type_that_python_orders_otherwise_is_refused() -> None:
    plan = arranged(1, [(0, False, False)])
    with pytest.raises(UnmergeableQuery, match="another type on the servers"):
        put_together(plan.merge(None, None), [TEXT], [("a",)], [("B",)])


def test_one_identity_is_on_one_shard() -> None:
    rows = [(1, "a"), (1, "b")]
    whole = arranged(2, identities=((0, 1),)).merge(None, None)
    assert put_together(whole, [INT, TEXT], rows, [(2, "a")]) == [*rows, (2, "a")]
    first = arranged(2, identities=((0,),)).merge(None, None)
    with pytest.raises(IdentityConflict, match=r"0 and 1 both returned a row with the primary key \(1,\)"):
        put_together(first, [INT, TEXT], rows, [(1, "c")])
    # What an outer join has left without a row has no identity.
    assert put_together(first, [INT, TEXT], [(None, "a")], [(None, "b")]) == [(None, "a"), (None, "b")]
