"""Transactions that write several shards, all of it or nothing: who takes part, and what is known when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

import shardkit
from shardkit.core.errors import (
    CommitPending,
    CommitUnknown,
    IncompatibleServer,
    ShardUnreachable,
    TransactionGivenUp,
)
from shardkit.storage import indoubt, membership, twophase
from shardkit.storage.connections import ShardConnections
from shardkit.storage.dialect import _GuardedDialect
from shardkit.storage.guard import GuardedAsyncConnection, GuardedConnection
from shardkit.storage.indoubt import Doubt, State
from tests.both import Both, Kind, both_kinds
from tests.fix_postgres import NewCluster
from tests.sharded import Post, ShardedCluster, User, affected

ALL = ["s0", "s1", "s2"]
USERS = "SELECT id FROM public.users"
PREPARED = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
OPEN = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'shardkit' AND state <> 'idle'
"""
DECISIONS = "SELECT gid FROM shardkit.decision"

pytestmark = both_kinds


@pytest.fixture
def both(kind: Kind, cluster: shardkit.ShardCluster) -> Both:
    return Both(kind, cluster)


@pytest.fixture
def keys(sharded: ShardedCluster) -> list[int]:
    """A key of each shard."""
    return [sharded.keys(name, 1)[0] for name in ALL]


@pytest.fixture(autouse=True)
def _nothing_is_left(both: Both, sharded: ShardedCluster) -> Iterator[None]:
    yield
    assert both.in_use() == 0
    assert sharded.holding(PREPARED) == []
    assert sharded.holding(DECISIONS) == []
    assert sharded.holding(OPEN) == []


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The first words of what is sent to end transactions, each with its shard."""
    found: list[tuple[str, str]] = []

    def record(guarded: Any) -> None:
        command, commit = guarded.command, guarded.commit

        def commanded(self: Any, message: bytes) -> Any:
            found.append((self.shard_name, " ".join(message.decode().split()[:2])))
            return command(self, message)

        def committed(self: Any) -> Any:
            if self.pgconn.transaction_status != 0:
                found.append((self.shard_name, "COMMIT"))
            return commit(self)

        monkeypatch.setattr(guarded, "command", commanded)
        monkeypatch.setattr(guarded, "commit", committed)

    record(GuardedConnection)
    record(GuardedAsyncConnection)
    return found


def at(monkeypatch: pytest.MonkeyPatch, point: str, action: Callable[[], object]) -> None:
    """Let something happen when a commit passes a point for the first time."""
    passed: list[str] = []

    def pass_(name: str) -> None:
        if name == f"two_phase.{point}" and name not in passed:
            passed.append(name)
            action()

    monkeypatch.setattr(twophase, "failpoint", pass_)


def write(session: Session, keys: list[int]) -> None:
    session.add_all(User(id=key, name="x", posts=[Post(id=1, caption="x")]) for key in keys)
    session.commit()


def recover(sharded: ShardedCluster) -> list[Doubt]:
    with ShardConnections("shardkit tests") as shards:
        return indoubt.recover(sharded.topology, shards)


def kill(sharded: ShardedCluster, name: str) -> None:
    """End the application's sessions on a shard."""
    ended = sharded.query(
        name,
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'shardkit'",
    )
    assert ended
    assert set(ended) == {(True,)}


# --- all goes well ---------------------------------------------------------------------------------------------------


def test_several_shards_are_written(sharded: ShardedCluster, both: Both, keys: list[int]) -> None:
    def work(session: Session) -> None:
        write(session, keys)
        assert affected(session.execute(update(User).values(name="y"))) == 3
        session.execute(insert(Post), [{"user_id": key, "id": 2, "caption": "y"} for key in keys])
        session.commit()
        assert session.scalar(select(func.count()).select_from(User).where(User.name == "y")) == 3
        session.execute(update(User).values(name="z"))
        session.rollback()

    both.run(work, mode="two_phase")
    assert (
        sharded.holding("SELECT FROM public.users u JOIN public.posts p ON u.id = user_id AND u.name = 'y'")
        == ALL
    )


