"""SQLModel: its classes are declared as others are, and its sessions are sessions over shards."""

# Without `from __future__ import annotations`: SQLModel does not see through the texts of relationships.

import pytest
import sqlmodel
from pydantic import ValidationError
from sqlalchemy import BigInteger
from sqlalchemy.orm import registry, selectinload
from sqlmodel import Field, Relationship, SQLModel, col, func, select
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelAsyncSession

import shardkit
from shardkit.core import ids
from shardkit.core.errors import CrossShardWrite, UsageError
from shardkit.core.keyrange import slot_of
from shardkit.core.ring import position
from tests.fix_sharded import InSession
from tests.sharded import ShardedCluster


class Base(SQLModel, registry=registry()):
    pass


@shardkit.sharded(by="name")
class Team(Base, table=True):
    __tablename__ = "teams"

    name: str = Field(primary_key=True, max_length=20)
    motto: str | None = None
    heroes: list["Hero"] = Relationship(back_populates="team", cascade_delete=True)


@shardkit.sharded(by="team_name")
class Hero(Base, table=True):
    __tablename__ = "heroes"

    id: int | None = Field(
        default=None,
        primary_key=True,
        sa_type=BigInteger,
        sa_column_kwargs={"default": shardkit.slot_id()},
    )
    team_name: str = Field(foreign_key="teams.name", index=True)
    name: str
    age: int | None = None
    team: Team = Relationship(back_populates="heroes")


class Session(sqlmodel.Session, shardkit.ShardSession):
    """SQLModel's session, with its `exec`, over shards."""


class AsyncSession(SQLModelAsyncSession, shardkit.ShardAsyncSession):
    """The same for asyncio."""

    sync_session_class = Session
    sync_session: Session


@pytest.fixture(scope="module", autouse=True)
def _tables(_sharded: ShardedCluster) -> None:
    with _sharded.connect() as cluster:
        cluster.create_all(Base.metadata)


@pytest.fixture(autouse=True)
def _empty(_sharded: ShardedCluster) -> None:
    for shard in _sharded.topology.shards:
        _sharded.admin(shard.name).execute("TRUNCATE public.teams, public.heroes")


@pytest.fixture
def teams(sharded: ShardedCluster) -> list[str]:
    """A team of each shard."""
    names = [f"team {number}" for number in range(100)]
    return [next(name for name in names if sharded.owner(name) == shard) for shard in ("s0", "s1", "s2")]


def test_a_day(in_session: InSession, sharded: ShardedCluster, teams: list[str]) -> None:
    """Flush, get, select, relationships: what is written is on the shard of its key."""

    def work(session: shardkit.ShardSession) -> None:
        for number, name in enumerate(teams):
            heroes = [Hero(team_name=name, name=f"h{number}", age=number), Hero(team_name=name, name="x")]
            session.add(Team(name=name, heroes=heroes))
            session.commit()
            made = [hero.id for hero in heroes]
            assert [ids.timed(made_ or 0).slot for made_ in made] == [slot_of(position(name))] * 2

        team = session.get_one(Team, teams[1])
        assert [hero.name for hero in team.heroes] == ["h1", "x"]
        hero = session.get_one(Hero, team.heroes[0].id)
        assert hero is team.heroes[0]
        assert hero.team is team
        hero.age = 7
        team.motto = "on"
        session.commit()
        session.expire_all()
        assert (hero.age, hero.team.motto) == (7, "on")

        found = session.scalars(select(Hero).where(Hero.name == "x").order_by(Hero.team_name)).all()
        assert [hero.team_name for hero in found] == sorted(teams)
        options = selectinload(Team.heroes)  # type: ignore[arg-type]  # SQLModel's types hide the attribute
        loaded = session.scalars(select(Team).order_by(Team.name).options(options)).all()
        assert [len(team.heroes) for team in loaded] == [2, 2, 2]
        session.delete(loaded[0])
        session.commit()
        assert session.scalar(select(func.count()).select_from(Hero)) == 4

    in_session(work)
    for shard, name in zip(("s0", "s1", "s2"), teams, strict=True):
        rows = sharded.query(shard, "SELECT DISTINCT team_name FROM public.heroes")
        assert rows == ([] if name == min(teams) else [(name,)])


def test_exec_of_sqlmodels_session(cluster: shardkit.ShardCluster, teams: list[str]) -> None:
    sessions = cluster.sessionmaker(class_=Session, mode="best_effort")
    with sessions() as session:
        rows = [{"name": name, "motto": name.upper()} for name in teams]
        session.exec(sqlmodel.insert(Team), params=rows)  # each row to its shard
        session.add_all(Hero(name=name, team_name=name, age=age) for age, name in enumerate(teams))
        session.commit()
        one = session.exec(select(Team).where(Team.name == teams[2])).one()
        assert one.motto == teams[2].upper()
        found = session.exec(select(Hero, Team).join(Team).order_by(col(Hero.age).desc()).limit(2)).all()
        assert [(hero.age, team.name) for hero, team in found] == [(2, teams[2]), (1, teams[1])]
        assert session.exec(select(func.sum(Hero.age))).one() == 3
        updated = session.exec(sqlmodel.update(Team).where(col(Team.name) == teams[0]).values(motto="new"))
        assert updated.rowcount == 1
        session.commit()


async def test_exec_of_sqlmodels_async_session(
    async_cluster: shardkit.ShardCluster, teams: list[str]
) -> None:
    sessions = async_cluster.async_sessionmaker(class_=AsyncSession, expire_on_commit=False)
    async with sessions() as session:
        team = Team(name=teams[0], heroes=[Hero(team_name=teams[0], name=name) for name in "ab"])
        session.add(team)
        await session.commit()
        assert (await session.exec(select(Hero.name).order_by(Hero.name))).all() == ["a", "b"]
        assert await session.get(Hero, team.heroes[0].id) is team.heroes[0]
        await session.refresh(team, ["heroes"])
        session.add(Team(name=teams[1]))
        await session.flush()
        session.add(Team(name=teams[2]))
        with pytest.raises(CrossShardWrite):
            await session.flush()


def test_other_classes_of_sessions_are_refused(cluster: shardkit.ShardCluster) -> None:
    class Half(SQLModelAsyncSession, shardkit.ShardAsyncSession):  # type: ignore[misc]
        pass  # SQLModel's sync_session_class comes first

    with pytest.raises(UsageError, match=r"no subclass of shardkit\.ShardSession"):
        cluster.sessionmaker(class_=sqlmodel.Session)  # type: ignore[type-var]
    with pytest.raises(UsageError, match=r"no subclass of shardkit\.ShardAsyncSession"):
        cluster.async_sessionmaker(class_=SQLModelAsyncSession)  # type: ignore[type-var]
    with pytest.raises(UsageError, match=r"no subclass of shardkit\.ShardSession"):
        cluster.async_sessionmaker(class_=Half)
    with pytest.raises(UsageError, match=r"no subclass of shardkit\.ShardSession"):
        cluster.async_sessionmaker(sync_session_class=sqlmodel.Session)


def test_a_declared_model_still_validates() -> None:
    assert Team.model_validate({"name": "x"}).motto is None
    with pytest.raises(ValidationError):
        Team.model_validate({"name": "x" * 21})
