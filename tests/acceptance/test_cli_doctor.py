"""`shardkit doctor` finds what is broken, names it, and what it says to do helps."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from psycopg import sql

from shardkit.core.keyrange import Arc, ArcSet
from shardkit.core.topology import DeclaredTable, HomeTable, ReferenceTable
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage import change, membership, setaside
from shardkit.storage.connections import connect, value
from tests.acceptance.conftest import Program
from tests.fix_shards import MakeShards, Shards
from tests.sharded import until


@pytest.fixture
def two(make_shards: MakeShards, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Two shards; their catalog is in the environment."""
    shards = make_shards(2)
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    return shards


def problems(call: Program) -> list[dict[str, Any]]:
    """What the doctor finds wrong; each has a next step."""
    outcome = call("doctor", "--json")
    assert "Traceback" not in outcome.err
    document = outcome.document
    found = [finding for finding in document["findings"] if finding["level"] == "problem"]
    assert outcome.code == (3 if found else 0)
    assert document["healthy"] is not bool(found)
    assert all(finding["next"] for finding in found)
    return found


def one_problem(call: Program) -> tuple[str, str, str]:
    """Subject, check and detail of the only thing wrong."""
    (found,) = problems(call)
    return found["subject"], found["check"], found["detail"]


def test_leftovers_of_a_move_and_their_removal(two: Shards, call: Program) -> None:
    prefix = "shardkit_" + uuid4().hex[:8]
    source, target = two.on("s1"), two.on("s2")
    for statement in (
        sql.SQL("CREATE PUBLICATION {} FOR TABLE public.users").format(sql.Identifier(f"{prefix}_7")),
        sql.SQL("SELECT pg_create_logical_replication_slot({}, 'pgoutput')").format(
            sql.Literal(f"{prefix}_7")
        ),
        sql.SQL(
            "CREATE FUNCTION shardkit.note_7_0() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
        ),
        sql.SQL(
            "CREATE TRIGGER zz_shardkit_7_insert AFTER INSERT ON public.users "
            "FOR EACH ROW EXECUTE FUNCTION shardkit.note_7_0()"
        ),
        sql.SQL("INSERT INTO shardkit.moved VALUES (7, 's2')"),
        sql.SQL("CREATE TABLE shardkit.moved_7 ()"),
        sql.SQL("INSERT INTO shardkit.changed VALUES (7, 0, '1'), (7, 0, '2')"),
        sql.SQL("ALTER TABLE public.users REPLICA IDENTITY FULL"),
        sql.SQL("INSERT INTO shardkit.replica_identity VALUES ('public.users', 'd', NULL)"),
        sql.SQL("CREATE INDEX shardkit_identity_posts ON public.posts (user_id)"),
    ):
        source.execute(statement)
    target.execute(
        sql.SQL("CREATE SUBSCRIPTION {} CONNECTION 'dbname=x' PUBLICATION x WITH (connect = false)").format(
            sql.Identifier(f"{prefix}_7")
        )
    )
    found = problems(call)
    leftovers = [
        (each["subject"], each["detail"].split(" belongs")[0])
        for each in found
        if each["check"] == "leftovers"
    ]
    assert sorted(leftovers) == [
        ("s1", "2 notes of written rows"),
        ("s1", "changed replica identity of public.users"),
        ("s1", "function shardkit.note_7_0"),
        ("s1", "index public.shardkit_identity_posts"),
        ("s1", "marker moved_7"),
        ("s1", f"publication {prefix}_7"),
        ("s1", "refusal of writes to moved rows"),
        ("s1", f"replication slot {prefix}_7"),
        ("s1", "trigger zz_shardkit_7_insert on public.users"),
        ("s2", f"subscription {prefix}_7"),
    ]
    for each in found:
        if each["check"] == "leftovers":
            for statement in each["next"].split("; "):
                two.on(each["subject"]).execute(statement)
    assert problems(call) == []
    two.assert_clean()


def test_an_index_that_a_lost_move_set_aside(two: Shards, call: Program) -> None:
    for name in ("s1", "s2"):
        two.on(name).execute("CREATE INDEX posts_body ON public.posts (body)")
    target = two.on("s2")
    setaside.set_aside(target, two.tables[0], value(target, "SELECT token FROM shardkit.mover"))
    (found,) = problems(call)
    assert (found["subject"], found["check"]) == ("s2", "leftovers")
    assert found["detail"].startswith("note of the index public.posts_body, set aside for a copy")
    for statement in found["next"].split("; "):
        target.execute(statement)
    assert problems(call) == []
    two.assert_clean()


