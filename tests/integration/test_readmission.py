"""A shard whose database is an older state of itself: what readmits it, what refuses, and what sessions see."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import shardkit
from shardkit.core.errors import (
    CatalogBehind,
    IncompatibleServer,
    MoveWaiting,
    NoSuchShard,
    PreflightFailed,
    RetryLater,
    RowsGone,
    ShardBehind,
    TopologyUnsettled,
)
from shardkit.core.move import Mode, Phase
from shardkit.core.topology import ReferenceTable, ShardedTable, Topology
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.readmit import readmit
from shardkit.rebalance.repair import repair
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage import change, fence, idsplit, membership, readmission, standing
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, ShardConnections, connect, transaction
from shardkit.storage.readmission import Where
from tests.fix_backups import BackUp
from tests.fix_shards import MakeShards, Shards, fill, owner_of
from tests.sharded import until

USERS = 200
MODES = [Mode.LOGICAL, Mode.LOCKED]


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    n: Mapped[int] = mapped_column(default=0)


@pytest.fixture
def two(make_shards: MakeShards) -> Shards:
    """Two shards; the first owns everything."""
    shards = make_shards(2)
    fill(shards.on("s1"), USERS)
    return shards


def look(shards: Shards, name: str) -> readmission.Lag:
    with Catalog.open(shards.catalog_url) as catalog, ShardConnections() as connections:
        return readmission.look(catalog, connections, name)


def count(shards: Shards) -> int:
    """The users that a session sees on all shards together."""
    with (
        shardkit.connect(shards.catalog_url, settle_seconds=0.2) as cluster,
        cluster.sessionmaker()() as session,
    ):
        return session.scalars(select(func.count()).select_from(User)).one()


def name_of(shards: Shards, key: int) -> str | None:
    with (
        shardkit.connect(shards.catalog_url, settle_seconds=0.2) as cluster,
        cluster.sessionmaker()() as session,
    ):
        return session.scalar(select(User.name).where(User.id == key))


def key_on(shards: Shards, name: str) -> int:
    topology = shards.topology()
    return next(key for key in range(1, USERS + 1) if owner_of(topology, key) == name)


def at(phase: Phase, act: Callable[[], object]) -> Callable[[Progress], None]:
    """Do something once, as a phase begins."""
    done: list[bool] = []

    def listen(progress: Progress) -> None:
        if progress.phase is phase and not done:
            done.append(True)
            act()

    return listen


def problems(shards: Shards, name: str) -> list[str]:
    """What the doctor would tell to be next, of a shard's standing."""
    with Catalog.open(shards.catalog_url) as catalog:
        shard = shards.topology().named(name)
        found = standing.examine(catalog, shard, shards.on(name))
    return [each.next for each in found if each.next is not None]


# --- nothing to do --------------------------------------------------------------------------------------------------


def test_one_that_is_not_behind_is_left_alone(two: Shards, back_up: BackUp) -> None:
    two.move()
    backup = back_up(two, "s2")
    before = two.topology()
    backup.restore()
    done = readmit(two.catalog_url, "s2")
    assert not done.lag.is_behind
    assert two.topology() == before
    with pytest.raises(NoSuchShard):
        readmit(two.catalog_url, "s3")


# --- rows that came back --------------------------------------------------------------------------------------------


def test_rows_that_came_back_are_seen_by_nobody_and_removed(two: Shards, back_up: BackUp) -> None:
    backup = back_up(two, "s1")
    two.move()
    moved = {row[0] for row in two.rows(two.tables[1])["s2"]}
    changed = min(moved)
    two.on("s2").execute("UPDATE public.users SET name = 'newer' WHERE id = %s", (changed,))
    backup.restore()

    with pytest.raises(TopologyUnsettled, match="s1"):
        name_of(two, key_on(two, "s1"))
    assert name_of(two, changed) == "newer"  # others are not affected
    assert any("`shardkit shard readmit s1`" in todo for todo in problems(two, "s1"))
    with pytest.raises(ShardBehind, match="s1"), two.writer() as (catalog, connections):
        change.drain(catalog, connections)

    lag = look(two, "s1")
    assert lag.outside == {"public.users": len(moved), "public.posts": 2 * len(moved)}
    assert not lag.gained
    done = readmit(two.catalog_url, "s1")
    assert done.topology == two.topology()
    assert two.topology().by_id[0].in_transit == lag.returned
    assert count(two) == USERS
    assert name_of(two, changed) == "newer"
    assert name_of(two, key_on(two, "s1")) is not None
    assert problems(two, "s1") == []
    assert not readmit(two.catalog_url, "s1").lag.is_behind

    outcome = repair(two.catalog_url)
    assert (
        f"s1: {len(moved) - 1} rows of public.users that their owners have just the same" in outcome.removed
    )
    assert any("rows of public.users" in kept and "otherwise" in kept for kept in outcome.kept)
    assert count(two) == USERS
    two.on("s1").execute("DELETE FROM public.users WHERE NOT shardkit.owned(id)")
    repair(two.catalog_url)
    two.assert_clean()
    assert count(two) == USERS