def test_readers_end_first_and_are_not_prepared(
    both: Both, keys: list[int], commands: list[tuple[str, str]]
) -> None:
    def work(session: Session) -> None:
        session.get(User, keys[0])
        write(session, keys[1:])

    both.run(work, mode="two_phase")
    assert commands == [
        ("s0", "COMMIT"),
        ("s1", "SELECT set_config('synchronous_commit',"),
        ("s2", "PREPARE TRANSACTION"),
        ("s1", "COMMIT"),
        ("s2", "COMMIT PREPARED"),
        ("s1", "BEGIN ISOLATION"),
    ]


def test_one_writer_is_committed_in_one_phase(
    sharded: ShardedCluster, both: Both, keys: list[int], commands: list[tuple[str, str]]
) -> None:
    def work(session: Session) -> None:
        session.scalars(select(User)).all()
        write(session, keys[:1])

    both.run(work, mode="two_phase")
    assert sorted(commands) == [(name, "COMMIT") for name in ALL]
    assert commands[-1] == ("s0", "COMMIT")


# --- something fails before the decision ---------------------------------------------------------------------------


def test_a_constraint_that_fails_at_prepare(sharded: ShardedCluster, both: Both, keys: list[int]) -> None:
    sharded.admin("s2").execute(
        "ALTER TABLE public.posts ALTER CONSTRAINT posts_user_id_fkey DEFERRABLE INITIALLY DEFERRED"
    )
    try:

        def work(session: Session) -> None:
            session.add_all(User(id=key, name="x") for key in keys[:2])
            session.add(Post(user_id=keys[2], id=1, caption="of nobody"))
            with pytest.raises(IntegrityError):
                session.commit()
            session.rollback()
            assert session.scalars(select(User)).all() == []

        both.run(work, mode="two_phase")
    finally:
        sharded.admin("s2").execute(
            "ALTER TABLE public.posts ALTER CONSTRAINT posts_user_id_fkey NOT DEFERRABLE"
        )
    assert sharded.holding(USERS) == []


@pytest.mark.parametrize("failed", [0, 2])
def test_a_failed_statement_that_was_swallowed(
    sharded: ShardedCluster, both: Both, keys: list[int], failed: int
) -> None:
    """On the shard that decides and on another: the server would turn PREPARE into ROLLBACK, and say so softly."""

    def work(session: Session) -> None:
        session.add_all(User(id=key, name="x") for key in keys)
        session.flush()
        with pytest.raises(IntegrityError):
            session.execute(insert(User).values(id=keys[failed], name="twice"))
        with pytest.raises(DBAPIError, match="nothing is committed"):
            session.commit()
        session.rollback()
        assert session.scalars(select(User)).all() == []

    both.run(work, mode="two_phase")
    assert sharded.holding(USERS) == []


@pytest.mark.parametrize(("lost", "point"), [("s1", "noted"), ("s2", "prepared"), ("s0", "noted")])
def test_a_shard_that_is_lost_before_the_decision(
    sharded: ShardedCluster,
    both: Both,
    keys: list[int],
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
    point: str,
) -> None:
    at(monkeypatch, point, lambda: kill(sharded, lost))

    def work(session: Session) -> None:
        with pytest.raises((ShardUnreachable, CommitUnknown)) as raised:
            write(session, keys)
        assert isinstance(raised.value, CommitUnknown) == (lost == "s0")
        session.rollback()
        assert session.get(User, keys[0]) is None

    both.run(work, mode="two_phase")
    assert [doubt.state for doubt in recover(sharded)] == ([State.GIVEN_UP] if lost == "s0" else [])
    assert sharded.holding(USERS) == []


def test_a_reader_that_was_lost(sharded: ShardedCluster, both: Both, keys: list[int]) -> None:
    def work(session: Session) -> None:
        session.get(User, keys[0])
        session.add_all(User(id=key, name="x") for key in keys[1:])
        session.flush()
        kill(sharded, "s0")
        with pytest.raises(ShardUnreachable, match="s0"):
            session.commit()

    both.run(work, mode="two_phase")
    assert sharded.holding(USERS) == []