def test_tables_that_drifted(two: Shards, call: Program) -> None:
    two.on("s2").execute("ALTER TABLE public.users ALTER name DROP NOT NULL")
    subject, check, detail = one_problem(call)
    assert (subject, check) == ("s2", "tables")
    assert "column public.users.name differs" in detail
    two.on("s2").execute("ALTER TABLE public.users ALTER name SET NOT NULL")
    two.on("s2").execute("DROP TABLE public.posts")
    assert one_problem(call) == ("s2", "tables", "table public.posts does not exist")


def test_unique_values_that_are_so_on_each_shard_alone(two: Shards, call: Program) -> None:
    """A note and no problem; the plan of a move shows it as well."""
    for name in ("s1", "s2"):
        two.on(name).execute("ALTER TABLE public.users ADD email text, ADD token uuid UNIQUE")
        two.on(name).execute("CREATE UNIQUE INDEX one_email ON public.users (lower(email))")
        two.on(name).execute("CREATE UNIQUE INDEX one_name ON public.users (name) INCLUDE (id)")
        two.on(name).execute("CREATE UNIQUE INDEX fine ON public.users (name, id)")
    notes = [
        each["detail"].split(" is unique on each shard alone")[0]
        for each in call("doctor", "--json").ok().document["findings"]
        if (each["subject"], each["check"], each["level"]) == ("s1", "tables", "note")
    ]
    expected = ["one_email (an expression) of public.users", "one_name (name) of public.users"]
    assert notes == expected
    plan = call("rebalance", "plan").ok()
    assert [line.startswith("Note: ") for line in plan.out.splitlines()].count(True) == 2
    planned = call("rebalance", "plan", "--json").ok().document["notes"]
    assert [text.split(" is unique")[0] for text in planned] == expected


def test_a_key_that_became_nullable(two: Shards, call: Program) -> None:
    for name in ("s1", "s2"):
        two.on(name).execute(
            "ALTER TABLE public.posts DROP CONSTRAINT posts_pkey, ALTER user_id DROP NOT NULL"
        )
    assert [(each["subject"], each["detail"]) for each in problems(call)] == [
        ("s1", "key public.posts.user_id is nullable"),
        ("s2", "key public.posts.user_id is nullable"),
    ]


def test_a_shard_from_an_older_backup(two: Shards, call: Program) -> None:
    shard = two.topology().named("s2")
    two.on("s2").execute(
        sql.SQL("ALTER TABLE {} RENAME TO fence_1_00000000").format(
            sql.Identifier("shardkit", shard.fence.relation)
        )
    )
    two.on("s2").execute("UPDATE shardkit.topology SET version = 1")
    assert [(each["subject"], each["check"]) for each in problems(call)] == [("s2", "fence"), ("s2", "copy")]


def test_a_copy_that_differs(two: Shards, call: Program) -> None:
    two.on("s1").execute("UPDATE shardkit.topology SET digest = 'f00'")
    subject, check, detail = one_problem(call)
    assert (subject, check) == ("s1", "copy")
    assert "differs from the catalog's" in detail


def test_a_shard_of_somebody_else(two: Shards, call: Program) -> None:
    two.on("s1").execute("UPDATE shardkit.shard SET cluster_id = %s", (uuid4(),))
    subject, check, detail = one_problem(call)
    assert (subject, check) == ("s1", "identity")
    assert detail.startswith("this database is shard 's1' (id 0) of cluster ")


def test_a_database_that_is_no_shard(two: Shards, call: Program) -> None:
    two.on("s1").execute("DROP SCHEMA shardkit CASCADE")
    found = problems(call)
    assert {each["subject"] for each in found} == {"s1"}
    assert ("identity", "this database is no shard") in [(each["check"], each["detail"]) for each in found]
    assert call("status", "--json").ok().document["shards"][0]["error"]


def test_a_change_that_was_interrupted(two: Shards, call: Program) -> None:
    with two.writer() as (catalog, _):
        current = catalog.current()
        proposal = current.joined(
            catalog.next_version(), shard_id=9, name="s9", url=current.shards[0].url, weight=1
        )
        catalog.propose(proposal)
    subject, check, detail = one_problem(call)
    assert (subject, check) == ("catalog", "change")
    assert detail == f"topology {proposal.version} is pending, and nobody is at work"


