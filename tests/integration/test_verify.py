"""The audit finds what stands wrong and names it; the repair removes what is nobody's, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from psycopg import sql

from shardkit.core.errors import LeaseHeld
from shardkit.core.keyrange import POSITION_MAX, Arc, ArcSet
from shardkit.core.move import Phase
from shardkit.core.placement import plan
from shardkit.core.ring import position
from shardkit.core.topology import HomeTable, ReferenceTable, ShardedTable, Topology
from shardkit.rebalance import ownership
from shardkit.rebalance.audit import audit
from shardkit.rebalance.findings import Report
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.repair import repair
from shardkit.storage import change, membership, predicate
from shardkit.storage.connections import connect
from tests.fix_shards import MakeShards, Shards, fill, owner_of
from tests.sharded import until

USERS = 300


@pytest.fixture
def two(make_shards: MakeShards) -> Shards:
    """Two shards that share the rows; the second has its half without a move, as there were none."""
    shards = make_shards(2)
    half = ArcSet([Arc(0, POSITION_MAX)])
    with shards.writer() as (catalog, connections):
        steps: list[Callable[[Any, int], Topology]] = [
            lambda now, version: now.marked(version, 1, half),
            lambda now, version: now.cut_over(version, 0, 1, half),
            lambda now, version: now.unmarked(version, 0, half),
        ]
        for step in steps:
            change.apply(catalog, connections, step)
    topology = shards.topology()
    for shard in topology.shards:
        connection = shards.on(shard.name)
        fill(connection, USERS)
        for table in shards.tables:
            strange = predicate.within(table, ~topology.owned(shard.id))
            connection.execute(sql.SQL("DELETE FROM {} WHERE {}").format(predicate.relation(table), strange))
    return shards


def wrong(report: Report) -> list[tuple[str, str, str | None]]:
    """Where and what; everything wrong has a next step."""
    assert all(problem.next for problem in report.problems)
    return [(problem.subject, problem.check, problem.table) for problem in report.problems]


def keys(shards: Shards, name: str, number: int, *, there: bool = True) -> list[int]:
    """Some users that a shard owns, or, not ``there``, ids of users that do not exist."""
    topology = shards.topology()
    ids = range(1, USERS + 1) if there else range(USERS + 1, 100 * USERS)
    return [key for key in ids if owner_of(topology, key) == name][:number]


def copy_row(shards: Shards, key: int, source: str, target: str) -> None:
    """Put a user where it does not belong, round everything."""
    (row,) = shards.on(source).execute("SELECT * FROM public.users WHERE id = %s", (key,)).fetchall()
    shards.on(target).execute("INSERT INTO public.users VALUES (%s, %s, %s)", row)


def test_what_a_clean_cluster_certifies(two: Shards) -> None:
    report = audit(two.catalog_url)
    document = report.as_dict()
    certificate = document["certificate"]
    assert (document["result"], certificate["kind"], certificate["format"]) == ("right", "verify", 1)
    assert certificate["rows_checked"] == 3 * USERS
    assert certificate["rows"] == {"public.users": USERS, "public.posts": 2 * USERS}
    topology = two.topology()
    assert certificate["topology"]["last"] == {"version": topology.version, "digest": topology.digest}
    assert certificate["started_at"] < certificate["finished_at"]
    assert [shard["name"] for shard in document["shards"]] == ["s1", "s2"]
    assert all(each["rows"] for shard in document["shards"] for each in shard["tables"])


def test_rows_on_a_wrong_shard_are_named_with_what_their_owner_has(two: Shards) -> None:
    same, differs = keys(two, "s1", 2)
    only = keys(two, "s1", 1, there=False)[0]
    copy_row(two, same, "s1", "s2")
    copy_row(two, differs, "s1", "s2")
    two.on("s2").execute("UPDATE public.users SET n = n + 1 WHERE id = %s", (differs,))
    two.on("s2").execute("INSERT INTO public.users VALUES (%s, 'written here')", (only,))
    report = audit(two.catalog_url)
    assert wrong(report) == [("s2", "ownership", "public.users")]
    (problem,) = report.problems
    assert problem.rows == 3
    found = {key["row"]["id"]: (key["owner"], key["state"]) for key in problem.keys}
    assert found == {same: ("s1", "same"), differs: ("s1", "differs"), only: ("s1", "only here")}
    assert "may be the only copy" in problem.next
    assert report.as_dict()["result"] == "wrong"


def test_a_repair_removes_what_the_owner_has_just_the_same_and_nothing_else(two: Shards) -> None:
    same, differs = keys(two, "s1", 200)[::150]
    only = keys(two, "s1", 1, there=False)[0]
    for key in keys(two, "s1", 200):
        copy_row(two, key, "s1", "s2")
    two.on("s2").execute("UPDATE public.users SET n = n + 1 WHERE id = %s", (differs,))
    two.on("s2").execute("INSERT INTO public.users VALUES (%s, 'written here')", (only,))
    before = dict(two.rows(two.tables[1]))
    outcome = repair(two.catalog_url)
    after = two.rows(two.tables[1])
    assert after["s1"] == before["s1"]
    assert {row[0] for row in before["s2"]} - {row[0] for row in after["s2"]} == {*keys(two, "s1", 200)} - {
        differs
    }
    assert same not in {row[0] for row in after["s2"]}
    assert len(outcome.removed) == 1
    assert outcome.kept == ["s2: 2 rows of public.users, which their owners have not, or otherwise"]
    (problem,) = audit(two.catalog_url).problems
    assert not problem.repairable
    assert problem.rows == 2
    with connect(two.catalog_url) as catalog:
        events = catalog.execute("SELECT detail FROM shardkit.events WHERE event = 'repaired'").fetchall()
    assert [detail["shard"] for (detail,) in events] == ["s2"]


def test_a_repair_fires_no_trigger_and_no_cascade(two: Shards) -> None:
    key = keys(two, "s1", 1)[0]
    copy_row(two, key, "s1", "s2")
    two.on("s2").execute("INSERT INTO public.posts VALUES (%s, 77, 'only here')", (key,))
    two.on("s2").execute(
        "ALTER TABLE public.posts DROP CONSTRAINT posts_user_id_fkey,"
        "ADD FOREIGN KEY (user_id) REFERENCES public.users (id) ON DELETE CASCADE"
    )
    repair(two.catalog_url)
    assert two.on("s2").execute("SELECT FROM public.users WHERE id = %s", (key,)).fetchall() == []
    left = two.on("s2").execute("SELECT id FROM public.posts WHERE user_id = %s", (key,)).fetchall()
    assert left == [(77,)]


MARKS = ShardedTable("public", "Marks", "the owner", "text")
MARKS_SCHEMA = """
CREATE TABLE public."Marks" ("the owner" text NOT NULL, "50%" text) PARTITION BY LIST ("50%");
CREATE TABLE public."Marks a" PARTITION OF public."Marks" FOR VALUES IN ('a');
CREATE TABLE public."Marks b" PARTITION OF public."Marks" DEFAULT;
CREATE INDEX ON public."Marks" ("the owner");
"""


def test_rows_without_an_identity_of_their_own_go_all_or_none(make_shards: MakeShards) -> None:
    """Text keys, quoted names, partitions; and rows that only their key tells apart."""
    shards = make_shards(1, tables=(MARKS,), schema=MARKS_SCHEMA)
    shards.add("s2", 1)
    names = [f'\N{GRINNING FACE} "{number}" %s' for number in range(60)]
    # All keys are the first shard's: the second owns nothing yet.
    insert = 'INSERT INTO public."Marks" VALUES (%s, %s)'
    with shards.on("s1").cursor() as cursor:
        cursor.executemany(insert, [(name, part) for name in names for part in ("a", "a", "b")])
    with shards.on("s2").cursor() as cursor:
        cursor.executemany(insert, [(names[0], part) for part in ("a", "a", "b")])
        cursor.executemany(insert, [(names[1], part) for part in ("a", "b")])
    (problem,) = audit(shards.catalog_url).problems
    assert (problem.subject, problem.rows) == ("s2", 5)
    found = {key["row"]["the owner"]: key["state"] for key in problem.keys}
    assert found == {names[0]: "same", names[1]: "differs"}
    repair(shards.catalog_url)
    assert shards.on("s2").execute('SELECT DISTINCT "the owner" FROM public."Marks"').fetchall() == [
        (names[1],)
    ]
    assert shards.on("s1").execute('SELECT count(*) FROM public."Marks"').fetchone() == (180,)


def test_rows_without_a_key(two: Shards) -> None:
    two.on("s2").execute("ALTER TABLE public.posts DROP CONSTRAINT posts_pkey, ALTER user_id DROP NOT NULL")
    two.on("s2").execute("INSERT INTO public.posts VALUES (NULL, 5, 'x')")
    (problem,) = audit(two.catalog_url).problems
    assert problem.rows == 1
    assert "no shard key" in problem.detail
    assert [key["row"]["user_id"] for key in problem.keys] == [None]


def test_many_strays_are_all_counted_and_some_named(two: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_FIRST_PIECE", 1)
    monkeypatch.setattr(ownership, "SECONDS_A_PIECE", 0.0)
    for key in keys(two, "s1", 130):
        copy_row(two, key, "s1", "s2")
    (problem,) = audit(two.catalog_url).problems
    assert (problem.rows, len(problem.keys)) == (130, ownership.NAMED)
    repair(two.catalog_url)
    assert wrong(audit(two.catalog_url)) == []


# --- shards and catalog ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE shardkit.shard SET name = 'other'", [("s2", "identity")]),
        ("UPDATE shardkit.topology SET digest = 'f00'", [("s2", "copy")]),
        ("UPDATE shardkit.ownership SET bounds = '{0,7}'", [("s2", "copy")]),
        (
            "UPDATE shardkit.topology SET document = jsonb_set(document, '{shards,0,weight}', '1')",
            [("s2", "copy")],
        ),
        ("CREATE TABLE shardkit.fence_1_00000000 ()", [("s2", "fence")]),
        (
            "CREATE TABLE shardkit.fence_999999_00000000 ()",
            [("s2", "fence"), ("s2", "ownership"), ("s2", "copy")],
        ),
    ],
)
def test_what_a_shard_says_of_itself(two: Shards, statement: str, found: list[tuple[str, str]]) -> None:
    two.on("s2").execute(statement)
    report = audit(two.catalog_url)
    assert sorted({(problem.subject, problem.check) for problem in report.problems}) == sorted(found)


def test_a_catalog_that_was_edited(two: Shards) -> None:
    with connect(two.catalog_url) as catalog:
        catalog.execute(
            "UPDATE shardkit.topologies SET document = jsonb_set(document, '{shards,0,weight}', '1') "
            "WHERE state = 'current'"
        )
    assert ("catalog", "copy", None) in wrong(audit(two.catalog_url))


def test_a_pending_change_explains_itself(two: Shards) -> None:
    class Killed(Exception):
        pass

    def die(moment: str) -> None:
        if moment == "decided":
            raise Killed

    arcs = ArcSet([Arc(position(keys(two, "s1", 1)[0]), position(keys(two, "s1", 1)[0]))])
    with two.writer() as (catalog, shards), pytest.raises(Killed):
        change.apply(catalog, shards, lambda now, version: now.marked(version, 1, arcs), clock=die)  # type: ignore[union-attr]
    report = audit(two.catalog_url)
    assert wrong(report) == []
    assert ["was interrupted" in move["sentence"] for move in report.moves] == [True]
    repair(two.catalog_url)  # settles it, and takes the mark of no transfer away again
    assert not any(shard.in_transit for shard in two.topology().shards)
    two.assert_clean()


def test_marks_of_no_transfer_go_with_the_last_row(two: Shards) -> None:
    key, other = keys(two, "s1", 2)
    arcs = ArcSet([Arc(position(each), position(each)) for each in (key, other)])
    with two.writer() as (catalog, shards):
        change.apply(catalog, shards, lambda now, version: now.marked(version, 1, arcs))  # type: ignore[union-attr]
    copy_row(two, key, "s1", "s2")
    copy_row(two, other, "s1", "s2")
    two.on("s2").execute("UPDATE public.users SET n = n + 1 WHERE id = %s", (other,))
    assert wrong(audit(two.catalog_url)) == [("s2", "in transit", None)]
    outcome = repair(two.catalog_url)
    assert [text for text in outcome.kept if "marks" in text] == [
        "s2: marks of 2 arcs, as rows of public.users are left there"
    ]
    two.on("s2").execute("DELETE FROM public.users WHERE id = %s", (other,))
    repair(two.catalog_url)
    assert wrong(audit(two.catalog_url)) == []
    assert not two.topology().by_id[1].in_transit


# --- whole tables ---------------------------------------------------------------------------------------------------


def test_reference_and_home_tables(two: Shards) -> None:
    for name in ("s1", "s2"):
        two.on(name).execute('CREATE TABLE public."Rate" (code text PRIMARY KEY, n int)')
        two.on(name).execute("""INSERT INTO public."Rate" VALUES ('x', 1), ('y', NULL)""")
        two.on(name).execute("CREATE TABLE public.setting (x text)")
    with two.writer() as (catalog, shards):
        membership.declare(
            catalog, shards, [ReferenceTable("public", "Rate"), HomeTable("public", "setting", "s2")]
        )
    two.on("s2").execute("INSERT INTO public.setting VALUES ('x')")
    report = audit(two.catalog_url)
    assert wrong(report) == []
    assert (report.references, report.homes) == ({"public.Rate": 2}, ["public.setting"])
    two.on("s1").execute("INSERT INTO public.setting VALUES ('x')")
    two.on("s2").execute("""UPDATE public."Rate" SET n = 0 WHERE code = 'y'""")
    assert wrong(audit(two.catalog_url)) == [
        ("catalog", "references", "public.Rate"),
        ("s1", "homes", "public.setting"),
    ]


@pytest.mark.slow
def test_a_slow_writer_of_reference_rows_is_no_difference(two: Shards) -> None:
    """One that stays between its two commits for longer than anybody looks is told as such."""
    for name in ("s1", "s2"):
        two.on(name).execute("CREATE TABLE public.rate (code text PRIMARY KEY)")
    with two.writer() as (catalog, shards):
        membership.declare(catalog, shards, [ReferenceTable("public", "rate")])
    with connect(two.topology().named("s2").url) as late:
        late.execute("BEGIN")
        late.execute("INSERT INTO public.rate VALUES ('x')")
        two.on("s1").execute("INSERT INTO public.rate VALUES ('x')")
        report = audit(two.catalog_url)
        assert wrong(report) == []
        assert ["public.rate" in text for text in report.undecided] == [True]
        assert report.as_dict()["result"] == "incomplete"
        late.execute("COMMIT")
    assert audit(two.catalog_url).complete


# --- what moves left ------------------------------------------------------------------------------------------------


def plant(shards: Shards, transfer: int, prefix: str) -> None:
    """Everything that a transfer makes on its source, and on its target."""
    source, target = shards.on("s1"), shards.on("s2")
    name = f"{prefix}_{transfer}"
    number = sql.Literal(transfer)
    for statement in (
        sql.SQL("CREATE PUBLICATION {} FOR TABLE public.users").format(sql.Identifier(name)),
        sql.SQL("SELECT pg_create_logical_replication_slot({}, 'pgoutput')").format(sql.Literal(name)),
        sql.SQL(
            "CREATE FUNCTION shardkit.{}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
        ).format(sql.Identifier(f"note_{transfer}_0")),
        sql.SQL(
            "CREATE TRIGGER {} AFTER INSERT ON public.users FOR EACH ROW EXECUTE FUNCTION shardkit.{}()"
        ).format(sql.Identifier(f"zz_shardkit_{transfer}_insert"), sql.Identifier(f"note_{transfer}_0")),
        sql.SQL("INSERT INTO shardkit.moved VALUES ({}, 's2')").format(number),
        sql.SQL("CREATE TABLE shardkit.{} ()").format(sql.Identifier(f"moved_{transfer}")),
        sql.SQL("INSERT INTO shardkit.changed VALUES ({0}, 0, '1'), ({0}, 0, '2')").format(number),
        sql.SQL("ALTER TABLE public.users REPLICA IDENTITY FULL"),
        sql.SQL("INSERT INTO shardkit.replica_identity VALUES ('public.users', 'd', NULL)"),
        sql.SQL("CREATE INDEX shardkit_identity_posts ON public.posts (user_id)"),
        sql.SQL("CREATE INDEX {} ON public.posts (hashint8extended(user_id, 0))").format(
            sql.Identifier(f"shardkit_position_{transfer}_0_99")
        ),
    ):
        source.execute(statement)
    target.execute(
        sql.SQL("CREATE SUBSCRIPTION {} CONNECTION 'dbname=x' PUBLICATION x WITH (connect = false)").format(
            sql.Identifier(name)
        )
    )


def finished_transfer(shards: Shards) -> None:
    """The catalog knows transfer 1, and that it is done."""
    topology = shards.topology()
    goal = plan(topology, {0: 100, 1: 200})
    with shards.writer() as (catalog, _):
        catalog.finish_job(catalog.create_job("rebalance", goal), "done")
        catalog.connection.execute("UPDATE shardkit.transfers SET phase = 'done'")


def test_orphans_of_a_finished_transfer_are_removed(two: Shards) -> None:
    finished_transfer(two)
    report = audit(two.catalog_url)
    plant(two, 1, f"shardkit_{report.cluster.replace('-', '')[:8]}")
    found = wrong(audit(two.catalog_url))
    assert found == [("s1", "leftovers", None)] * 10 + [("s2", "leftovers", None)]
    outcome = repair(two.catalog_url)
    assert (len(outcome.removed), outcome.kept) == (11, [])
    assert wrong(audit(two.catalog_url)) == []
    two.assert_clean()


def test_orphans_of_an_unknown_transfer_are_named_and_kept(two: Shards) -> None:
    plant(two, 4711, "shardkit_00000000")
    repaired = repair(two.catalog_url)
    assert [text.split(": ")[1].split(" ")[0] for text in repaired.removed] == ["changed", "index"]
    report = audit(two.catalog_url)
    assert len(report.problems) == len(repaired.kept) == 9
    assert not any(problem.repairable for problem in report.problems)
    for problem in report.problems:  # what it says to do helps
        for statement in problem.next.split("; "):
            two.on(problem.subject).execute(statement.encode())
    assert wrong(audit(two.catalog_url)) == []
    two.assert_clean()


def test_what_is_in_use_is_kept(two: Shards) -> None:
    """As the table is whose trigger would go; the rest goes."""
    finished_transfer(two)
    report = audit(two.catalog_url)
    plant(two, 1, f"shardkit_{report.cluster.replace('-', '')[:8]}")
    with connect(two.topology().named("s1").url) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT FROM public.users")
        outcome = repair(two.catalog_url, patience=0.3)
        assert [text.split(": ")[1].split(" ")[0] for text in outcome.kept] == [
            "trigger",
            "function",
            "changed",
        ]
    repair(two.catalog_url)
    two.assert_clean()


# --- beside a move --------------------------------------------------------------------------------------------------


def at(phase: Phase, act: Callable[[], object]) -> Callable[[Any], None]:
    done: list[object] = []

    def listener(progress: Any) -> None:
        if progress.phase is phase and not done:
            done.append(True)
            act()

    return listener


@pytest.mark.parametrize("phase", [Phase.COPYING, Phase.CUTTING_OVER, Phase.PURGING])
def test_a_move_under_way_is_named_and_explains_what_it_needs(two: Shards, phase: Phase) -> None:
    two.add("s3", 2)
    found: list[Report] = []
    two.move(listener=at(phase, lambda: found.append(audit(two.catalog_url))))
    (report,) = found
    assert wrong(report) == []
    assert report.moves
    assert {move["target"] for move in report.moves} == {"s3"}
    if phase is Phase.PURGING:
        transit = [counts.in_transit for tables in report.counts.values() for counts in tables.values()]
        assert any(transit)
    two.assert_clean()


def test_no_repair_beside_a_mover(two: Shards) -> None:
    two.add("s3", 2)
    with Mover(two.catalog_url) as mover:
        mover.start("rebalance")
        with pytest.raises(LeaseHeld):
            repair(two.catalog_url)


def test_a_repair_leaves_the_arcs_of_a_stopped_job_alone(two: Shards) -> None:
    """They are copied, or not purged yet; the mover that resumes relies on them."""
    two.add("s3", 2)

    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        two.move(listener=at(Phase.CATCHING_UP, stop), parallel=1)
    there = "SELECT count(*) FROM public.users"
    before = two.on("s3").execute(there).fetchone()
    assert before != (0,)
    assert wrong(audit(two.catalog_url)) == []
    outcome = repair(two.catalog_url)
    assert (outcome.removed, outcome.kept) == ([], [])
    assert two.on("s3").execute(there).fetchone() == before
    two.resume()
    two.assert_clean()


def test_a_row_written_while_it_is_compared_stays(two: Shards) -> None:
    """The writer goes round the session, holds the row, and ends after the repair looked."""
    key = keys(two, "s1", 1)[0]
    copy_row(two, key, "s1", "s2")
    with connect(two.topology().named("s2").url) as writer:
        writer.execute("BEGIN")
        writer.execute("UPDATE public.users SET n = 99 WHERE id = %s", (key,))
        waits = "SELECT FROM pg_stat_activity WHERE application_name = 'shardkit repair' AND wait_event_type = 'Lock'"

        def commit() -> None:
            until(lambda: two.on("s2").execute(waits).fetchall(), "the repair at the row")
            writer.execute("COMMIT")

        ending = threading.Thread(target=commit)
        ending.start()
        outcome = repair(two.catalog_url)
        ending.join()
    assert outcome.removed == []
    assert two.on("s2").execute("SELECT n FROM public.users WHERE id = %s", (key,)).fetchall() == [(99,)]


def test_a_shard_that_is_away_is_told(two: Shards) -> None:
    database = two.on("s2").info.dbname
    two.on("s2").close()
    with connect(two.fresh_database(1)) as beside:
        for allowed in ("false", "true"):
            beside.execute(
                sql.SQL("ALTER DATABASE {} WITH ALLOW_CONNECTIONS {}").format(
                    sql.Identifier(database), sql.SQL(allowed)
                )
            )
            report = audit(two.catalog_url)
            assert wrong(report) == []
            assert list(report.away) == (["s2"] if allowed == "false" else [])
            assert report.complete is (allowed == "true")
            assert "s1" in report.counts
