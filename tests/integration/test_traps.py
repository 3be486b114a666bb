"""Statements that a router gets wrong easily: each is planned rightly and answers as one database does, or raises.

Every case runs on a session and inside an async session, over shards of which two hold stale copies of rows in transit
(`tests.twins`). Elsewhere: a commit while a shard that was read has died (`test_failures`), ids that carry slots
(`test_ids`), reference tables that are written (`test_whole_session`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Integer,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    distinct,
    event,
    except_,
    except_all,
    exists,
    func,
    insert,
    intersect,
    intersect_all,
    literal,
    not_,
    null,
    or_,
    select,
    tuple_,
    union,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError
from sqlalchemy.orm import aliased, with_loader_criteria

import tests.sharded as plain_sharded
from shardkit.core.errors import IdentityConflict, KeyTypeError, ShardkitError, UnroutableQuery
from tests.fix_sharded import InSession
from tests.fix_twins import Same
from tests.sharded import ShardedCluster
from tests.twins import (
    KEYS,
    Color,
    Country,
    File,
    Made,
    Owned,
    Paint,
    Post,
    PostTag,
    Scale,
    Tag,
    Twins,
    User,
    how,
    sending,
)

users, made_table = User.metadata.tables["User"], Made.metadata.tables["made"]

_a, _b = aliased(Post), aliased(Post)
_country = select(Country.code)
_first = select(Post.user_id).order_by(Post.likes.desc().nulls_last(), Post.user_id, Post.id).limit(3)
_recursive = select(Post.user_id, Post.id).where(Post.user_id == 4, Post.id == 0).cte("walk", recursive=True)
_recursive = _recursive.union_all(
    select(Post.user_id, Post.id).where(Post.user_id == _recursive.c.user_id, Post.id == _recursive.c.id + 1)
)
_all = select(Post.user_id, Post.id).where(Post.id == 1).cte("walk_all", recursive=True)
_all = _all.union_all(
    select(Post.user_id, Post.id).where(Post.user_id == _all.c.user_id, Post.id == _all.c.id + 1)
)
_of_five = select(Post).where(Post.user_id == 4).subquery()
_most = func.max(Post.likes)

_texts = union_all(select(User.name.label("text"), User.id), select(Post.title, Post.user_id)).subquery()
_numbers = union_all(
    select(User.rank.label("n")), select(Post.likes), select(func.length(Country.code, type_=Integer))
).subquery()
_mixed = union_all(select(User.rank.label("n")), select(User.score)).subquery()
_either = union(select(User.id, User.rank), select(Post.user_id, Post.likes)).cte()
_ranks = select(User.rank)

SET_OPERATIONS: dict[str, tuple[Any, str]] = {
    "UNION ALL with a reference table": (
        union_all(select(User.country_code), select(Country.code), select(Country.code)),
        "parts",
    ),
    "UNION ALL with aggregates of a reference table": (
        union_all(
            select(User.id, User.name),
            select(func.count(), func.max(Country.name)),
            select(func.length(Country.code), Country.code).group_by(Country.code).having(func.count() > 0),
        ),
        "parts",
    ),
    "UNION ALL in an order of texts": (
        union_all(
            select(User.name.label("text"), User.id),
            select(Post.title, Post.user_id),
            select(Country.name, literal(7)),
        )
        .order_by("text", User.id.desc())
        .offset(3)
        .limit(40),
        "parts",
    ),
    "UNION ALL in an order of numbers of two types": (
        union_all(select(User.rank, User.id), select(User.score, User.id))
        .order_by(User.rank.desc().nulls_last(), "id")
        .limit(20),
        "parts",
    ),
    "UNION ALL with NULL of a type that only the server knows": (
        union_all(select(null().label("score"), User.id), select(User.score, User.id)).order_by("score", "id"),
        "parts",
    ),
    "UNION ALL of types that do not go together": (
        union_all(select(User.rank), select(User.name)),
        "parts",
    ),
    "UNION ALL with what time it is": (
        union_all(select(User.id, User.joined < func.now()), select(literal(1), func.now() == func.now())),
        "parts",
    ),
    "UNION of columns that are no keys": (union(select(User.rank), select(Post.likes)), "parts"),
    "UNION ALL of columns of one name": (
        union_all(select(User.id, Post.id).join(User.posts), select(Tag.user_id, Tag.id)),
        "parts",
    ),
    "UNION of texts": (
        union(select(User.name), select(Post.title), select(Country.name)).order_by("name").limit(9),
        "parts",
    ),
    "UNION of numbers of two types": (
        union(select(User.rank), select(User.score)).order_by(User.rank.nulls_first()),
        "parts",
    ),
    "UNION of keys": (union(select(User.id), select(Post.user_id)).order_by("id").limit(9), "parts"),
    "UNION beside UNION ALL": (
        union_all(union(select(User.id), select(Post.user_id)), select(Post.user_id)).order_by("id"),
        "parts",
    ),
    "UNION of columns that are no keys beside UNION ALL": (
        union_all(union(select(User.rank), select(Post.likes)), select(Post.likes)),
        "pulled",
    ),
    "UNION ALL inside UNION": (
        union(union_all(select(User.rank), select(Post.likes)), select(Post.likes)).order_by("rank"),
        "parts",
    ),
    "INTERSECT of keys": (intersect(select(User.id), select(Post.user_id)), "parts"),
    "INTERSECT ALL of keys": (
        intersect_all(select(Post.user_id, Post.likes % 2), select(Tag.user_id, Tag.id % 2)),
        "parts",
    ),
    "EXCEPT of keys": (except_(select(User.id), select(Post.user_id)), "parts"),
    "EXCEPT ALL of keys": (except_all(select(Tag.user_id), select(Post.user_id)), "parts"),
    "EXCEPT of keys at other places": (
        except_(select(User.id, User.rank), select(Post.likes, Post.user_id)),
        "pulled",
    ),
    "EXCEPT of columns that are no keys": (except_(select(User.rank), select(Post.likes + 2)), "pulled"),
    "INTERSECT ALL with a reference table": (
        intersect_all(select(User.country_code), select(Country.code)),
        "pulled",
    ),
    "branches of two keys": (
        union_all(select(User.id, User.name).where(User.id == 3), select(User.id, User.name).where(User.id == 4)),
        "parts",
    ),
    "branches of lists of keys, and one of no table": (
        union_all(
            select(User.id).where(User.id.in_([3, 4, 5])), select(Post.user_id).where(Post.user_id == 7), select(1)
        ),
        "parts",
    ),
    "a branch with LIMIT": (
        union_all(select(User.id), select(Post.user_id).order_by(Post.user_id, Post.id).limit(3)),
        "pulled",
    ),
    "a branch that is grouped by its key": (
        union_all(
            select(Post.user_id, func.count()).group_by(Post.user_id), select(User.id, literal(0)).distinct()
        ),
        "parts",
    ),
    "a branch that is grouped by another column": (
        union_all(select(Post.likes, func.count()).group_by(Post.likes), select(User.rank, literal(0))),
        "pulled",
    ),
    "a branch that is distinct without its key": (
        union_all(select(Post.likes).distinct(), select(User.rank)),
        "pulled",
    ),
    "a branch that counts all rows in a subquery": (
        union_all(select(User.id), select(1).where(select(func.count(Post.id)).scalar_subquery() > 3)),
        "pulled",
    ),
    "the same branch twice": (union_all(_ranks, _ranks), "parts"),
    "a set operation in FROM": (
        select(_texts.c.text, _texts.c.id).where(_texts.c.id > 3).order_by(_texts.c.text, _texts.c.id).limit(12),
        "parts",
    ),
    "DISTINCT of a set operation": (select(_numbers.c.n).distinct().order_by(_numbers.c.n), "parts"),
    "count of a set operation": (select(func.count()).select_from(_numbers), "parts"),
    "aggregates of a set operation": (
        select(func.sum(_numbers.c.n), func.avg(_numbers.c.n), func.max(_numbers.c.n), func.count(_numbers.c.n)),
        "parts",
    ),
    "aggregates of numbers of two types": (
        select(func.sum(_mixed.c.n), func.avg(_mixed.c.n), func.max(_mixed.c.n)),
        "parts",
    ),
    "groups of a set operation": (
        select(_texts.c.text, func.count(), func.max(_texts.c.id)).group_by(_texts.c.text).order_by(_texts.c.text),
        "parts",
    ),
    "a set operation of keys in a common table expression": (
        select(_either.c.id, func.count()).group_by(_either.c.id).order_by(func.count().desc(), _either.c.id),
        "parts",
    ),
    "a set operation of keys that is joined": (
        select(User.name, _either.c.rank).join(_either, _either.c.id == User.id).where(User.rank > 1),
        "parts",
    ),
    "a set operation of keys that is bound": (select(_either).where(_either.c.id == 3), "one key"),
    "a set operation that is joined by another column": (
        select(User.id, _numbers.c.n).join(_numbers, _numbers.c.n == User.rank),
        "pulled",
    ),
}  # fmt: skip

TRAPS: dict[str, tuple[Any, str]] = {
    "reference LEFT JOIN sharded": (
        select(Country.code, User.id).outerjoin(User, User.country_code == Country.code),
        "pulled",
    ),
    "reference LEFT JOIN sharded, of one key": (
        select(Country.code, User.id).outerjoin(User, and_(User.country_code == Country.code, User.id == 5)),
        "one key",
    ),
    "reference WHERE EXISTS": (
        _country.where(exists().where(User.country_code == Country.code)),
        "pulled",
    ),
    "reference WHERE NOT EXISTS": (
        _country.where(~exists().where(User.country_code == Country.code)),
        "pulled",
    ),
    "reference NOT IN": (
        _country.where(Country.code.not_in(select(User.country_code).where(User.country_code.is_not(None)))),
        "pulled",
    ),
    "NOT EXISTS on a non-key": (
        select(User.id).where(~exists().where(Post.title == User.name, Post.likes == 4)),
        "pulled",
    ),
    "NOT EXISTS on the key": (select(User.id).where(~exists().where(Post.user_id == User.id)), "parts"),
    "UNION ALL with a branch without FROM": (
        union_all(select(User.rank), select(literal(7, Integer))),
        "parts",
    ),
    "UNION ALL of one key with a branch without FROM": (
        union_all(select(User.rank).where(User.id == 4), select(literal(7, Integer))),
        "one key",
    ),
    "IN (subquery with LIMIT)": (select(User.id, User.name).where(User.id.in_(_first)), "pulled"),
    "scalar aggregate subquery": (
        select(User.id, select(_most).scalar_subquery().label("most")),
        "pulled",
    ),
    "scalar aggregate subquery of the row's key": (
        select(User.id, select(_most).where(Post.user_id == User.id).scalar_subquery().label("most")),
        "parts",
    ),
    "scalar aggregate subquery in a condition": (
        select(Post.user_id, Post.id).where(Post.likes == select(_most).scalar_subquery()),
        "pulled",
    ),
    "window without the key": (
        select(User.id, func.row_number().over(order_by=[User.score.nulls_last(), User.id])),
        "pulled",
    ),
    "window by the key": (
        select(Post.user_id, Post.id, func.rank().over(partition_by=Post.user_id, order_by=Post.id)),
        "parts",
    ),
    "window by another column": (
        select(User.id, func.sum(User.score).over(partition_by=User.rank)),
        "pulled",
    ),
    "FULL JOIN on the key": (
        select(User.id, Post.id).join(Post, Post.user_id == User.id, full=True),
        "pulled",
    ),
    "FULL JOIN with a bound key": (
        select(User.id, Post.user_id, Post.id).join(
            Post, and_(Post.user_id == User.id, User.id == 5), full=True
        ),
        "pulled",
    ),
    "recursive CTE of one key": (select(_recursive), "pulled"),
    "recursive CTE": (select(_all), "pulled"),
    "count(*)": (select(func.count()).select_from(User), "parts"),
    "count of a column, and distinct": (
        select(func.count(User.rank), func.count(distinct(User.rank))),
        "pulled",
    ),
    "DISTINCT": (select(User.rank, User.country_code).distinct(), "parts"),
    "DISTINCT with ORDER BY and LIMIT": (
        select(User.rank).distinct().order_by(User.rank.desc().nulls_first()).limit(3),
        "parts",
    ),
    "DISTINCT ON": (
        select(User.rank, User.id).ext(distinct_on(User.rank)).order_by(User.rank, User.id.desc()),
        "pulled",
    ),
    "HAVING": (
        select(User.rank, func.count()).group_by(User.rank).having(func.count() > 7).order_by(User.rank),
        "parts",
    ),
    "HAVING on what is not selected": (
        select(User.rank).group_by(User.rank).having(func.sum(User.score) > 20).order_by(User.rank),
        "parts",
    ),
    "GROUP BY the key": (select(Post.user_id, func.count()).group_by(Post.user_id), "parts"),
    "avg": (select(func.avg(User.score), func.avg(User.rank), func.avg(User.id)), "parts"),
    "avg of groups": (
        select(User.rank, func.avg(User.score)).group_by(User.rank).order_by(User.rank.nulls_last()),
        "parts",
    ),
    "arithmetic over aggregates": (
        select(func.round(func.avg(User.score), 2), func.sum(User.score) / func.count(User.score)),
        "parts",
    ),
    "aggregates of no row": (
        select(func.count(), func.sum(User.score), func.max(User.joined)).where(User.rank == 77),
        "parts",
    ),
    "two constant keys": (
        select(_a.id, _b.id).where(_a.user_id == 4, _b.user_id == 8),
        "pulled",
    ),
    "two aliases of which one is bound": (
        select(_a.id, _b.id, _b.user_id).where(_a.user_id == 4, _a.likes == _b.likes),
        "pulled",
    ),
    "two aliases bound through each other": (
        select(_a.id, _b.id).where(_a.user_id == 4, _a.user_id == _b.user_id),
        "one key",
    ),
    "a bound key inside OR": (
        select(User.id).where(or_(User.id == 3, User.rank == 2)),
        "parts",
    ),
    "the same key in each branch of OR": (
        select(User.id).where(or_(and_(User.id == 4, User.rank == 1), and_(User.id == 4, User.rank.is_(None)))),
        "one key",
    ),
    "two keys in OR": (select(User.id).where(or_(User.id == 3, User.id == 4)), "parts"),
    "NOT of a bound key": (select(User.id).where(not_(User.id == 3)), "parts"),
    "a key bound through a scalar subquery": (
        select(User.id, User.name).where(
            User.id == select(Post.user_id).where(Post.user_id == 4, Post.id == 1).scalar_subquery()
        ),
        "pulled",
    ),
    "a key bound through IN (subquery)": (
        select(User.id).where(User.id.in_(select(Post.user_id).where(Post.user_id == 4))),
        "parts",
    ),
    "a key bound in a subquery in FROM": (
        select(User.name, _of_five.c.id).join(_of_five, _of_five.c.user_id == User.id),
        "one key",
    ),
    "IN over several shards": (select(User.id, User.name).where(User.id.in_([1, 2, 3, 4, 99])), "parts"),
    "IN over several shards, all in transit or not": (
        select(User).where(User.id.in_(KEYS)).order_by(User.id),
        "parts",
    ),
    "IN of one key": (select(User.id).where(User.id.in_([3])), "one key"),
    "IN with an empty list": (select(User.id).where(User.id.in_([])), "any shard"),
    "count of IN with an empty list": (
        select(func.count()).select_from(User).where(User.id.in_([])),
        "any shard",
    ),
    "NOT IN with an empty list": (select(User.id).where(User.id.not_in([])), "parts"),
    "IN with 10,000 keys": (select(User.id).where(User.id.in_(list(range(10_000)))), "parts"),
    "IN of rows": (
        select(Post.user_id, Post.id).where(tuple_(Post.user_id, Post.id).in_([(3, 1), (7, 2), (9, 1)])),
        "parts",
    ),
    "IN with NULL": (select(User.id).where(User.id.in_([3, None])), "one key"),
    "NOT IN with NULL": (select(User.id).where(User.id.not_in([3, None])), "parts"),
    "a NULL key": (select(User.id).where(User.id == bindparam("none", None, type_=Integer)), "any shard"),
    "IS NULL of a key": (select(User.id).where(User.id.is_(None)), "parts"),
    "an outer join's missing key IS NULL": (
        select(User.id).outerjoin(Post).where(Post.user_id.is_(None)),
        "parts",
    ),
    "a key compared with digits": (select(User.id).where(User.id == "5"), "parts"),
    "a key compared with a float": (select(User.id).where(User.id == 5.7), "parts"),
    "a key compared with a Decimal": (select(User.id).where(User.id == Decimal("5.4")), "parts"),
    "a key cast to text": (select(User.id).where(cast(User.id, Text) == "5"), "parts"),
    "a cast that fails": (select(User.id).where(cast(User.id, Integer) == 5), "parts"),
    "a key compared with a boolean": (select(User.id).where(User.id == literal(True)), "parts"),
    "a key compared with digits cast by the server": (
        select(User.id).where(User.id == literal("5", BigInteger)),
        "parts",
    ),
    "an Enum as key": (select(Paint).where(Paint.color == Color.GREEN), "one key"),
    "Enums as keys": (select(Paint.color, Paint.liters).where(Paint.color.in_(list(Color))), "parts"),
    "a TypeDecorator as key": (select(Scale).where(Scale.half == 5), "one key"),
    "a TypeDecorator's keys": (select(Scale.half, Scale.weight).where(Scale.half.in_([1, 2, 7])), "parts"),
    "ORDER BY a TypeDecorator": (select(Scale.half).order_by(Scale.half.desc()), "parts"),
    "LIMIT 0": (select(User.id).order_by(User.id).limit(0), "parts"),
    "OFFSET beyond the end": (select(User.id).order_by(User.id).offset(1000).limit(5), "parts"),
    "OFFSET alone": (select(User.id).order_by(User.id).offset(len(KEYS) - 2), "parts"),
    "ORDER BY a collation": (select(User.name, User.id).order_by(User.name, User.id), "parts"),
    "ORDER BY another collation": (
        select(User.name, User.id).order_by(User.name.collate("C").desc(), User.id),
        "parts",
    ),
    "ORDER BY an expression": (
        select(User.id).order_by(func.lower(User.name), func.coalesce(User.rank, 3), User.id.desc()),
        "parts",
    ),
    "ORDER BY what is not selected": (
        select(User.name).order_by(User.joined.desc().nulls_last(), User.id).limit(9),
        "parts",
    ),
    "max and min by a collation": (select(func.max(User.name), func.min(User.name)), "parts"),
    "numeric and timestamp types": (
        select(User.score, User.joined, User.id).order_by(User.score.nulls_first(), User.id),
        "parts",
    ),
    "types of aggregates": (
        select(func.sum(User.id), func.sum(User.rank), func.max(User.joined), func.sum(User.score)),
        "parts",
    ),
    "duplicate rows in UNION ALL": (
        union_all(select(User.rank), select(User.rank), select(Post.likes)),
        "parts",
    ),
    **SET_OPERATIONS,
    "a number on each row of a page": (
        select(User.id, func.count().over()).order_by(User.id).limit(5),
        "pulled",
    ),
    "many-to-many": (
        select(Post.user_id, Post.id, Tag.label).join(Post.tags),
        "parts",
    ),
    "many-to-many of one key": (
        select(Post.id, Tag.label).join(Post.tags).where(Post.user_id == 8).order_by(Post.id, Tag.id),
        "one key",
    ),
    "many-to-many through its entity": (
        select(Post.user_id, Post.id, Tag.label).select_from(PostTag).join(PostTag.post).join(PostTag.tag),
        "parts",
    ),
    "any of many-to-many": (
        select(Post.user_id, Post.id).where(Post.tags.any(Tag.label == "y")),
        "parts",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* statement has a cartesian product")
@pytest.mark.parametrize("name", TRAPS)
def test_a_statement(same: Same, name: str) -> None:
    statement, planned = TRAPS[name]
    kinds: list[str] = []

    def work(session: Any) -> Any:
        if hasattr(session, "cluster"):
            kinds.append(how(session, statement))
        try:
            return session.execute(statement).all()
        except DBAPIError as error:
            return [type(error.orig).__name__]

    same(work, ordered=bool(getattr(statement, "_order_by_clauses", ())))
    assert set(kinds) <= {planned}


def answering(statement: Any) -> Callable[[Any], Any]:
    """The work that executes a statement."""
    return lambda session: session.execute(statement).all()


@pytest.mark.filterwarnings("ignore:.* statement has a cartesian product")
def test_the_traps_have_rows_to_fall_over(twins: Twins) -> None:
    """Stale copies are on two shards, and nearly every statement above finds rows."""
    assert 3 < len(twins.in_transit()) < len(KEYS)
    empty = []
    for name, (statement, _) in TRAPS.items():
        try:
            if not twins.plain(answering(statement)):
                empty.append(name)
        except DBAPIError:
            empty.append(f"{name} fails")
    assert sorted(empty) == [
        "IN with an empty list",
        "IS NULL of a key",
        "LIMIT 0",
        "NOT IN with NULL",
        "OFFSET beyond the end",
        "UNION ALL of types that do not go together fails",
        "a NULL key",
        "a cast that fails fails",
        "a key compared with a Decimal",
        "a key compared with a boolean fails",
        "a key compared with a float",
        "a key compared with digits fails",
    ]


# --- what binds a key ----------------------------------------------------------------------------------------------


def on_one_shard(twins: Twins) -> tuple[int, int]:
    """Two keys with posts that live on one shard today."""
    with_posts = [key for key in KEYS if KEYS.index(key) % 4 == 3]
    first, *others = with_posts
    return first, next(key for key in others if twins.owner(key) == twins.owner(first))


def test_two_keys_of_one_shard_are_two_keys(twins: Twins, in_shards: InSession, same: Same) -> None:
    one, other = on_one_shard(twins)
    a, b = aliased(Post), aliased(Post)
    statement = select(a.id, b.id).join(b, b.id >= a.id).where(a.user_id == one, b.user_id == other)
    assert same(answering(statement), ordered=False)
    assert in_shards(lambda session: how(session, statement)) == "pulled"
    far = next(key for key in KEYS if KEYS.index(key) % 4 == 3 and twins.owner(key) != twins.owner(one))
    elsewhere = select(a.id, b.id).join(b, b.id >= a.id).where(a.user_id == one, b.user_id == far)
    assert in_shards(lambda session: how(session, elsewhere)) == "pulled"


def test_a_list_asks_each_owner_for_its_own_keys(twins: Twins, in_shards: InSession) -> None:
    """One key of it is in transit to a shard that is asked for another key."""
    moving = twins.in_transit()
    wanted = [moving[0], *[key for key in KEYS if twins.owner(key) != twins.owner(moving[0])][:9]]
    statement = select(User.id, User.name).where(User.id.in_(wanted))

    def work(session: Any) -> tuple[list[Any], set[str]]:
        with sending(session) as sent:
            return sorted(session.execute(statement).all()), set(sent.shards("SELECT"))

    found, asked = in_shards(work)
    assert [row[0] for row in found] == sorted(wanted)
    assert "stale" not in {row[1] for row in found}
    assert asked == {twins.owner(key) for key in wanted}


def test_a_tenant_filter_binds_the_key(twins: Twins, in_shards: InSession, same: Same) -> None:
    """`with_loader_criteria` on everything that belongs to a user, in an option and for each statement by an event."""

    def criteria(key: int) -> Any:
        return with_loader_criteria(Owned, lambda cls: cls.user_id == key, include_aliases=True)

    statement = select(Post.title, Tag.label).join(Post.tags).order_by(Post.id, Tag.id)
    for key in (4, 8, moving_with_tags(twins)):
        of_key = statement.options(criteria(key))
        assert same(answering(of_key))
        assert in_shards(partial(how, statement=of_key)) == "one key"

    def work(session: Any) -> list[Any]:
        @event.listens_for(session, "do_orm_execute")
        def _tenant(state: Any) -> None:
            state.statement = state.statement.options(criteria(8))

        with sending(session) if hasattr(session, "cluster") else nullcontext() as sent:
            posts = session.scalars(select(Post).order_by(Post.id)).all()
            assert sent is None or sent.shards() == [twins.owner(8)]
        return [posts, session.scalars(select(File)).all()]

    assert same(work)


def moving_with_tags(twins: Twins) -> int:
    tagged = select(PostTag.__table__.c.user_id)
    return next(
        key for key in twins.in_transit() if key in twins.plain(lambda session: session.scalars(tagged).all())
    )


@pytest.mark.parametrize("value", ["5", 5.7, Decimal("5.4"), True, None, 2**63, Color.RED], ids=repr)
def test_what_is_no_key_is_not_written(in_shards: InSession, value: Any) -> None:
    def work(session: Any) -> None:
        for write in (
            lambda: session.execute(insert(User).values(id=value, name="x")),
            lambda: session.execute(insert(User), [{"id": value, "name": "x"}]),
            lambda: session.execute(insert(users).values([{"id": value, "name": "x"}])),
            lambda: (session.add(User(id=value, name="x")), session.flush()),
        ):
            with pytest.raises(KeyTypeError):
                write()
            session.rollback()
        if value is not None:  # = NULL is no mistake: it is true of no row
            with pytest.raises((ShardkitError, StatementError)):
                session.execute(update(User).where(User.id == value).values(name="x"))

    in_shards(work)


def test_keys_of_decorated_types_are_written_where_they_are_read(in_shards: InSession, same: Same) -> None:
    def work(session: Any) -> Any:
        session.add(Scale(half=77, weight=1))
        session.execute(insert(Scale), [{"half": half, "weight": 2} for half in (78, 79, 80)])
        session.execute(update(Scale).where(Scale.half == 78).values(weight=3))
        session.execute(update(Paint).where(Paint.color == Color.BLUE).values(liters=Paint.liters + 1))
        session.flush()
        session.expunge_all()
        return [
            [session.get_one(Scale, half).weight for half in (77, 78, 79, 80)],
            session.get_one(Paint, Color.BLUE).liters,
            session.scalars(select(Scale.half).where(Scale.half > 70).order_by(Scale.half)).all(),
        ]

    same(work, mode="best_effort")


def test_equal_primary_keys_on_two_shards(twins: Twins, in_shards: InSession) -> None:
    """One database refuses the second row. Shards cannot, but no answer makes one object of the two."""
    first, second = (next(key for key in KEYS if twins.owner(key) == name) for name in ("s0", "s2"))
    identity = uuid.UUID(int=7)

    def twice(session: Any) -> None:
        for key in (first, second):
            session.execute(insert(File).values(id=identity, user_id=key, name=f"of {key}"))

    with pytest.raises(IntegrityError):
        twins.plain(twice)

    def work(session: Any) -> None:
        twice(session)
        for statement in (select(File), select(File).where(File.id == identity), select(File.name, File.id)):
            with pytest.raises(IdentityConflict):
                session.execute(statement)
        with pytest.raises(IdentityConflict):
            session.get(File, identity)
        assert session.scalars(
            select(File).where(File.user_id == second, File.id == identity)
        ).one().name == (f"of {second}")

    in_shards(work, mode="best_effort")


def test_a_key_made_by_a_python_default(twins: Twins, in_shards: InSession) -> None:
    """By the ORM, and by Core where the key is not named at all."""

    def work(session: Any) -> None:
        one = Made(n=1)
        session.add(one)
        session.flush()
        session.execute(insert(Made).values(n=2))
        session.execute(insert(made_table), [{"n": 3}, {"n": 4}])
        session.execute(insert(Made), [{"n": 5}, {"n": 6}])
        made = dict(session.execute(select(Made.n, Made.id)).all())
        assert sorted(made) == [1, 2, 3, 4, 5, 6]
        assert made[1] == one.id
        for n, key in made.items():
            on_shard = session.connection(key=key).scalar(select(Made.n).where(Made.id == key))
            assert on_shard == n

    in_shards(work, mode="best_effort")


def test_a_shard_key_is_not_changed(twins: Twins, in_shards: InSession) -> None:
    def work(session: Any) -> None:
        def flushed(instance: Any, **values: Any) -> None:
            for name, value in values.items():
                setattr(instance, name, value)
            session.flush()

        made = upsert(User).values(id=4, name="x")
        writes: list[Callable[[], Any]] = [
            lambda: flushed(session.get_one(User, 4), id=77),
            lambda: flushed(session.get_one(Post, (4, 0)), user_id=8),
            lambda: flushed(session.get_one(Post, (4, 0)), user=session.get_one(User, 8)),
            lambda: session.execute(update(User).where(User.id == 4).values(id=77)),
            lambda: session.execute(update(User).values(id=User.id + 1)),
            lambda: session.execute(update(users).where(User.id == bindparam("old")), [{"old": 4, "id": 77}]),
            lambda: session.execute(made.on_conflict_do_update(index_elements=["id"], set_={"id": 77})),
        ]
        for write in writes:
            with pytest.raises(UnroutableQuery) as error:
                write()
            assert error.value.fields["reason"] == "changed-key"
            session.rollback()

    in_shards(work)


# --- rows of several shards ----------------------------------------------------------------------------------------


def test_pages(same: Same) -> None:
    """Page after page is the whole, once."""
    statement = select(User.rank, User.id).order_by(User.rank.desc(), User.name, User.id)

    def work(session: Any) -> list[Any]:
        return [session.execute(statement.limit(7).offset(at)).all() for at in range(0, len(KEYS) + 7, 7)]

    pages = same(work)
    assert [row for page in pages for row in page] == same(answering(statement))


def test_first_scalar_and_one(same: Same) -> None:
    def work(session: Any) -> list[Any]:
        ordered = select(User).order_by(User.score.desc().nulls_last(), User.id)
        return [
            session.scalars(ordered).first(),
            session.execute(ordered.with_only_columns(User.name)).first(),
            session.scalars(ordered.where(User.rank == 77)).first(),
            session.scalar(select(func.count()).select_from(Post)),
            session.scalar(select(func.count()).select_from(Post).where(Post.user_id == 8)),
            session.scalars(ordered.limit(1)).one(),
            session.execute(select(func.max(User.score), func.min(User.joined))).one(),
            session.scalar(select(exists().where(Post.likes == 3))),
        ]

    same(work)


def test_now_is_one_instant(in_shards: InSession) -> None:
    """On rows of all shards, grouped by and compared with."""

    def work(session: Any) -> None:
        before = datetime.now(UTC)
        instants = set(session.scalars(select(func.now()).select_from(User)))
        assert len(instants) == 1
        assert before - timedelta(minutes=1) < instants.pop() < datetime.now(UTC) + timedelta(minutes=1)
        ((_, count),) = session.execute(
            select(func.now(), func.count()).select_from(User).group_by(func.now())
        ).all()
        assert count == len(KEYS)
        assert session.scalar(select(func.count()).where(User.joined < func.now())) == len(
            [place for place in range(len(KEYS)) if place % 7 != 6]
        )

    in_shards(work)


def test_a_writing_statement_inside_another_is_refused(in_shards: InSession) -> None:
    """Bound to a key or not: nothing is written."""

    def work(session: Any) -> None:
        for condition in (User.id == 4, User.rank == 1):
            changed = update(User).where(condition).values(name="changed").returning(User.id).cte()
            removed = delete(Post).where(Post.user_id == 4).returning(Post.id).cte()
            for statement in (select(changed), select(removed), select(User.id).add_cte(removed)):
                with pytest.raises(UnroutableQuery, match="inside another"):
                    session.execute(statement)
        assert session.scalar(select(func.count()).where(User.name == "changed")) == 0

    in_shards(work)


# --- before and after a move ---------------------------------------------------------------------------------------


def test_two_objects_of_one_key_before_and_after_a_move(
    sharded: ShardedCluster, in_session: InSession
) -> None:
    """They are one object: in the identity map, by a refresh, by a second load; and it is written to the new owner."""
    key = sharded.keys("s0", 1)[0]

    def work(session: Any) -> None:
        user = plain_sharded.User(id=key, name="before", posts=[plain_sharded.Post(id=1, caption="p")])
        session.add(user)
        session.commit()
        before = (user, user.posts[0])
        session.commit()
        target = sharded.move_key(key)
        found = session.scalars(select(plain_sharded.Post).where(plain_sharded.Post.user_id == key)).one()
        assert (found.user, found) == before
        assert session.get(plain_sharded.User, key) is user
        assert len(session.scalars(select(plain_sharded.User)).all()) == 1
        user.name = "after"
        session.commit()
        assert sharded.query(target, "SELECT name FROM public.users WHERE id = %s", key) == [("after",)]

    in_session(work)