def test_an_interrupted_change_is_settled_by_resume(two: Shards, call: Program) -> None:
    with two.writer() as (catalog, _):
        current = catalog.current()
        # Its closing shard never took it, so it cannot come into force any more.
        catalog.propose(current.marked(catalog.next_version(), 1, ArcSet([Arc(0, 5)])))
    assert one_problem(call)[:2] == ("catalog", "change")
    assert "Next: `shardkit rebalance resume` settles" in call("status").ok().out
    settled = call("rebalance", "resume", "--json").ok().document
    assert settled == {"job": None, "settled": True, "next": settled["next"]}
    assert problems(call) == []


def test_a_mark_without_a_job(two: Shards, call: Program) -> None:
    with two.writer() as (catalog, shards):
        change.apply(catalog, shards, lambda now, version: now.marked(version, 1, ArcSet([Arc(0, 5)])))  # type: ignore[union-attr]
    assert one_problem(call) == ("s2", "in transit", "1 arc marked, and no job is unfinished")


def test_a_server_that_is_not_safe(two: Shards, call: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_FSYNC_OFF)
    assert [(each["subject"], each["check"]) for each in problems(call)] == [
        ("s1", "server"),
        ("s2", "server"),
    ]


def test_what_the_human_reads(two: Shards, call: Program) -> None:
    two.on("s2").execute("DROP TABLE public.posts")
    outcome = call("doctor")
    assert outcome.code == 3
    assert "table public.posts does not exist" in outcome.out
    assert "s2, tables: Make the table as it is on the other shards" in outcome.out
    assert outcome.out.endswith("1 problem.\n")


def test_reference_tables_that_differ(two: Shards, call: Program) -> None:
    tables: list[DeclaredTable] = [ReferenceTable("public", "Rate"), HomeTable("public", "setting", "s2")]
    for name in ("s1", "s2"):
        two.on(name).execute('CREATE TABLE public."Rate" (code text PRIMARY KEY, n int)')
        two.on(name).execute("""INSERT INTO public."Rate" VALUES ('x', 1), ('y', NULL)""")
    two.on("s2").execute("CREATE TABLE public.setting (x text)")
    with two.writer() as (catalog, shards):
        membership.declare(catalog, shards, tables)
    assert problems(call) == []
    shown = call("status").ok().out
    assert "Reference tables: public.Rate\n" in shown
    assert "Home tables: public.setting on s2\n" in shown

    two.on("s2").execute("""UPDATE public."Rate" SET n = 2 WHERE code = 'x'""")
    subject, check, detail = one_problem(call)
    assert (subject, check) == ("catalog", "references")
    assert detail == "the rows of public.Rate differ (s1: 2 rows, s2: 2 rows)"
    two.on("s2").execute("""UPDATE public."Rate" SET n = 1 WHERE code = 'x'""")

    two.on("s1").execute("""ALTER TABLE public."Rate" ALTER n SET DEFAULT random()""")
    two.on("s2").execute("DROP TABLE public.setting")
    assert [(each["subject"], each["detail"].split(" which")[0]) for each in problems(call)] == [
        ("s1", "column public.Rate.n has DEFAULT random(),"),
        (
            "s2",
            "column public.Rate.n differs: integer DEFAULT random() on the source, integer on the target",
        ),
        ("s2", "table public.setting does not exist"),
    ]


def test_the_doctor_waits_for_a_writer_of_reference_rows(two: Shards, call: Program) -> None:
    """Between its two commits the shards differ, and nothing is wrong."""
    for name in ("s1", "s2"):
        two.on(name).execute("CREATE TABLE public.rate (code text PRIMARY KEY)")
    with two.writer() as (catalog, shards):
        membership.declare(catalog, shards, [ReferenceTable("public", "rate")])
    with connect(two.topology().named("s2").url) as late:
        late.execute("BEGIN")
        late.execute("INSERT INTO public.rate VALUES ('x')")
        two.on("s1").execute("INSERT INTO public.rate VALUES ('x')")
        found: list[Any] = []
        doctor = threading.Thread(target=lambda: found.append(problems(call)))
        doctor.start()
        waits = (
            "SELECT FROM pg_locks WHERE relation = 'public.rate'::regclass AND mode = 'ShareLock' AND granted"
        )
        until(lambda: two.on("s1").execute(waits).fetchall(), "the doctor at the shard that is written first")
        late.execute("COMMIT")
        doctor.join()
    assert found == [[]]
