"""Secondary indexes of an empty target are dropped before the copy, and there again before rows are compared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from shardkit.core.errors import IndexNotBuilt, MoveWaiting, PreflightFailed, WalBudgetExceeded
from shardkit.core.move import Mode, Phase
from shardkit.core.ring import position
from shardkit.core.topology import ShardedTable
from shardkit.rebalance.audit import audit
from shardkit.rebalance.limits import Limits
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.rebalance.repair import repair
from shardkit.rebalance.waiting import Interrupted
from shardkit.storage import membership, replication, setaside
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, connect, value
from shardkit.storage.leftovers import leftovers
from tests.fix_shards import SCHEMA, TABLES, MakeShards, Shards, fill
from tests.sharded import until

ITEMS = ShardedTable("Weird Schema", "The Items", "Owner", "int")
PARTED = ShardedTable("public", "parted", "owner", "int")
BARE = ShardedTable("public", "bare", "owner", "int")
ALL_KINDS = """
CREATE SCHEMA "Weird Schema";
CREATE FUNCTION public.twice(n int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT n * 2';
CREATE TABLE "Weird Schema"."The Items" (
    "Owner" bigint NOT NULL, id int NOT NULL, n int NOT NULL DEFAULT 0, body text, at timestamptz, doc jsonb,
    PRIMARY KEY ("Owner", id), UNIQUE ("Owner", n), EXCLUDE USING btree ("Owner" WITH =, id WITH =)
);
CREATE INDEX "Plain; ""index"" %s" ON "Weird Schema"."The Items" (at DESC NULLS LAST, body COLLATE "C")
    INCLUDE (n);
COMMENT ON INDEX "Weird Schema"."Plain; ""index"" %s" IS 'it''s; a \\ "comment" %s';
CREATE INDEX of_expressions ON "Weird Schema"."The Items" (lower(body), n, (n + id))
    WITH (fillfactor = 70, deduplicate_items = off) WHERE id > 3 AND body <> 'x;''y';
ALTER INDEX "Weird Schema".of_expressions ALTER COLUMN 1 SET STATISTICS 300;
ALTER INDEX "Weird Schema".of_expressions ALTER COLUMN 3 SET STATISTICS 0;
CREATE INDEX of_documents ON "Weird Schema"."The Items" USING gin (doc jsonb_path_ops) WITH (fastupdate = off);
CREATE INDEX of_blocks ON "Weird Schema"."The Items" USING brin (at) WITH (pages_per_range = 7);
CREATE UNIQUE INDEX unique_one ON "Weird Schema"."The Items" ("Owner", n, id);
CREATE INDEX clustered_one ON "Weird Schema"."The Items" (body);
ALTER TABLE "Weird Schema"."The Items" CLUSTER ON clustered_one;
CREATE INDEX of_a_function ON "Weird Schema"."The Items" (public.twice(n));
CREATE INDEX of_an_extension ON "Weird Schema"."The Items" (n);
ALTER INDEX "Weird Schema".of_an_extension DEPENDS ON EXTENSION plpgsql;
CREATE TABLE public.parted (owner int NOT NULL, id int NOT NULL, n int, PRIMARY KEY (owner, id))
    PARTITION BY RANGE (id);
CREATE TABLE public.parted_1 PARTITION OF public.parted FOR VALUES FROM (0) TO (100);
CREATE INDEX ON public.parted (n);
CREATE INDEX ON public.parted_1 (id);
CREATE TABLE public.bare (owner int NOT NULL, n int);
CREATE INDEX ON public.bare (owner);
"""
SET_ASIDE = ['Plain; "index" %s', "of_blocks", "of_documents", "of_expressions"]
INDEXES = SCHEMA + """
CREATE INDEX posts_body ON public.posts (body) WITH (fillfactor = 60);
COMMENT ON INDEX public.posts_body IS 'of bodies';
CREATE INDEX users_name ON public.users (lower(name)) WHERE n >= 0;
"""
BOTH = ["posts_body", "users_name"]
COPIED_INTO = """
SELECT 1 FROM pg_locks l JOIN pg_stat_subscription s ON s.pid = l.pid
WHERE l.relation = 'public.posts'::regclass AND s.relid = l.relation AND l.mode = 'RowExclusiveLock' AND l.granted
"""
TOKEN = "SELECT token FROM shardkit.mover"
FACTS = """
SELECT n.nspname, x.relname, pg_get_indexdef(x.oid), t.spcname, obj_description(x.oid, 'pg_class'), i.indisvalid,
       i.indisclustered, i.indisreplident, x.reloptions,
       ARRAY(SELECT a.attstattarget FROM pg_attribute a WHERE a.attrelid = x.oid ORDER BY a.attnum)
FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_namespace n ON n.oid = x.relnamespace
LEFT JOIN pg_tablespace t ON t.oid = x.reltablespace
WHERE n.nspname IN ('public', 'Weird Schema') ORDER BY 1, 2
"""


def facts(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute(FACTS).fetchall()


def noted(connection: Connection) -> list[str]:
    return sorted(index.name for index in setaside.noted(connection))


def names(connection: Connection) -> set[str]:
    return {row[1] for row in facts(connection)}


class Watch:
    """What is set aside, and which indexes are there, on a shard in each phase of a transfer to it; a listener."""

    def __init__(self, shards: Shards, shard: str = "s2") -> None:
        self._url = shards.topology().named(shard).url
        self._shard = shard
        self.noted: dict[Phase, list[str]] = {}
        self.there: dict[Phase, set[str]] = {}
        self.told: list[str] = []

    def __call__(self, progress: Progress) -> None:
        self.told.append(progress.waiting_for or "")
        if progress.target == self._shard and progress.phase not in self.noted:
            with connect(self._url) as connection:
                self.noted[progress.phase] = noted(connection)
                self.there[progress.phase] = names(connection)


def at(phase: Phase, act: Callable[[], object]) -> Callable[[Progress], None]:
    """A listener that acts once, as a phase begins."""
    done: list[object] = []

    def listen(progress: Progress) -> None:
        if progress.phase is phase and not done:
            done.append(True)
            act()

    return listen


def indexed(make_shards: MakeShards, users: int = 200) -> Shards:
    shards = make_shards(1, schema=INDEXES)
    fill(shards.on("s1"), users)
    shards.add("s2", 1)
    return shards


# --- which -----------------------------------------------------------------------------------------------------------


def test_indexes_of_every_kind_are_as_before(make_shards: MakeShards) -> None:
    shards = make_shards(1, tables=(ITEMS, PARTED, BARE), schema=ALL_KINDS)
    one = shards.on("s1")
    one.execute(
        'INSERT INTO "Weird Schema"."The Items" SELECT g, g, g, g::text, now(), \'{"a": 1}\' '
        "FROM generate_series(1, 300) g"
    )
    one.execute("INSERT INTO public.parted SELECT g, g % 100, g FROM generate_series(1, 300) g")
    one.execute("INSERT INTO public.bare SELECT g, g FROM generate_series(1, 300) g")
    shards.add("s2", 1)
    before = facts(shards.on("s2"))
    watch = Watch(shards)
    shards.move(listener=watch)
    shards.assert_clean()
    assert watch.noted[Phase.COPYING] == SET_ASIDE
    assert {row[1] for row in before} - watch.there[Phase.COPYING] == set(SET_ASIDE)
    assert watch.noted[Phase.VERIFYING] == []
    assert facts(shards.on("s2")) == before
    assert len(shards.rows(ITEMS)["s2"]) > 50
    with Catalog.open(shards.catalog_url) as catalog:
        job = catalog.latest_job()
        assert job is not None
        (transfer,) = catalog.transfers(job.id)
    assert transfer.record["index_seconds"] > 0


def test_an_index_that_was_not_finished_is_left_as_it_is(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    two = shards.on("s2")
    two.execute("CREATE INDEX half ON public.posts (id)")
    shards.on("s1").execute("CREATE INDEX half ON public.posts (id)")
    two.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'public.half'::regclass")
    watch = Watch(shards)
    with pytest.raises(PreflightFailed, match=r"index of public\.posts is missing on the target"):
        shards.move(listener=watch)
    two.execute("UPDATE pg_index SET indisvalid = true WHERE indexrelid = 'public.half'::regclass")
    with connect(shards.topology().named("s2").url) as other:
        # Not before the preflight, which would have refused.
        with pytest.MonkeyPatch.context() as patch:
            aside = setaside.set_aside

            def invalidate(*arguments: Any) -> None:
                other.execute(
                    "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'public.half'::regclass"
                )
                aside(*arguments)
                other.execute(
                    "UPDATE pg_index SET indisvalid = true WHERE indexrelid = 'public.half'::regclass"
                )

            patch.setattr(setaside, "set_aside", invalidate)
            shards.resume(listener=watch)
    assert watch.noted[Phase.COPYING] == BOTH
    shards.assert_clean()


def test_a_tablespace_is_kept_and_one_that_has_gone_is_told(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    two = shards.on("s2")
    two.execute("SET allow_in_place_tablespaces = on")
    two.execute("CREATE TABLESPACE shardkit_tests LOCATION ''")
    try:
        two.execute("ALTER INDEX public.posts_body SET TABLESPACE shardkit_tests")
        before = facts(two)
        with pytest.raises(IndexNotBuilt, match=r"The index public\.posts_body cannot be built again") as raised:
            shards.move(listener=at(Phase.COPYING, lambda: two.execute("DROP TABLESPACE shardkit_tests")))
        assert "shardkit_tests" in str(raised.value)
        two.execute("CREATE TABLESPACE shardkit_tests LOCATION ''")
        shards.resume()
        shards.assert_clean()
        assert facts(two) == before
        assert ("posts_body", "shardkit_tests") in {(row[1], row[3]) for row in before}
    finally:
        two.execute("DROP INDEX IF EXISTS public.posts_body")
        two.execute("DROP TABLESPACE IF EXISTS shardkit_tests")


# --- where -----------------------------------------------------------------------------------------------------------


def test_a_table_that_holds_rows_keeps_its_indexes(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    topology = shards.topology()
    with Mover(shards.catalog_url) as mover:
        job = mover.start("rebalance")
        (transfer,) = mover.catalog.transfers(job.id)
    stays = next(key for key in range(1, 1000) if position(key) not in transfer.arcs)
    assert not topology.owned(1)
    shards.on("s2").execute("INSERT INTO public.users VALUES (%s, 'a stray')", (stays,))
    watch = Watch(shards)
    shards.resume(listener=watch)
    assert watch.noted[Phase.COPYING] == ["posts_body"]
    shards.on("s2").execute("DELETE FROM public.users WHERE id = %s", (stays,))
    shards.assert_clean()


def test_a_shard_that_owns_arcs_keeps_its_indexes(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    shards.move()
    shards.on("s2").execute("DELETE FROM public.posts; DELETE FROM public.users")
    before = facts(shards.on("s2"))
    watch = Watch(shards)
    with Mover(shards.catalog_url) as mover:
        mover.start("rebalance", {0: 1, 1: 3})
    shards.resume(listener=watch)
    assert watch.noted[Phase.COPYING] == []
    assert facts(shards.on("s2")) == before
    shards.assert_clean()


def test_locked_steps_leave_the_indexes(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    watch = Watch(shards)
    shards.move(Mode.LOCKED, listener=watch)
    assert watch.noted[Phase.COPYING] == []
    shards.assert_clean()


def test_a_shard_of_an_older_shardkit_keeps_its_indexes(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    two = shards.on("s2")
    two.execute("DROP TABLE shardkit.set_aside")
    two.execute("UPDATE shardkit.alembic_version SET version_num = 'shard_0003' WHERE version_num ~ '^shard_'")
    before = facts(two)
    shards.move(listener=at(Phase.COPYING, lambda: before == facts(two) or pytest.fail("they were dropped")))
    membership.initialise(shards.catalog_url)
    shards.assert_clean()


def test_a_table_that_somebody_reads_for_long_keeps_its_indexes(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    watch = Watch(shards)
    with connect(shards.topology().named("s2").url, application="long report") as reader:
        reader.execute("BEGIN; SELECT 1 FROM public.posts")
        release = at(Phase.CATCHING_UP, lambda: reader.execute("ROLLBACK"))

        def listen(progress: Progress) -> None:
            watch(progress)
            release(progress)

        shards.move(listener=listen)
    assert watch.noted[Phase.COPYING] == ["users_name"]
    assert any("long report" in told for told in watch.told)
    shards.assert_clean()


# --- what happens meanwhile ------------------------------------------------------------------------------------------


def test_the_build_waits_for_a_long_snapshot_with_reason_and_patience(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    before = facts(shards.on("s2"))
    told: list[str] = []
    with connect(shards.topology().named("s2").url, application="long snapshot") as reader:

        def hold() -> None:
            reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class")

        held = at(Phase.COPYING, hold)

        def listen(progress: Progress) -> None:
            held(progress)
            told.append(progress.waiting_for or "")

        with pytest.raises(MoveWaiting, match="long snapshot"):
            shards.move(listener=listen, patience=1.0)
        reader.execute("ROLLBACK")
    assert any("the index public.posts_body on shard s2 waits for" in each for each in told)
    assert noted(shards.on("s2")) == BOTH
    shards.resume()
    shards.assert_clean()
    assert facts(shards.on("s2")) == before


def test_an_abort_puts_them_back(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    before = facts(shards.on("s2"))
    stop = threading.Event()
    with pytest.raises(Interrupted):
        shards.move(listener=at(Phase.COPYING, stop.set), stop=stop)
    assert noted(shards.on("s2")) == BOTH
    with Mover(shards.catalog_url) as mover:
        mover.abort()
    assert facts(shards.on("s2")) == before
    shards.assert_clean()
    shards.move()
    shards.assert_clean()
    assert facts(shards.on("s2")) == before


def test_a_copy_that_begins_again_leaves_them_set_aside(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    before = facts(shards.on("s2"))
    with pytest.raises(WalBudgetExceeded):
        shards.move(limits=Limits(wal_retained=1))
    watch = Watch(shards)
    shards.resume(limits=Limits(wal_retained=1 << 40), listener=watch)
    assert watch.noted[Phase.PREPARING] == watch.noted[Phase.COPYING] == BOTH
    assert facts(shards.on("s2")) == before
    shards.assert_clean()


def test_one_that_somebody_made_again_counts_as_built(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    two = shards.on("s2")
    before = facts(two)
    same = "CREATE INDEX posts_body ON public.posts (body) WITH (fillfactor = 60)"
    shards.move(listener=at(Phase.COPYING, lambda: two.execute(same)))
    assert facts(two) == before  # with its comment
    shards.assert_clean()


def test_another_one_of_that_name_is_left_and_told(make_shards: MakeShards) -> None:
    shards = indexed(make_shards)
    two = shards.on("s2")
    before = facts(two)
    other = "CREATE INDEX posts_body ON public.posts (id)"
    with pytest.raises(PreflightFailed, match=r"index of public\.posts is missing on the target.*\(body\)"):
        shards.move(listener=at(Phase.COPYING, lambda: two.execute(other)))
    assert noted(two) == []
    with Catalog.open(shards.catalog_url) as catalog:
        event = "SELECT detail ->> 'index', detail ->> 'why' FROM shardkit.events WHERE event = 'index left'"
        assert catalog.connection.execute(event).fetchall() == [
            ("public.posts_body", "there is another one of that name")
        ]
    two.execute("DROP INDEX public.posts_body")
    two.execute("CREATE INDEX posts_body ON public.posts (body) WITH (fillfactor = 60)")
    two.execute("COMMENT ON INDEX public.posts_body IS 'of bodies'")
    shards.resume()
    assert facts(two) == before
    shards.assert_clean()


# --- two transfers to one target -------------------------------------------------------------------------------------


def three(make_shards: MakeShards) -> Shards:
    shards = make_shards(2, schema=INDEXES)
    fill(shards.on("s1"), 300)
    shards.move()
    shards.add("s3", 2)
    return shards


def test_two_transfers_to_one_target(make_shards: MakeShards) -> None:
    shards = three(make_shards)
    before = facts(shards.on("s3"))
    watch = Watch(shards, "s3")
    job = shards.move(listener=watch, parallel=2)
    assert watch.noted[Phase.COPYING] == BOTH
    assert watch.noted[Phase.VERIFYING] == []
    assert facts(shards.on("s3")) == before
    shards.assert_clean()
    with Catalog.open(shards.catalog_url) as catalog:
        assert {row.source for row in catalog.transfers(job.id)} == {0, 1}


def test_the_build_waits_for_the_copy_of_another_transfer(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = three(make_shards)
    before = facts(shards.on("s3"))
    told: list[str] = []
    waits, target = threading.Event(), shards.on("s3")
    subscribe = replication.create_subscription
    with connect(shards.topology().named("s2").url, application="holder") as holder:

        def subscribe_and_hold(target: Connection, name: str, source: str) -> None:
            subscribe(target, name, source)
            if f"dbname={holder.info.dbname} " in source:
                holder.execute("BEGIN; LOCK TABLE public.posts IN ACCESS EXCLUSIVE MODE")

        def listen(progress: Progress) -> None:
            if progress.source == "s1" and progress.phase is Phase.CATCHING_UP:
                until(lambda: waits.is_set() or value(target, COPIED_INTO), "s2 is copied")
                told.append(progress.waiting_for or "")
                if "the rows that another transfer copies" in told[-1]:
                    waits.set()

        def release() -> None:
            waits.wait(30)
            holder.execute("ROLLBACK")

        monkeypatch.setattr(replication, "create_subscription", subscribe_and_hold)
        releasing = threading.Thread(target=release)
        releasing.start()
        shards.move(listener=listen, parallel=2, patience=60.0)
        releasing.join()
    assert waits.is_set(), told
    assert facts(shards.on("s3")) == before
    shards.assert_clean()


# --- what is left where no move is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unfinished", [False, True])
def test_what_a_lost_move_set_aside_is_found_and_put_back(make_shards: MakeShards, unfinished: bool) -> None:
    shards = make_shards(2, schema=INDEXES)
    two = shards.on("s2")
    before = facts(two)
    for how in ("by hand", "by a repair"):
        for table in TABLES:
            setaside.set_aside(two, table, value(two, TOKEN))
        assert noted(two) == BOTH
        if unfinished:
            two.execute("CREATE INDEX posts_body ON public.posts (body) WITH (fillfactor = 60)")
            two.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'public.posts_body'::regclass")
        found = [problem for problem in audit(shards.catalog_url).problems if problem.check == "leftovers"]
        assert [(problem.subject, problem.repairable) for problem in found] == [("s2", True)] * 2
        assert "note of the index public.posts_body, set aside for a copy" in found[0].detail
        if how == "by hand":
            with Catalog.open(shards.catalog_url) as catalog:
                left = leftovers(two, catalog.cluster_id(), ())
            for thing in left:
                assert thing.remedy in "".join(problem.next for problem in found)
                for statement in thing.remedy.split("; "):
                    two.execute(statement.encode())
        else:
            assert len(repair(shards.catalog_url).removed) == 2
        assert facts(two) == before
        shards.assert_clean()


def test_what_is_set_aside_counts_as_there(make_shards: MakeShards) -> None:
    """To whoever compares tables: the mover that begins again, a second transfer, the doctor."""
    shards = make_shards(2, schema=INDEXES)
    two = shards.on("s2")
    token = value(two, TOKEN)
    for table in TABLES:
        setaside.set_aside(two, table, token)
    assert noted(two) == BOTH
    shards.add("s3", 2)  # its tables are compared with those of the others
    for index in setaside.noted(two):
        setaside.put_back(two, index, value(two, TOKEN))
    shards.assert_clean()