def test_a_stale_router_is_let_in_no_more(two: Shards, back_up: BackUp) -> None:
    backup = back_up(two, "s1")
    then = two.topology().by_id[0].fence
    two.move()
    backup.restore()
    readmit(two.catalog_url, "s1")
    assert then.relation not in fence.relations(two.on("s1"))
    with pytest.raises(psycopg.errors.UndefinedTable), transaction(two.on("s1")):
        fence.guard(two.on("s1"), then)


# --- rows that are gone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_only_this_shard_had_are_not_given_up_silently(
    two: Shards, back_up: BackUp, mode: Mode
) -> None:
    backup = back_up(two, "s2")
    two.move(mode)
    left = len(two.rows(two.tables[1])["s1"])
    backup.restore()
    (gained,) = look(two, "s2").gained
    assert (gained.owner, gained.where, gained.arcs) == ("s1", Where.GONE, two.topology().owned(1))
    with pytest.raises(RowsGone, match="arcs of shard s1, which has deleted them") as refused:
        readmit(two.catalog_url, "s2")
    assert refused.value.exit_code == 3
    with pytest.raises(TopologyUnsettled):
        count(two)
    readmit(two.catalog_url, "s2", accept_loss=True)
    assert count(two) == left
    two.assert_clean()
    two.on("s2").execute("INSERT INTO public.users VALUES (%s, 'again')", (key_on(two, "s2"),))
    assert count(two) == left + 1
    with Catalog.open(two.catalog_url) as catalog:
        (missing,) = catalog.connection.execute(
            "SELECT detail ->> 'missing' FROM shardkit.events WHERE event = 'readmitted'"
        ).fetchone() or (None,)
    assert missing is not None
    assert int(missing) == len(gained.arcs)


def stop_before_purge(shards: Shards) -> None:
    """Move, and stop with the rows still on the source."""
    stop = threading.Event()
    with pytest.raises(Interrupted):
        shards.move(Mode.LOGICAL, listener=at(Phase.CUT_OVER, stop.set), stop=stop)


def test_rows_that_the_old_owner_still_has_are_not_purged_there(two: Shards, back_up: BackUp) -> None:
    backup = back_up(two, "s2")
    stop_before_purge(two)
    moved = two.topology().owned(1)
    lost = len(two.rows(two.tables[1])["s2"])
    backup.restore()

    with pytest.raises(ShardBehind, match="Nothing is deleted on shard s1"):
        two.resume()
    (gained,) = look(two, "s2").gained
    assert (gained.owner, gained.where, gained.arcs) == ("s1", Where.THERE, moved)
    assert (gained.there["public.users"], gained.here["public.users"]) == (lost, 0)
    with pytest.raises(RowsGone, match=rf"has them still: .*{lost} rows of public.users \(here 0\)"):
        readmit(two.catalog_url, "s2")

    # By hand, as somebody would who read this.
    for table in reversed(two.tables):
        name = sql.Identifier(table.schema, table.name)
        inside = sql.SQL("NOT shardkit.owned({})").format(sql.Identifier(table.key))
        rows = two.on("s1").execute(sql.SQL("SELECT * FROM {} WHERE {}").format(name, inside)).fetchall()
        for row in rows:
            places = sql.SQL(", ").join(sql.Placeholder() * len(row))
            two.on("s2").execute(sql.SQL("INSERT INTO {} VALUES ({})").format(name, places), row)
    done = readmit(two.catalog_url, "s2")
    assert [each.where for each in done.lag.gained] == [Where.HERE]
    assert count(two) == USERS
    two.resume()
    two.assert_clean()
    assert count(two) == USERS


