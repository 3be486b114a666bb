"""What a move waits for outside itself: it is waited for once, named, and not for ever."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from shardkit.core.errors import MoveWaiting, ReplicationFailed
from shardkit.core.move import Phase
from shardkit.core.ring import position
from shardkit.core.topology import ShardedTable
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage import replication
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, connect, value
from tests.crash.test_mover_killed import run_mover
from tests.fix_shards import MakeShards, Shards, fill
from tests.sharded import until

MAKERS = """
FROM pg_stat_activity WHERE state = 'active' AND datname = current_database()
AND starts_with(query, 'SELECT pg_create_logical_replication_slot')
"""
DISABLE = """
DO $$ DECLARE name text; BEGIN
    SELECT subname INTO STRICT name FROM pg_subscription
    WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database());
    EXECUTE format('ALTER SUBSCRIPTION %I DISABLE', name);
END $$
"""


class Resumed(threading.Thread):
    """A mover at work in a thread, and what it told."""

    def __init__(self, shards: Shards) -> None:
        super().__init__()
        self._shards = shards
        self.told: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._shards.resume(listener=self._listen)
        except BaseException as error:
            self.error = error

    def _listen(self, progress: Progress) -> None:
        self.told.append(progress.waiting_for or "")

    def waits_for(self, what: str) -> bool:
        return any(what in reason for reason in self.told)


@contextmanager
def writing(shards: Shards, application: str) -> Iterator[Connection]:
    """A session with a transaction that has written, to a table that does not move."""
    with connect(shards.topology().named("s1").url, application=application) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS public.apart (a int)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO public.apart VALUES (1)")
        yield connection


def stopped_in(shards: Shards, phase: Phase) -> str:
    """A job whose mover stopped as it entered the phase; the name of its only transfer's slot."""
    stop = threading.Event()

    def listener(progress: Progress) -> None:
        if progress.phase is phase:
            stop.set()

    with pytest.raises(Interrupted):
        shards.move(listener=listener, stop=stop)
    with Catalog.open(shards.catalog_url) as catalog:
        job = catalog.running_job()
        assert job is not None
        return f"shardkit_{catalog.cluster_id().hex[:8]}_{catalog.transfers(job.id)[0].id}"


@pytest.mark.parametrize("ends", ["cancelled", "done"])
def test_a_slot_that_a_dead_movers_server_process_still_makes_is_waited_for(
    make_shards: MakeShards, ends: str
) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    slot = stopped_in(shards, Phase.PREPARING)
    one = shards.on("s1")
    with writing(shards, "nightly batch") as writer, connect(shards.topology().named("s1").url) as orphan:
        mover = Resumed(shards)
        mover.start()
        until(lambda: value(one, f"SELECT 1 {MAKERS}"), "the mover makes its slot")
        mine = value(one, f"SELECT pid {MAKERS}")
        # A mover that is killed leaves its statement at work; another one's is cancelled here, and begun again.
        making = threading.Thread(target=_make, args=(orphan, slot))
        one.execute("SELECT pg_cancel_backend(%s)", (mine,))
        mover.join()
        assert isinstance(mover.error, psycopg.errors.QueryCanceled)
        making.start()
        until(lambda: value(one, f"SELECT 1 {MAKERS}"), "the orphan makes the slot")
        again = Resumed(shards)
        again.start()
        until(lambda: again.waits_for("the replication slot on shard s1 waits for"), "the mover waits")
        assert again.waits_for("nightly batch")
        if ends == "cancelled":
            orphan.cancel_safe()
            making.join()
        writer.execute("COMMIT")
        making.join()
        again.join()
    assert again.error is None
    shards.assert_clean()


def _make(connection: Connection, slot: str) -> None:
    try:
        replication.create_slot(connection, slot)
    except psycopg.errors.QueryCanceled:
        return


def test_the_slot_is_asked_for_once_however_long_it_waits(make_shards: MakeShards) -> None:
    """To begin anew is to wait for those as well who came meanwhile, which may never end."""
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    stopped_in(shards, Phase.PREPARING)
    mover = Resumed(shards)
    with writing(shards, "long import") as writer:
        mover.start()
        old = f"SELECT 1 {MAKERS} AND clock_timestamp() - query_start > interval '3 s'"
        until(lambda: value(shards.on("s1"), old), "the slot is waited for in one go", 10.0)
        assert mover.waits_for("long import")
        writer.execute("COMMIT")
        mover.join()
    assert mover.error is None
    shards.assert_clean()