def test_a_server_that_prepares_nothing(kind: Kind, sharded: ShardedCluster, new_cluster: NewCluster) -> None:
    del sharded
    server = new_cluster(settings={"max_prepared_transactions": 0})
    urls = [server.create_database(name) for name in ("catalog", "s0", "s1")]
    other = ShardedCluster(urls[0], urls[1:])
    try:
        with other.connect() as cluster:
            keys = [other.keys(name, 1)[0] for name in ("s0", "s1")]
            with pytest.raises(IncompatibleServer, match=r"s1.*nothing was committed") as raised:
                Both(kind, cluster).run(lambda session: write(session, keys), mode="two_phase")
            assert "max_prepared_transactions" in (raised.value.hint or "")
        assert other.holding(USERS) == []
    finally:
        other.close()


def test_a_shard_of_an_older_shardkit(sharded: ShardedCluster, both: Both, keys: list[int]) -> None:
    """It is told, and `shardkit init` brings the shards up to date."""
    admin = sharded.admin("s0")
    admin.execute("DROP TABLE shardkit.decision, shardkit.opened, shardkit.set_aside")
    admin.execute(
        "UPDATE shardkit.alembic_version SET version_num = 'shard_0001' WHERE version_num ~ '^shard_'"
    )
    try:

        def work(session: Session) -> None:
            with pytest.raises(IncompatibleServer, match=r"s0.*nothing was committed") as raised:
                write(session, keys)
            assert "shardkit init" in (raised.value.hint or "")

        both.run(work, mode="two_phase")
        assert sharded.holding(USERS) == sharded.holding(PREPARED) == []
    finally:
        membership.initialise(sharded.catalog_url)
    both.run(lambda session: write(session, keys), mode="two_phase")
    assert sharded.holding(USERS) == ALL


# --- the decision and after it ---------------------------------------------------------------------------------------


def test_the_deciding_shard_is_lost_during_commit(
    sharded: ShardedCluster, both: Both, keys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "deciding", lambda: kill(sharded, "s0"))

    def work(session: Session) -> None:
        with pytest.raises(CommitUnknown, match="s0") as raised:
            write(session, keys)
        assert "transactions recover" in (raised.value.hint or "")

    both.run(work, mode="two_phase")
    assert sharded.holding(PREPARED) == ["s1", "s2"]
    assert [doubt.state for doubt in recover(sharded)] == [State.GIVEN_UP]
    assert sharded.holding(USERS) == []


def test_a_shard_that_is_lost_after_the_decision(
    sharded: ShardedCluster, both: Both, keys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, "decided", lambda: kill(sharded, "s1"))

    def work(session: Session) -> None:
        with pytest.raises(CommitPending, match="s1") as raised:
            write(session, keys)
        assert raised.value.fields == {"committed": ["s0", "s2"], "pending": ["s1"]}
        assert not raised.value.retryable
        session.rollback()
        assert session.get(User, keys[1]) is None

    both.run(work, mode="two_phase")
    assert sharded.holding(USERS) == ["s0", "s2"]
    assert [doubt.state for doubt in recover(sharded)] == [State.COMMITTED]
    assert sharded.holding(USERS) == ALL