def test_rows_that_went_and_came_again_are_newer_where_they_were(two: Shards, back_up: BackUp) -> None:
    backup = back_up(two, "s1")
    two.move(Mode.LOCKED)
    moved = two.topology().owned(1)
    key = key_on(two, "s2")
    two.on("s2").execute("UPDATE public.users SET name = 'newer' WHERE id = %s", (key,))
    stop = threading.Event()
    watch = at(Phase.CUT_OVER, stop.set)
    with Mover(two.catalog_url, patience=30.0, listener=watch, stop=stop) as mover:
        mover.start("rebalance", {0: 1, 1: 0}, Mode.LOGICAL)
        with pytest.raises(Interrupted):
            mover.run()
    assert two.topology().owned(0).issuperset(moved)
    backup.restore()
    (gained,) = look(two, "s1").gained
    assert (gained.owner, gained.where, gained.arcs) == ("s2", Where.THERE, moved)
    with pytest.raises(RowsGone, match="has them still"):
        readmit(two.catalog_url, "s1")
    two.on("s1").execute("UPDATE public.users SET name = 'newer' WHERE id = %s", (key,))
    readmit(two.catalog_url, "s1")
    two.resume()
    two.assert_clean()
    assert name_of(two, key) == "newer"


# --- a move under way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restored", ["s1", "s2"])
def test_a_copy_that_was_under_way_begins_again(two: Shards, back_up: BackUp, restored: str) -> None:
    backup = back_up(two, restored)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        two.move(Mode.LOGICAL, listener=at(Phase.CATCHING_UP, stop.set), stop=stop)
    behind = restored == "s2"  # the mark
    backup.restore()
    assert readmit(two.catalog_url, restored).lag.is_behind is behind
    phases: list[Phase] = []
    two.resume(listener=lambda progress: phases.append(progress.phase))
    assert Phase.PREPARING in phases
    two.assert_clean()
    assert count(two) == USERS


def test_a_source_that_forgot_the_decision(two: Shards, back_up: BackUp) -> None:
    backup = back_up(two, "s1")
    stop_before_purge(two)
    backup.restore()
    lag = look(two, "s1")
    assert lag.is_behind
    assert not lag.returned  # in transit there: the move takes them away
    with pytest.raises(TopologyUnsettled):
        count(two)
    readmit(two.catalog_url, "s1")
    assert count(two) == USERS
    two.resume()
    two.assert_clean()
    assert count(two) == USERS


# --- a change that is pending ---------------------------------------------------------------------------------------


def apply(catalog: Catalog, connections: ShardConnections, make: Callable[[Topology, int], Topology]) -> None:
    def checked(now: Topology | None, version: int) -> Topology:
        assert now is not None
        return make(now, version)

    change.apply(catalog, connections, checked)


def pending(shards: Shards, monkeypatch: pytest.MonkeyPatch, *, opened: bool) -> None:
    """A cutover that s1 decided and nobody recorded; s2 has opened for it or not."""

    class Lost(Exception):
        pass

    def lose(*_: Any) -> None:
        raise Lost

    arcs = shards.topology().owned(0)
    with shards.writer() as (catalog, connections):
        apply(catalog, connections, lambda now, version: now.marked(version, 1, arcs))
    with monkeypatch.context() as patch, shards.writer() as (catalog, connections):
        patch.setattr(*((Catalog, "record", lose) if opened else (fence, "open_beside", lose)))
        with pytest.raises(Lost):
            apply(catalog, connections, lambda now, version: now.cut_over(version, 0, 1, arcs))


@pytest.mark.parametrize("opened", [True, False])
def test_whether_a_closing_shard_decided_says_who_opened(
    make_shards: MakeShards, back_up: BackUp, monkeypatch: pytest.MonkeyPatch, opened: bool
) -> None:
    """The closing shard is older than the change before: it cannot know."""
    shards = make_shards(2)
    fill(shards.on("s1"), 20)
    with shards.writer() as (catalog, connections):
        arcs = shards.topology().owned(0)
        apply(catalog, connections, lambda now, version: now.marked(version, 1, arcs))
        apply(catalog, connections, lambda now, version: now.unmarked(version, 1, arcs))
    backup = back_up(shards, "s1")
    with shards.writer() as (catalog, connections):  # closes s1
        some = arcs.leading(2**60, 1)
        apply(catalog, connections, lambda now, version: now.marked(version, 1, some))
        apply(catalog, connections, lambda now, version: now.cut_over(version, 0, 1, some))
    pending(shards, monkeypatch, opened=opened)
    with Catalog.open(shards.catalog_url) as catalog:
        proposal, current = catalog.proposed(), catalog.current()
    assert proposal is not None
    backup.restore()
    done = readmit(shards.catalog_url, "s1")
    assert done.lag.now == (proposal if opened else current)
    assert shards.topology().owned(0) == done.lag.now.owned(0)
    with Catalog.open(shards.catalog_url) as catalog:
        assert catalog.proposed() is None


