"""What is easily merged wrongly, over shards with rows in transit against one plain database."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import (
    Date,
    DateTime,
    Engine,
    Float,
    Integer,
    Numeric,
    case,
    cast,
    column,
    create_engine,
    delete,
    exists,
    func,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, aliased

import shardkit
from shardkit.core.errors import UnmergeableQuery, UnroutableQuery
from shardkit.dev import Clusters
from shardkit.storage.urls import sqlalchemy_url
from tests import wide
from tests.fix_sharded import InSession
from tests.routed import Account, Base, Fleet, Mark, Note, rows, thirds, with_transit
from tests.sharded import ShardedCluster, User
from tests.wide import Person, Post

A, B = Account, aliased(Account)


@dataclass
class Pair:
    """A fleet of three shards, and one plain database with its rows."""

    plain: Engine
    fleet: Fleet

    def answers(self, statement: Any) -> tuple[Any, Any, list[str]]:
        """What the plain database answers, what the shards answer, and how they were asked."""

        def of(session: Session) -> Any:
            try:
                result = session.execute(statement, execution_options={"synchronize_session": False})
                if not getattr(result, "returns_rows", True):
                    return getattr(result, "rowcount", None)
                return [tuple(map(repr, row)) for row in result]
            except DBAPIError as error:
                return type(error.orig).__name__

        with self.plain.connect() as connection, Session(connection) as session:
            expected = of(session)
            session.rollback()
        with self.fleet.session() as routed:
            got = of(routed)
            return expected, got, [type(plan).__name__ for plan in routed.plans]


@pytest.fixture(scope="module")
def pairs(servers: Clusters) -> Iterator[dict[str, Pair]]:
    made = {}
    for name, metadata, content in (("narrow", Base.metadata, rows), ("wide", wide.Base.metadata, wide.rows)):
        plain = create_engine(sqlalchemy_url(servers[0].create_database(f"edges_{name}")))
        metadata.create_all(plain)
        with plain.begin() as connection:
            for table, row in content():
                connection.execute(table.insert(), row)
        urls = [server.create_database(f"edges_{name}_{number}") for number, server in enumerate(servers[:3])]
        topology = with_transit(thirds(metadata=metadata))
        made[name] = Pair(plain, Fleet.over(name, urls, topology, metadata, content()))
    yield made
    for pair in made.values():
        pair.plain.dispose()
        pair.fleet.dispose()


_first_of_name = select(B.id).ext(distinct_on(B.name)).order_by(B.name, B.id)
_chosen = select(A.id, A.n, A.name).ext(distinct_on(A.name)).order_by(A.name, A.id).subquery()
_inner_max = select(func.max(A.n)).correlate(A).scalar_subquery()
_series = func.generate_series(1, A.n, type_=Integer).label("g")

NARROW: dict[str, Any] = {
    "DISTINCT ON in a subquery, bound outside": select(_chosen.c.id, _chosen.c.n).where(_chosen.c.id == 5),
    "DISTINCT ON in a subquery": select(_chosen.c.id, _chosen.c.n),
    "DISTINCT ON in IN": select(A.id).where(A.id.in_(_first_of_name)),
    "hypothetical rank": select(func.rank(3).within_group(A.n)),
    "hypothetical rank, filtered": select(func.dense_rank(3).within_group(A.n).filter(A.id > 0)),
    "hypothetical rank of groups": select(A.n, func.rank(3).within_group(A.n)).group_by(A.n),
    "percentile": select(func.percentile_disc(0.5).within_group(A.n)),
    "aggregate of the rows around a subquery": select(_inner_max).select_from(A),
    "aggregate of the rows around EXISTS": select(
        exists(select(literal(1)).correlate(A).having(func.count(A.id) > 3))
    ).select_from(A),
    "aggregate of the rows around, in ORDER BY": select(literal(1)).select_from(A).order_by(_inner_max),
    "negative OFFSET": select(A.id).order_by(A.id).offset(-1),
    "negative OFFSET, with LIMIT": select(A.id).order_by(A.id).limit(5).offset(-1),
    "negative LIMIT": select(A.id).order_by(A.id).limit(-1).offset(5),
    "LIMIT and OFFSET beyond bigint": select(A.id).order_by(A.id).limit(2**63 - 1).offset(1),
    "GROUP BY the primary key": select(Mark.id, Mark.n, func.count()).group_by(Mark.id).order_by(Mark.id),
    "GROUP BY rows of a function": select(_series, func.count()).group_by(_series).order_by(_series),
    "ORDER BY a row value": select(A.id).order_by(tuple_(A.name, A.id)),
    "GROUP BY a row value": select(func.count()).group_by(tuple_(A.name, A.n)).order_by(func.count()),
    "infinite dates that are not selected": select(A.id).order_by(cast(literal("infinity"), Date), A.id),
    "GROUP BY functions": select(func.lower(A.name), func.sum(A.n))
    .group_by(func.lower(A.name))
    .order_by(func.lower(A.name)),
}


@pytest.mark.parametrize("name", NARROW)
def test_narrow(pairs: dict[str, Pair], name: str) -> None:
    expected, got, _ = pairs["narrow"].answers(NARROW[name])
    if isinstance(expected, list) and not NARROW[name]._order_by_clauses:
        expected, got = sorted(expected), sorted(got)
    assert got == expected


def test_writes_by_chosen_rows_are_refused(pairs: dict[str, Pair]) -> None:
    for statement in (
        delete(Mark).where(Mark.owner.in_(_first_of_name)),
        update(A).values(n=77).where(A.id.in_(_first_of_name)),
        update(A).values(n=select(func.count()).select_from(B).scalar_subquery()),
    ):
        with pytest.raises(UnroutableQuery):
            pairs["narrow"].answers(statement)
    bound = delete(Mark).where(Mark.owner.in_(_first_of_name.where(B.id == 5)), Mark.owner == 5)
    expected, got, plans = pairs["narrow"].answers(bound)
    assert (got, plans) == (expected, ["OneKeyPlan"])


def test_names_of_no_table_are_not_read(pairs: dict[str, Pair]) -> None:
    inner: Any = select(column("n")).select_from(Note).where(Note.number == 0)
    with pytest.raises(UnroutableQuery, match="names no table"):
        pairs["narrow"].answers(select(A.id, A.n).where(A.n.in_(inner)))


def test_columns_beside_a_primary_key_of_rows_that_are_read(pairs: dict[str, Pair]) -> None:
    statement = select(A.id, A.name, func.count()).join(Note, Note.n == A.n).group_by(A.id)
    with pytest.raises(UnroutableQuery, match="not grouped by"):
        pairs["narrow"].answers(statement)
    expected, got, plans = pairs["narrow"].answers(statement.group_by(A.name))
    assert (sorted(got), plans) == (sorted(expected), ["PullPlan"])


_gap = func.make_interval(0, 0, 0, Post.number, (1 - Post.number) * 24).label("gap")
_scaled = cast(func.concat("1.5", func.repeat("0", Post.number)), Numeric).label("x")
_zero = (cast(Post.number - 1, Float) * cast(0, Float)).label("f")

WIDE: dict[str, Any] = {
    "equal intervals": select(Post.owner, _gap).where(Post.number < 2).distinct().order_by(_gap, Post.owner),
    "equal intervals, cut": select(Post.owner, _gap)
    .where(Post.number < 2)
    .distinct()
    .order_by(_gap, Post.owner)
    .limit(6),
    "numbers of two scales": select(Post.owner, _scaled, Post.kind)
    .distinct()
    .order_by(Post.kind, _scaled, Post.owner),
    "two zeros": select(Post.owner, _zero, Post.kind).distinct().order_by(Post.kind, _zero, Post.owner),
    "enums": select(Person.mood, Person.id).order_by(Person.mood.desc(), Person.id),
    "greatest enum": select(func.max(Person.mood), func.min(Person.gap), func.max(Person.name)),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide(pairs: dict[str, Pair], name: str) -> None:
    expected, got, _ = pairs["wide"].answers(WIDE[name])
    # Of values that are equal but written differently any one is right.
    assert len(got) == len(expected)
    assert [row[0] for row in got] == [row[0] for row in expected]


def test_clocks_that_are_set_back(servers: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c timezone=Europe/Berlin")
    metadata = wide.Base.metadata
    urls = [servers[number].create_database(f"edges_clock_{number}") for number in range(3)]
    fleet = Fleet.over("clock", urls, thirds(metadata=metadata), metadata, wide.rows())
    hour = func.to_timestamp(1729989000 + Post.number * 3600, type_=DateTime(timezone=True)).label("t")
    shorter = func.to_timestamp(1729989000 + Post.number * 2700, type_=DateTime(timezone=True)).label("t")
    try:
        with fleet.session() as session:
            assert len(session.scalars(select(hour).distinct()).all()) == 3
            for options in ({}, {"yield_per": 2}):
                statement = select(shorter).order_by(shorter)
                found = [time.timestamp() for time in session.scalars(statement, execution_options=options)]
                assert found == sorted(found)
    finally:
        fleet.dispose()


@pytest.mark.parametrize("setting", ["datestyle=SQL,DMY", "intervalstyle=iso_8601", "extra_float_digits=0"])
def test_text_that_others_would_read_otherwise_is_refused(
    in_session: InSession, sharded: ShardedCluster, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("PGOPTIONS", f"-c {setting}")

    def work(session: shardkit.ShardSession) -> None:
        for statement in (
            select(User.id).order_by(User.name),
            select(User.name, func.count()).group_by(User.name),
            select(User.id).where(User.score == select(func.max(User.score)).scalar_subquery()),
        ):
            with pytest.raises(UnmergeableQuery, match=f"(?i){setting.partition('=')[0]}"):
                session.execute(statement)
        # What is merged here goes on.
        assert session.scalars(select(User.id).order_by(User.id)).all() == []
        assert session.scalar(select(func.count(case((User.score > 1, 1))))) == 0

    in_session(work)
