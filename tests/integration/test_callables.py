"""Bound parameters whose values callables make: called once, and what was routed by is what is sent.

Each callable returns another key each time, so a statement that is sent to one shard with the key of another finds
nothing, or writes nothing. Sync and async (`tests.twins`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import BigInteger, bindparam, delete, exists, func, insert, select, text, union_all, update
from sqlalchemy.orm import aliased, selectinload, with_loader_criteria, with_parent
from sqlalchemy.types import UserDefinedType

from shardkit.core.errors import UnroutableQuery
from tests.fix_sharded import InSession
from tests.twins import KEYS, Country, Post, User

users = User.metadata.tables["User"]


class Keys:
    """Another key at each call; `called` are those that were given."""

    def __init__(self, *keys: int) -> None:
        self._keys = list(keys or (1, 2, 3, 4, 5, 6, 7, 8))
        self.called: list[int] = []

    def __call__(self) -> int:
        self.called.append(self._keys[len(self.called)])
        return self.called[-1]

    @property
    def bound(self) -> Any:
        return bindparam("k", callable_=self, type_=BigInteger())


class Uncached(UserDefinedType[int]):
    """SQL with values of it is compiled each time."""

    cache_ok = False

    def get_col_spec(self, **_: Any) -> str:
        return "BIGINT"


READS: dict[str, Callable[[Any], Any]] = {
    "equality": lambda k: select(User.id).where(User.id == k),
    "entity": lambda k: select(User).where(User.id == k).options(selectinload(User.posts)),
    "alias": lambda k: select((one := aliased(User)).id).where(one.id == k),
    "criteria of an option": lambda k: select(User.id).options(with_loader_criteria(User, User.id == k)),
    "subquery": lambda k: select(User.id).where(
        User.id == k, exists().where(Post.user_id == User.id) | (User.id == k)
    ),
    "CTE": lambda k: select(select(User.id).where(User.id == k).cte().c.id),
    "union": lambda k: union_all(select(User.id).where(User.id == k), select(User.id).where(User.id == k)),
    "scatter": lambda k: select(User.id).where(User.id + 0 == k),
    "sum of a scatter": lambda k: select(func.max(User.id)).where(User.id + 0 == k),
    "pulled": lambda k: (
        select(User.id).join(one := aliased(User), one.rank == User.rank).where(User.id + 0 == k).distinct()
    ),
    "without a cache key": lambda k: select(User.id).where(User.id == k, bindparam("u", 1, Uncached()) == 1),
    "without a cache key, scattered": lambda k: select(User.id).where(
        User.id + 0 == k, bindparam("u", 1, Uncached()) == 1
    ),
}


@pytest.mark.parametrize("cached", [True, False], ids=["kept", "compiled each time"])
@pytest.mark.parametrize("name", READS)
def test_what_is_read(in_shards: InSession, name: str, cached: bool) -> None:
    options: Any = {} if cached else {"compiled_cache": None}

    def work(session: Any) -> None:
        for _ in range(2):  # compiled by the first
            keys = Keys()
            found = session.execute(READS[name](keys.bound), execution_options=options).all()
            assert keys.called == [1]
            assert {getattr(row[0], "id", row[0]) for row in found} == {1}

    in_shards(work)


def test_what_was_compiled_is_shared_with_plain_values(in_shards: InSession) -> None:
    """In either order, one shape has one compiled form."""

    def work(session: Any) -> None:
        for place in range(4):
            keys = Keys()
            bound = keys.bound if place % 2 else bindparam("k", 1, BigInteger())
            assert session.scalars(select(User.id, User.rank).where(User.id == bound)).all() == [1]
            assert keys.called == [1] * (place % 2)

    in_shards(work)


def test_a_list_that_is_split(in_shards: InSession) -> None:
    lists = iter([KEYS, KEYS[:1], [], []])
    bound = bindparam("k", callable_=lambda: next(lists), expanding=True, type_=BigInteger())

    def work(session: Any) -> None:
        assert sorted(session.scalars(select(User.id).where(User.id.in_(bound)))) == KEYS

    in_shards(work)
    assert next(lists) == KEYS[:1]


def test_what_is_written(in_shards: InSession) -> None:
    """On the shard of one key, and on all shards, of which some hold rows in transit."""

    def work(session: Any) -> None:
        unsynchronized = {"synchronize_session": False}
        for statement in (
            lambda k: update(User).where(User.id == k).values(name="new"),
            lambda k: update(User).where(User.id + 0 == k).values(name="new"),
            lambda k: update(users).where(users.c.id == k).values(name="new"),
            lambda k: delete(Post).where(Post.user_id == k, Post.likes.is_(None)),
        ):
            keys = Keys(5, 6, 7, 8)
            result = session.execute(statement(keys.bound), execution_options=unsynchronized)
            assert keys.called == [5]
            if statement(keys.bound).is_update:
                assert result.rowcount == 1
                assert session.scalars(select(User.id).where(User.name == "new")).all() == [5]
            session.rollback()
        keys = Keys(7001, 7002, 7003)
        session.execute(insert(users).values(id=keys.bound, name="new"))
        assert keys.called == [7001]
        assert session.scalars(select(User.name).where(User.id == 7001)).all() == ["new"]
        keys = Keys(7, 8, 9)
        session.execute(insert(Country).values(code="xx", name=bindparam("n", callable_=lambda: str(keys()))))
        assert keys.called == [7]
        with pytest.raises(UnroutableQuery) as error:
            session.execute(insert(Country).values([{"code": "yy", "name": bindparam("n", callable_=keys)}]))
        assert error.value.fields["reason"] == "callable"

    in_shards(work, mode="best_effort")


def test_rows_of_a_bulk_operation(in_shards: InSession) -> None:
    def work(session: Any) -> None:
        keys = Keys()
        returned = insert(User).returning(User.id, keys.bound.label("k"))
        rows = session.execute(returned, [{"id": 7000 + place, "name": "x"} for place in range(30)]).all()
        assert keys.called == [1]
        assert {row.k for row in rows} == {1}

    in_shards(work, mode="best_effort")


def test_text_that_is_scattered(in_shards: InSession) -> None:
    def work(session: Any) -> None:
        keys = Keys()
        asked = text('SELECT id, :k AS k FROM "User" WHERE shardkit.owned(id)').bindparams(keys.bound)
        rows = session.execute(asked, bind_arguments={"scatter": True}).all()
        assert keys.called == [1]
        assert sorted(row.id for row in rows) == KEYS
        assert {row.k for row in rows} == {1}

    in_shards(work, mode="best_effort")  # text may write


def test_relationships_compared_with_instances(in_shards: InSession) -> None:
    """SQLAlchemy makes a callable of the instance's key, which autoflush may still have to set."""

    def work(session: Any) -> None:
        user = session.get_one(User, 7)
        by_user = session.scalars(select(Post.id).where(Post.user == user).order_by(Post.id)).all()
        assert (
            by_user
            == session.scalars(select(Post.id).where(with_parent(user, User.posts)).order_by(Post.id)).all()
        )
        assert by_user == session.scalars(select(Post.id).where(Post.user_id == 7).order_by(Post.id)).all()
        new = User(id=7005, name="new", posts=[Post(id=1)])
        session.add(new)
        assert session.scalars(select(Post.id).where(Post.user == new)).all() == [1]

    in_shards(work)