def test_nothing_is_decided_in_favour_of_a_shard_that_is_behind(
    make_shards: MakeShards, back_up: BackUp
) -> None:
    shards = make_shards(2)
    backup = back_up(shards, "s2")
    arcs = shards.topology().owned(0)
    with shards.writer() as (catalog, connections):
        apply(catalog, connections, lambda now, version: now.marked(version, 1, arcs))
    backup.restore()
    with shards.writer() as (catalog, connections):
        with pytest.raises(ShardBehind, match="s2"):
            apply(catalog, connections, lambda now, version: now.cut_over(version, 0, 1, arcs))
        assert catalog.proposed() is None
    assert shards.topology().owned(0) == arcs


def test_a_shard_that_is_behind_is_not_opened_beside_its_old_fence(
    make_shards: MakeShards, back_up: BackUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(2)
    backup = back_up(shards, "s2")
    then = shards.topology().by_id[1].fence
    pending(shards, monkeypatch, opened=False)
    backup.restore()
    with shards.writer() as (catalog, connections):
        change.settle(catalog, connections)
        assert catalog.proposed() is None
    assert shards.topology().owned(1)  # decided, and recorded
    assert fence.relations(shards.on("s2")) == {then.relation}
    readmit(shards.catalog_url, "s2")  # no row was there, on either side
    assert fence.relations(shards.on("s2")) == {shards.topology().by_id[1].fence.relation}


def test_a_change_that_is_pending_is_not_taken_for_a_newer_shard(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(2)
    pending(shards, monkeypatch, opened=True)
    for name in ("s1", "s2"):
        with pytest.raises(RetryLater, match="pending"):
            look(shards, name)
    assert not readmit(shards.catalog_url, "s1").lag.is_behind
    assert not look(shards, "s2").is_behind


@pytest.mark.parametrize("moment", ["proposed", "closed"])
def test_an_interrupted_readmission_is_done_again(
    two: Shards, back_up: BackUp, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    backup = back_up(two, "s1")
    two.move()
    backup.restore()

    def lose(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            *((change._Change, "close", lose) if moment == "proposed" else (Catalog, "record", lose))
        )
        if moment == "proposed":
            patch.setattr(change, "settle", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            readmit(two.catalog_url, "s1")
    with Catalog.open(two.catalog_url) as catalog:
        assert catalog.proposed() is not None
    assert readmit(two.catalog_url, "s1").lag.is_behind is (moment == "proposed")
    with Catalog.open(two.catalog_url) as catalog:
        assert catalog.proposed() is None
    assert count(two) == USERS


# --- what is refused ------------------------------------------------------------------------------------------------


def test_whoever_holds_the_fences_is_named(two: Shards, back_up: BackUp) -> None:
    backup = back_up(two, "s1")
    two.move()
    backup.restore()
    with closing(connect(two.topology().named("s1").url, application="old router")) as held:
        held.execute("BEGIN")
        (name,) = fence.relations(held)
        held.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(sql.Identifier("shardkit", name)))
        with pytest.raises(MoveWaiting, match="old router"):
            readmit(two.catalog_url, "s1", patience=0.3)
        with Catalog.open(two.catalog_url) as catalog:
            assert catalog.proposed() is None
    readmit(two.catalog_url, "s1")


def test_a_closing_that_its_server_ended_can_be_tried_again(
    two: Shards, back_up: BackUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = back_up(two, "s1")
    two.move()
    backup.restore()

    def idle(closed: Connection, *_: Any) -> None:
        there = "SELECT FROM pg_stat_activity WHERE pid = %s"
        pid = closed.info.backend_pid
        with closing(connect(two.topology().named("s1").url)) as other:
            until(lambda: not other.execute(there, (pid,)).fetchall(), "its server ends it", 20)
        closed.execute("SELECT 1")

    with monkeypatch.context() as patch:
        patch.setattr(readmission, "_while_closed", idle)
        with pytest.raises(MoveWaiting, match="s1 was closed"):
            readmit(two.catalog_url, "s1")
    with Catalog.open(two.catalog_url) as catalog:
        assert catalog.proposed() is None
    assert readmit(two.catalog_url, "s1").lag.is_behind


def test_a_shard_that_is_newer_is_refused(two: Shards) -> None:
    two.move()
    (name,) = (f for f in fence.relations(two.on("s2")) if f == two.topology().by_id[1].fence.relation)
    two.on("s2").execute(
        sql.SQL("ALTER TABLE shardkit.{} RENAME TO fence_900_00000000").format(sql.Identifier(name))
    )
    with pytest.raises(CatalogBehind, match="s2"):
        readmit(two.catalog_url, "s2")


def test_a_topology_that_the_catalog_does_not_know_is_refused(two: Shards) -> None:
    other = two.topology().declared(two.topology().version + 1, ())
    two.on("s2").execute(
        "UPDATE shardkit.topology SET version = %s, digest = %s, document = %s",
        (other.version, other.digest, Jsonb(other.to_json())),
    )
    with pytest.raises(CatalogBehind, match="does not know"):
        readmit(two.catalog_url, "s2")


def test_a_state_that_makes_no_sense_is_refused(two: Shards, back_up: BackUp) -> None:
    backup = back_up(two, "s1")
    two.move()
    backup.restore()
    two.on("s1").execute("UPDATE shardkit.ownership SET bounds = '{}'")
    with pytest.raises(ShardBehind, match="it is not known what it has"):
        readmit(two.catalog_url, "s1")
    two.on("s1").execute("DELETE FROM shardkit.topology")
    with pytest.raises(ShardBehind, match="holds no topology that names it"):
        readmit(two.catalog_url, "s1")
    two.on("s1").execute("UPDATE shardkit.shard SET shard_id = 7")
    with pytest.raises(IncompatibleServer, match="id 7"):
        readmit(two.catalog_url, "s1")
    two.on("s1").execute("DELETE FROM shardkit.shard")
    with pytest.raises(ShardBehind, match="says of no shard"):
        readmit(two.catalog_url, "s1")


def test_migrations_that_were_made_since_come_first(two: Shards, back_up: BackUp) -> None:
    backup = back_up(two, "s1")
    two.move()
    two.on("s2").execute("ALTER TABLE public.users ADD note text")
    backup.restore()
    with pytest.raises(PreflightFailed, match="note"):
        readmit(two.catalog_url, "s1")
    two.on("s1").execute("ALTER TABLE public.users ADD note text")
    readmit(two.catalog_url, "s1")
    assert count(two) == USERS


# --- what comes along -----------------------------------------------------------------------------------------------


def test_one_restored_from_a_dump_has_no_fence(two: Shards) -> None:
    two.move()
    for name in fence.relations(two.on("s2")):
        two.on("s2").execute(sql.SQL("DROP TABLE shardkit.{}").format(sql.Identifier(name)))
    with pytest.raises(TopologyUnsettled):
        count(two)
    readmit(two.catalog_url, "s2")
    assert count(two) == USERS
    two.assert_clean()


def test_reference_tables_are_as_they_are_elsewhere(two: Shards, back_up: BackUp) -> None:
    for name in ("s1", "s2"):
        two.on(name).execute("CREATE TABLE public.countries (id int PRIMARY KEY)")
        two.on(name).execute("INSERT INTO public.countries VALUES (1)")
    with two.writer() as (catalog, connections):
        membership.declare(catalog, connections, [ReferenceTable("public", "countries")])
    backup = back_up(two, "s1")
    two.move()
    for name in ("s1", "s2"):
        two.on(name).execute("INSERT INTO public.countries VALUES (2)")
    backup.restore()
    readmit(two.catalog_url, "s1")
    assert two.on("s1").execute("SELECT id FROM public.countries ORDER BY 1").fetchall() == [(1,), (2,)]


def test_ids_that_moved_are_not_given_again(make_shards: MakeShards, back_up: BackUp) -> None:
    schema = """
    CREATE TABLE public.notes (id bigserial PRIMARY KEY, owner bigint NOT NULL);
    CREATE INDEX ON public.notes (owner);
    """
    tables = (ShardedTable("public", "notes", "owner", "int"),)
    shards = make_shards(1, schema=schema, tables=tables)
    with shards.writer() as (catalog, connections):
        idsplit.split(catalog, connections, ["public.notes"])
    shards.add("s2", 1)
    backup = back_up(shards, "s1")
    shards.on("s1").execute("INSERT INTO public.notes (owner) SELECT generate_series(1, 100)")
    shards.move()
    theirs = {row[0] for row in shards.rows(tables[0])["s2"]}
    backup.restore()
    readmit(shards.catalog_url, "s1")
    shards.on("s1").execute("INSERT INTO public.notes (owner) SELECT generate_series(1, 100)")
    assert not theirs & {row[0] for row in shards.rows(tables[0])["s1"]}