@pytest.mark.parametrize("point", ["preparing", "prepared", "deciding"])
def test_a_living_transaction_is_left_alone(
    sharded: ShardedCluster, both: Both, keys: list[int], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    seen: list[State] = []
    at(monkeypatch, point, lambda: seen.extend(doubt.state for doubt in recover(sharded)))
    both.run(lambda session: write(session, keys), mode="two_phase")
    assert seen == ([] if point == "preparing" else [State.LIVE])
    assert sharded.holding(USERS) == ALL


@pytest.mark.parametrize("point", ["decided", "finishing", "finished"])
def test_another_may_end_what_is_decided(
    sharded: ShardedCluster, both: Both, keys: list[int], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    seen: list[State] = []
    at(monkeypatch, point, lambda: seen.extend(doubt.state for doubt in recover(sharded)))
    both.run(lambda session: write(session, keys), mode="two_phase")
    assert seen == [State.COMMITTED]
    assert sharded.holding(USERS) == ALL


def test_whoever_was_given_up_cannot_commit(
    sharded: ShardedCluster, both: Both, keys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gid = twophase.new_gid(0)
    monkeypatch.setattr(twophase, "new_gid", lambda decider: gid)
    sharded.admin("s0").execute("INSERT INTO shardkit.decision VALUES (%s, 'abort', '{1,2}')", (gid,))

    def work(session: Session) -> None:
        with pytest.raises(TransactionGivenUp):
            write(session, keys)

    both.run(work, mode="two_phase")
    assert sharded.holding(USERS) == []
    assert recover(sharded) == []


# --- interrupted -----------------------------------------------------------------------------------------------------

UNDECIDED = ["noted", "preparing", "prepared", "deciding"]


@pytest.mark.parametrize("point", [*UNDECIDED, "decided", "finishing", "finished"])
def test_an_interruption(
    sharded: ShardedCluster, both: Both, keys: list[int], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Ctrl-C, or a task that is cancelled: as a crash, but that the process ends what it can."""
    error = KeyboardInterrupt if both.kind == "sync" else asyncio.CancelledError

    def interrupt() -> None:
        raise error

    at(monkeypatch, point, interrupt)
    with pytest.raises(error):
        both.run(lambda session: write(session, keys), mode="two_phase")
    assert sharded.holding(PREPARED) == []
    assert sharded.holding(USERS) == ([] if point in UNDECIDED else ALL)


@pytest.mark.parametrize("committed", [True, False])
def test_an_interruption_of_the_decision_itself(
    sharded: ShardedCluster, both: Both, keys: list[int], monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    """It is found out what the server made of it. One who recovers at that moment changes nothing."""
    error = KeyboardInterrupt if both.kind == "sync" else asyncio.CancelledError
    commit = _GuardedDialect._commit_writer
    seen: list[State] = []

    def interrupted(self: _GuardedDialect, raw: Any) -> None:
        if committed:
            commit(self, raw)
        else:
            self._run(raw.rollback())
            seen.extend(doubt.state for doubt in recover(sharded))
        raise error

    monkeypatch.setattr(_GuardedDialect, "_commit_writer", interrupted)
    with pytest.raises(error):
        both.run(lambda session: write(session, keys), mode="two_phase")
    assert seen == ([] if committed else [State.GIVEN_UP])
    assert sharded.holding(USERS) == (ALL if committed else [])


# --- moves -----------------------------------------------------------------------------------------------------------


def test_a_change_ends_what_was_left(
    sharded: ShardedCluster, both: Both, keys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prepared part holds the fence, so the closing would wait for it for ever."""
    at(monkeypatch, "decided", lambda: kill(sharded, "s1"))
    with pytest.raises(CommitPending):
        both.run(lambda session: write(session, keys), mode="two_phase")
    assert sharded.holding(PREPARED) == ["s1"]
    target = sharded.move_key(keys[1])
    assert target == "s2"
    assert sharded.query("s2", f"{USERS} WHERE id = %s", keys[1]) == [(keys[1],)]
    recover(sharded)


# --- savepoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["single", "two_phase", "best_effort"])
def test_savepoints(sharded: ShardedCluster, both: Both, keys: list[int], mode: str) -> None:
    written = keys[:1] if mode == "single" else keys

    def fail_nested(session: Session) -> None:
        with session.begin_nested():
            session.execute(insert(Post), [{"user_id": key, "id": 2, "caption": "undone"} for key in written])
            session.execute(insert(Post).values(user_id=written[-1], id=1, caption="twice"))

    def work(session: Session) -> None:
        session.add_all(User(id=key, name="x") for key in written)
        session.flush()
        with session.begin_nested():
            session.add_all(Post(user_id=key, id=1, caption="kept") for key in written)
        with pytest.raises(IntegrityError):
            fail_nested(session)
        with session.begin_nested() as outer:
            session.execute(update(Post).where(Post.user_id == written[0]).values(caption="undone"))
            with session.begin_nested():
                session.add_all(Post(user_id=key, id=3, caption="undone") for key in written)
            outer.rollback()
        session.add_all(Post(user_id=key, id=4, caption="kept") for key in written)
        session.commit()
        assert session.scalar(select(func.count()).select_from(Post)) == 2 * len(written)

    both.run(work, mode=mode)
    for name, key in zip(ALL, written, strict=False):
        assert sharded.query(name, "SELECT user_id, id, caption FROM public.posts ORDER BY id") == [
            (key, 1, "kept"),
            (key, 4, "kept"),
        ]
    assert both.in_use() == 0
