"""A shard whose primary is killed for good and whose standby takes over, at one URL that names both servers."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import shardkit
from shardkit.core.errors import (
    CommitUnknown,
    MoveWaiting,
    PreflightFailed,
    RetryLater,
    RowsGone,
    TopologyUnsettled,
)
from shardkit.core.move import Mode, Phase
from shardkit.dev import Cluster
from shardkit.dev.standby import Standby
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Listener, Progress
from shardkit.rebalance.readmit import readmit
from shardkit.rebalance.repair import repair
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage import change, standbys, standing
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import value
from shardkit.storage.readmission import Where
from tests.fix_postgres import NewCluster
from tests.fix_shards import LEFTOVERS, MakeShards, Shards, fill, owner_of
from tests.sharded import until

USERS = 200


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    n: Mapped[int] = mapped_column(default=0)


class Pair:
    """A primary and its standby, under one URL that leads to whichever takes writes."""

    def __init__(self, primary: Cluster) -> None:
        self.primary = primary
        self.standby = Standby(primary)
        self.standby.start()
        primary.create_database("app")
        # The standby first: whoever takes the first that answers is wrong.
        hosts = f"{self.standby.socket_dir},{primary.socket_dir}"
        ports = f"{self.standby.port},{primary.port}"
        who = f"postgresql://{primary.user}@/app"
        self.url = f"{who}?host={hosts}&port={ports}&target_session_attrs=read-write"
        self.standby.catch_up()

    def be_synchronous(self) -> None:
        """From now on the primary acknowledges nothing that the standby has not flushed."""
        with closing(psycopg.connect(self.primary.conninfo(), autocommit=True)) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
            until(
                lambda: value(connection, "SELECT sync_state FROM pg_stat_replication") == "sync",
                "the standby is waited for",
            )

    def fail_over(self) -> None:
        """The primary is killed for good, and the standby, started again if it was stopped, takes over."""
        self.primary.kill()
        self.standby.start()
        with closing(psycopg.connect(self.standby.conninfo(), autocommit=True)) as connection:
            assert value(connection, "SELECT pg_promote()") is True

    def close(self) -> None:
        self.standby.close()


@pytest.fixture
def pair(new_cluster: NewCluster) -> Iterator[Pair]:
    made = Pair(new_cluster())
    yield made
    made.close()


Build = Callable[[str], Shards]


@pytest.fixture
def build(make_shards: MakeShards, pair: Pair) -> Build:
    """`build("s2")`: s1 with all rows and s2 without, and the pair is the one that is named."""

    def make(followed: str) -> Shards:
        shards = make_shards(0)
        shards.add("s1", pair.url if followed == "s1" else 0)
        fill(shards.on("s1"), USERS)
        shards.add("s2", pair.url if followed == "s2" else 1)
        until(lambda: standbys.connected(shards.on(followed)), "the standby reports")
        return shards

    return make


class Clients(threading.Thread):
    """An application that counts up users, and remembers what was acknowledged."""

    def __init__(self, shards: Shards) -> None:
        super().__init__(name="clients")
        self._shards = shards
        self._ending = threading.Event()
        self.acknowledged = Counter[int]()
        self.unknown = Counter[int]()
        self.errors: list[BaseException] = []

    def run(self) -> None:
        chosen = random.Random(1)
        with shardkit.connect(self._shards.catalog_url) as cluster:
            bump = shardkit.retrying(cluster.sessionmaker())(_bump)
            while not self._ending.is_set():
                key = chosen.randint(1, USERS)
                try:
                    bump(key)
                    self.acknowledged[key] += 1
                except CommitUnknown:
                    self.unknown[key] += 1
                except (RetryLater, DBAPIError) as error:  # its server is away
                    if isinstance(error, DBAPIError) and not error.connection_invalidated:
                        self.errors.append(error)
                        return
                except BaseException as error:
                    self.errors.append(error)
                    return

    def work_on(self, shard: str) -> None:
        """Return when more keys of a shard were counted up."""
        topology = self._shards.topology()
        keys = [key for key in range(1, USERS + 1) if owner_of(topology, key) == shard]
        before = sum(self.acknowledged[key] for key in keys)
        until(
            lambda: self.errors or sum(self.acknowledged[key] for key in keys) > before + 20,
            f"clients work on {shard}",
            60.0,
        )

    def check(self) -> None:
        """Stop, and compare."""
        self._ending.set()
        self.join()
        assert not self.errors, self.errors
        rows = [row for rows in self._shards.rows(self._shards.tables[1]).values() for row in rows]
        found = {row[0]: row[2] for row in rows}
        assert len(found) == len(rows) == USERS
        for key in range(1, USERS + 1):
            least = self.acknowledged[key]
            assert least <= found[key] <= least + self.unknown[key], f"user {key}"


def _bump(session: shardkit.ShardSession, key: int) -> None:
    session.execute(update(User).where(User.id == key).values(n=User.n + 1))


def count(shards: Shards) -> int:
    """The users that a session sees on all shards together."""
    with (
        shardkit.connect(shards.catalog_url, settle_seconds=0.2) as cluster,
        cluster.sessionmaker()() as session,
    ):
        return session.scalars(select(func.count()).select_from(User)).one()


def reweigh(shards: Shards, weights: dict[int, int]) -> None:
    with Mover(shards.catalog_url, patience=30.0) as mover:
        mover.start("rebalance", weights)
        mover.run()


def at(phase: Phase, act: Callable[[], object]) -> Listener:
    """Do something once, as a phase begins."""
    done: list[bool] = []

    def listen(progress: Progress) -> None:
        if progress.phase is phase and not done:
            done.append(True)
            act()

    return listen


def next_steps(shards: Shards, name: str) -> list[str]:
    """What the doctor names of the standing of a shard."""
    with Catalog.open(shards.catalog_url) as catalog:
        found = standing.examine(catalog, shards.topology().named(name), shards.on(name))
    return [each.next for each in found if each.next is not None]


# --- a standby that has everything ----------------------------------------------------------------------------------


def test_after_a_move_nothing_is_lost_and_sessions_go_on(build: Build, pair: Pair) -> None:
    shards = build("s2")
    pair.be_synchronous()
    clients = Clients(shards)
    clients.start()
    try:
        shards.move()
        clients.work_on("s2")
        pair.fail_over()
        clients.work_on("s2")
        assert not readmit(shards.catalog_url, "s2").lag.is_behind
        assert next_steps(shards, "s2") == []
        reweigh(shards, {0: 1, 1: 3})  # and to it, and from it
        reweigh(shards, {0: 3, 1: 1})
        clients.work_on("s2")
    finally:
        clients.check()
    shards.assert_clean()


@pytest.mark.parametrize("followed", ["s1", "s2"])
@pytest.mark.parametrize(
    ("mode", "phase"),
    [
        (Mode.LOGICAL, Phase.CATCHING_UP),
        (Mode.LOGICAL, Phase.CUTTING_OVER),
        (Mode.LOGICAL, Phase.PURGING),
        (Mode.LOCKED, Phase.COPYING),
    ],
)
def test_a_move_under_way_ends_right(
    build: Build, pair: Pair, mode: Mode, phase: Phase, followed: str
) -> None:
    shards = build(followed)
    phases: list[Phase] = []

    def act() -> None:
        pair.standby.catch_up()
        pair.fail_over()
        phases.clear()

    once = at(phase, act)

    def listen(progress: Progress) -> None:
        once(progress)
        phases.append(progress.phase)

    shards.move(mode, listener=listen)
    assert (Phase.PREPARING in phases) is (mode is Mode.LOGICAL and phase is not Phase.PURGING)
    shards.assert_clean()
    assert count(shards) == USERS
    assert shards.topology().owned(1)


# --- a standby that lacks something ---------------------------------------------------------------------------------


def test_one_without_the_opening_has_every_row(
    build: Build, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = build("s2")
    follow = change._let_standbys_follow

    def without_standby(*arguments: Any) -> None:
        pair.standby.kill()  # between the decision and the opening
        follow(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(change, "_let_standbys_follow", without_standby)
        with pytest.raises(
            MoveWaiting, match=r"The deletion on shard s1 waits for standbys of shard s2: .*gone"
        ):
            shards.move(Mode.LOGICAL, patience=1.0)
    pair.fail_over()
    with pytest.raises(TopologyUnsettled, match="s2"):
        count(shards)
    assert any("`shardkit shard readmit s2`" in todo for todo in next_steps(shards, "s2"))
    assert shards.on("s2").execute(LEFTOVERS["subscriptions"]).fetchall() != []
    done = readmit(shards.catalog_url, "s2")
    assert [(each.owner, each.where) for each in done.lag.gained] == [("s1", Where.HERE)]
    assert shards.on("s2").execute(LEFTOVERS["subscriptions"]).fetchall() == []
    assert count(shards) == USERS
    shards.resume()
    shards.assert_clean()
    assert count(shards) == USERS


def test_one_from_before_rows_came(build: Build, pair: Pair) -> None:
    shards = build("s2")
    pair.standby.stop()
    shards.move()
    left = len(shards.rows(shards.tables[1])["s1"])
    pair.fail_over()
    with pytest.raises(TopologyUnsettled, match="s2"):
        count(shards)
    with pytest.raises(RowsGone, match="arcs of shard s1, which has deleted them"):
        readmit(shards.catalog_url, "s2")
    with pytest.raises(TopologyUnsettled, match="s2"):
        count(shards)
    readmit(shards.catalog_url, "s2", accept_loss=True)
    assert count(shards) == left
    shards.assert_clean()


def test_one_from_before_rows_left(build: Build, pair: Pair) -> None:
    shards = build("s1")
    pair.standby.stop()
    shards.move()
    pair.fail_over()
    with pytest.raises(TopologyUnsettled, match="s1"):
        count(shards)
    done = readmit(shards.catalog_url, "s1")
    assert done.lag.outside["public.users"] == len(shards.rows(shards.tables[1])["s2"])
    assert count(shards) == USERS
    repair(shards.catalog_url)
    shards.assert_clean()
    reweigh(shards, {0: 1, 1: 3})
    assert count(shards) == USERS
    shards.assert_clean()


def test_one_that_lacks_the_mark_of_a_move(build: Build, pair: Pair) -> None:
    """It cannot go on with what it knows nothing of; the preflight says what to do."""
    shards = build("s2")
    pair.standby.stop()
    stop = threading.Event()
    with pytest.raises(Interrupted):
        shards.move(Mode.LOGICAL, listener=at(Phase.CATCHING_UP, stop.set), stop=stop)
    pair.fail_over()
    with pytest.raises(PreflightFailed, match=r"s2: it has the fence .*`shardkit shard readmit s2`"):
        shards.resume()
    assert readmit(shards.catalog_url, "s2").lag.is_behind
    shards.resume()
    shards.assert_clean()
    assert count(shards) == USERS


def test_one_that_lacks_the_decision_is_a_source_again(build: Build, pair: Pair) -> None:
    """Whoever goes round the session is refused there too, as from the decision on."""
    shards = build("s1")
    stopped = [threading.Event(), threading.Event()]
    with pytest.raises(Interrupted):
        shards.move(Mode.LOGICAL, listener=at(Phase.CATCHING_UP, stopped[0].set), stop=stopped[0])
    pair.standby.stop()
    with pytest.raises(Interrupted):
        shards.resume(listener=at(Phase.CUT_OVER, stopped[1].set), stop=stopped[1])
    pair.fail_over()
    with pytest.raises(TopologyUnsettled, match="s1"):
        count(shards)
    assert not readmit(shards.catalog_url, "s1").lag.returned  # in transit there, until they are purged
    assert count(shards) == USERS
    moved = next(key for key in range(1, USERS + 1) if owner_of(shards.topology(), key) == "s2")
    with pytest.raises(psycopg.DatabaseError, match="has moved to shard s2") as refused:
        shards.on("s1").execute("UPDATE public.users SET n = 7 WHERE id = %s", (moved,))
    assert refused.value.sqlstate == "SK001"
    shards.resume()
    shards.assert_clean()
    assert count(shards) == USERS