def test_patience_ends_the_wait_for_the_slot_and_leaves_nothing(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    slot = stopped_in(shards, Phase.PREPARING)
    with writing(shards, "long import"):
        with pytest.raises(MoveWaiting, match="long import"):
            shards.resume(patience=0.5)
        assert not replication.slot_exists(shards.on("s1"), slot)
    shards.resume()
    shards.assert_clean()


def test_the_index_for_a_replica_identity_is_waited_for_with_reason_and_patience(
    make_shards: MakeShards,
) -> None:
    schema = """
    CREATE TABLE public.notes (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), owner int NOT NULL, body text);
    CREATE INDEX ON public.notes (owner);
    """
    shards = make_shards(1, tables=(ShardedTable("public", "notes", "owner", "int"),), schema=schema)
    shards.on("s1").execute("INSERT INTO public.notes (owner) SELECT g FROM generate_series(1, 100) g")
    shards.add("s2", 1)
    told: list[str] = []
    with connect(shards.topology().named("s1").url, application="idle script") as idle:
        idle.execute("BEGIN")
        idle.execute("UPDATE public.notes SET body = 'z' WHERE owner = 1")
        with pytest.raises(MoveWaiting, match="idle script"):
            shards.move(patience=0.5, listener=lambda progress: told.append(progress.waiting_for or ""))
        assert any("replica identity of public.notes" in reason for reason in told)
        idle.execute("COMMIT")
    with Mover(shards.catalog_url) as mover:
        mover.abort()
    shards.assert_clean()  # the half of an index included


def test_a_slot_that_goes_in_the_copy_ends_it_with_the_reason(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    lost: list[bool] = []
    with connect(shards.topology().named("s2").url) as holder:

        def lose(progress: Progress) -> None:
            if progress.phase is not Phase.COPYING or lost:
                return
            if holder.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
                holder.execute("BEGIN")
                holder.execute("LOCK TABLE public.users IN EXCLUSIVE MODE")  # so that the copy does not end
            elif value(holder, "SELECT 1 FROM pg_stat_subscription WHERE relid = 'public.users'::regclass"):
                lost.append(True)
                one = shards.on("s1")
                shards.on("s2").execute(DISABLE)
                slots = (
                    "SELECT slot_name FROM pg_replication_slots WHERE slot_name ~ '^shardkit' AND NOT active"
                )
                name = until(lambda: value(one, slots), "nobody uses the slot")
                one.execute("SELECT pg_drop_replication_slot(%s)", (name,))

        with pytest.raises(ReplicationFailed, match="gave up the slot"):
            shards.move(listener=lose)
        assert lost
        holder.execute("COMMIT")
    shards.resume()
    shards.assert_clean()


def test_a_copy_that_cannot_begin_says_whom_it_waits_for(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    assert run_mover(shards, "copying.slot") == -signal.SIGKILL
    # The target's workers make slots of their own, which wait for writers as well.
    with (
        writing(shards, "long import"),
        pytest.raises(MoveWaiting, match=r"The copy on shard s2.*long import"),
    ):
        shards.resume(patience=2.5)
    shards.resume()
    shards.assert_clean()


# --- what a mover before this one left at work ------------------------------------------------------------------------


@contextmanager
def token_held(shards: Shards, name: str) -> Iterator[Connection]:
    """As by a statement of a mover that was killed: it goes on until the server notices."""
    url = shards.topology().named(name).url
    with connect(url, application="shardkit mover that was killed") as connection:
        connection.execute("BEGIN")
        connection.execute("UPDATE shardkit.mover SET token = token")
        yield connection


def test_a_statement_of_a_killed_mover_is_waited_for_and_named(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    assert run_mover(shards, "purging.begin") == -signal.SIGKILL
    with token_held(shards, "s1") as old:
        with pytest.raises(MoveWaiting, match="mover that was killed"):
            shards.resume(patience=1.0)
        mover = Resumed(shards)
        mover.start()
        until(lambda: mover.waits_for("mover that was killed"), "the mover tells whom it waits for")
        old.execute("COMMIT")
        mover.join()
    assert mover.error is None
    shards.assert_clean()


def test_a_pending_change_waits_for_a_statement_of_a_killed_mover(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    assert run_mover(shards, "change.proposed:1") == -signal.SIGKILL
    with token_held(shards, "s2"), pytest.raises(MoveWaiting, match="A lock was not to be had"):
        shards.resume(patience=0.5)
    shards.resume()
    shards.assert_clean()


def test_a_lock_that_is_not_to_be_had_is_asked_for_again(make_shards: MakeShards) -> None:
    """Wherever a transfer is: it begins its phase again, and says why it does not go on."""
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    assert run_mover(shards, "copying.begin") == -signal.SIGKILL
    mover = Resumed(shards)

    def waits() -> bool:
        with Catalog.open(shards.catalog_url) as catalog:
            found = value(catalog.connection, "SELECT waiting_for FROM shardkit.transfers")
        return "lock timeout" in (found or "")

    with token_held(shards, "s1") as old:
        mover.start()
        until(waits, "the reason is stored")
        old.execute("COMMIT")
        mover.join()
    assert mover.error is None
    shards.assert_clean()


def test_a_killed_movers_statement_ends_by_itself(make_shards: MakeShards) -> None:
    """The server looks whether anybody is there to be answered."""
    shards = make_shards(2)
    url = shards.topology().named("s1").url
    with token_held(shards, "s1"), connect(url, application="gone") as waiting:
        waiting.pgconn.send_query(b"UPDATE shardkit.mover SET token = token")
        query = "SELECT wait_event_type FROM pg_stat_activity WHERE application_name = 'gone'"
        until(lambda: value(shards.on("s1"), query) == "Lock", "it waits")
        waiting.close()  # as the kernel does for a process that is killed
        until(lambda: value(shards.on("s1"), query) is None, "it is gone", 10.0)


# --- DDL on tables in use ---------------------------------------------------------------------------------------------


class Impatient(threading.Thread):
    """An application whose role gives a lock up after 30 ms."""

    def __init__(self, shards: Shards, first: int) -> None:
        super().__init__()
        self._url = shards.topology().named("s1").url
        self._key = first
        self.done = 0
        self.errors: list[str] = []
        self.ending = threading.Event()

    def run(self) -> None:
        with connect(self._url, application="impatient") as connection:
            connection.execute("SET lock_timeout = '30ms'")
            while not self.ending.is_set():
                try:
                    connection.execute("UPDATE public.users SET n = n + 1 WHERE id = %s", (self._key,))
                    self.done += 1
                except psycopg.errors.LockNotAvailable as error:
                    self.errors.append(str(error))


def test_nobody_queues_behind_ddl_that_waits_for_a_long_writer(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    others = [Impatient(shards, key) for key in (2, 3)]
    with Mover(shards.catalog_url) as planner:
        planner.start("rebalance")
    mover = Resumed(shards)
    for other in others:
        other.start()
    try:
        with connect(shards.topology().named("s1").url, application="long writer") as long:
            long.execute("BEGIN")
            long.execute("UPDATE public.users SET n = 5 WHERE id = 1")
            mover.start()
            until(lambda: mover.waits_for("the trigger on public.users"), "the mover waits")
            assert mover.waits_for("long writer")
            before = [other.done for other in others]
            until(
                lambda: all(other.done > 300 + done for other, done in zip(others, before, strict=True)),
                "work",
            )
            assert [other.errors for other in others] == [[], []]
            for other in others:
                other.ending.set()
            long.execute("COMMIT")
        mover.join()
    finally:
        for other in others:
            other.ending.set()
            other.join()
    assert mover.error is None
    shards.assert_clean()


def test_a_prepared_transaction_on_a_table_is_named(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    one = shards.on("s1")
    gids: list[str] = []

    def prepare(progress: Progress) -> None:
        if progress.phase is Phase.PURGING and not gids:
            gids.append("kept open")
            one.execute("BEGIN")
            one.execute("LOCK TABLE public.users IN ROW EXCLUSIVE MODE")
            one.execute("INSERT INTO public.posts VALUES (%s, 99, 'stays')", (key,))
            one.execute("PREPARE TRANSACTION 'kept open'")

    key = next(key for key in range(1, 100) if position(key) < 0)
    with pytest.raises(MoveWaiting, match="prepared transaction 'kept open'"):
        shards.move(patience=1.0, listener=prepare)
    one.execute("COMMIT PREPARED 'kept open'")
    shards.resume()
    shards.assert_clean()
