"""The commands at work: from an empty database to keys on three shards, and what each prints."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from shardkit import __version__
from shardkit.core import ids
from shardkit.core.ring import position
from shardkit.storage.connections import connect, value
from tests.acceptance.conftest import Program, Running, contents
from tests.fix_postgres import FreshDatabase
from tests.fix_shards import MakeShards, fill
from tests.sharded import until

USERS = 300
INIT_LOCK = 0x5348_4152
POSTS = 3


def fill_models(url: str) -> int:
    """Users and their posts, with statistics; the number of rows."""
    with connect(url) as connection:
        connection.execute(
            "INSERT INTO public.users SELECT g, 'user ' || g FROM generate_series(1, %s) g", (USERS,)
        )
        connection.execute(
            "INSERT INTO public.posts SELECT g, i, 'body' FROM generate_series(1, %s) g, generate_series(1, %s) i",
            (USERS, POSTS),
        )
        connection.execute("ANALYZE")
    return USERS * (1 + POSTS)


def rows(url: str) -> int:
    """Rows of both tables."""
    with connect(url) as connection:
        return int(
            value(
                connection, "SELECT (SELECT count(*) FROM public.users) + (SELECT count(*) FROM public.posts)"
            )
        )


def test_from_nothing_to_two_shards(
    catalog: str, program: Program, call: Program, fresh_database: FreshDatabase
) -> None:
    first, second = fresh_database(0), fresh_database(1)

    made = program("init", "--json").ok().document
    assert made["created"] is True
    assert made["next"].startswith("`shardkit shard add NAME URL`")
    again = call("init", "--json").ok().document
    assert again == {**made, "created": False}

    added = program("shard", "add", "s1", first, "--models", "models:Base", "--json").ok().document
    assert added["joined"] is True
    assert added["job"] is None
    assert added["plan"]["transfers"] == []
    assert added["shard"]["name"] == "s1"

    declared = program("schema", "declare", "models:Base", "--json").ok().document
    assert [
        (table["name"], table["key"], table["key_type"], table["new"]) for table in declared["tables"]
    ] == [
        ("posts", "user_id", "int", True),
        ("users", "id", "int", True),
    ]
    assert declared["next"] is None

    before = fill_models(first)
    done = program("shard", "add", "s2", second, "--models", "models:Base", "--yes", "--json").ok()
    result = done.document
    assert result["plan"]["slots_moved"] == result["plan"]["slots_minimum"] == 32_768
    assert [shard["slots_after"] for shard in result["plan"]["shards"]] == [32_768, 32_768]
    assert result["job"]["state"] == "done"
    assert result["next"] is None
    (transfer,) = result["job"]["transfers"]
    assert (transfer["source"], transfer["target"], transfer["phase"]) == ("s1", "s2", "done")
    assert transfer["rows_moved"] == transfer["rows_purged"] == rows(second)
    assert rows(first) + rows(second) == before
    assert transfer["pause_ms"]["total"] > 0
    assert "s1 -> s2: Copying the rows of the arcs to the target." in done.err

    healthy = program("doctor").ok()
    assert healthy.out.endswith("Healthy.\n")

    with connect(first) as here, connect(second) as there:
        for key in (1, 2, 3, 4):
            routed = call("route", str(key), "--json").ok()
            assert "taken as int" in routed.err
            owner = {"s1": here, "s2": there}[routed.document["shard"]]
            assert value(owner, "SELECT 1 FROM public.users WHERE id = %s", (key,)) == 1
            assert routed.document["position"] == position(key)
            if owner is there:
                break


def test_ids_are_decoded(catalog: str, call: Program, make_shards: MakeShards) -> None:
    environment = {"SHARDKIT_CATALOG": make_shards(2).catalog_url}
    timed = str(ids.timed_id(468_750_000, 40_000, 1_023, 7))
    document = call("route", "--id", timed, "--json", **environment).ok().document
    assert document == {
        "id": timed, "layout": "timed", "time": "2026-11-26T10:40:00.000Z", "tick": 468_750_000, "slot": 40_000,
        "lane": 1_023, "sequence": 7, "shards": ["s1"], "in_transit": [], "version": document["version"],
    }  # fmt: skip
    told = call("route", "--id", timed, **environment).ok().out
    assert "slot 40000, lane 1023, sequence 7" in told
    assert "Its row is on shard s1." in told
    counted = call("route", "--id", str(ids.counted_id(12, 5)), "--json", **environment).ok().document
    assert (counted["layout"], counted["counter"], counted["slot"]) == ("counted", 12, 5)
    carried = call("route", "--id", str(ids.uuid_id(0, 1, 9)), "--json", **environment).ok().document
    assert (carried["layout"], carried["time"], carried["slot"]) == ("uuid", "1970-01-01T00:00:00.000Z", 9)
    for wrong in ("-5", "x", str(2**63), "00112233-4455-4677-8899-aabbccddeeff"):
        assert "no id that carries a slot" in call("route", "--id", wrong, **environment).failed(2).err


def test_of_several_inits_at_once_one_makes_the_catalog(catalog: str, start: Callable[..., Running]) -> None:
    with connect(catalog) as connection, connection.transaction():
        # What the migrations begin with: nobody gets on before all have looked.
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (INIT_LOCK,))
        running = [start("init", "--json") for _ in range(3)]
        with connect(catalog) as watcher:
            while (
                value(watcher, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
                < 3
            ):
                assert all(one.process.poll() is None for one in running)
    made = [one.end().ok().document for one in running]
    assert sorted(document["created"] for document in made) == [False, False, True]
    assert len({document["cluster_id"] for document in made}) == 1


def test_what_each_command_prints(catalog: str, call: Program, make_shards: MakeShards) -> None:
    shards = make_shards(2)
    environment = {"SHARDKIT_CATALOG": shards.catalog_url}
    with connect(shards.topology().named("s1").url) as s1:
        fill(s1, USERS)

    plan = call("rebalance", "plan", **environment).ok()
    assert "s1 -> s2" in plan.out
    assert "32,768 of 65,536 slots move; the minimum is 32,768." in plan.out
    assert plan.out.endswith("Next: `shardkit rebalance run` moves them.\n")
    document = call("rebalance", "plan", "--json", **environment).ok().document
    assert document["problems"] == []
    assert document["transfers"] == [
        {
            "source": "s1",
            "target": "s2",
            "slots": 32_768,
            "arcs": [["8000000000000000", "FFFFFFFFFFFFFFFF"]],
            "rows_estimate": USERS * 3 // 2,
            "bytes_estimate": document["transfers"][0]["bytes_estimate"],
        }
    ]

    assert "There was no job yet." in call("rebalance", "status", **environment).ok().out
    ran = call("rebalance", "run", "--yes", **environment).ok()
    assert ran.out.startswith("Job 1 (rebalance): done\n")
    assert ran.out.endswith("Nothing to do.\n")
    assert call("rebalance", "run", "--json", **environment).ok().document["job"] is None

    status = call("rebalance", "status", "--watch", **environment).ok()
    assert status.out == ran.out
    job = call("rebalance", "status", "--json", **environment).ok().document["job"]
    assert job["transfers"][0]["rows_moved"] == sum(
        value(shards.on("s2"), f"SELECT count(*) FROM public.{table}")  # noqa: S608
        for table in ("users", "posts")
    )

    listed = call("shard", "list", "--json", **environment).ok().document
    assert [(shard["name"], shard["slots"], shard["weight"]) for shard in listed["shards"]] == [
        ("s1", 32_768, 100),
        ("s2", 32_768, 100),
    ]
    topology = shards.topology()
    seen = call("--json", "status", **environment).ok().document
    assert seen["version"] == topology.version
    assert seen["pending_version"] is None
    assert seen["job"] is None
    assert [(shard["reachable"], shard["fence_held"], shard["fence"]) for shard in seen["shards"]] == [
        (True, True, shard.fence.relation) for shard in topology.shards
    ]
    assert "public.users by id (int)" in call("status", **environment).ok().out


def test_a_shard_that_joins_without_rows_is_balanced_later(
    catalog: str, call: Program, make_shards: MakeShards, fresh_database: FreshDatabase
) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    url = fresh_database(2)
    with connect(url) as connection:
        connection.execute(shards.schema)
    environment = {"SHARDKIT_CATALOG": shards.catalog_url}

    before = contents(shards.catalog_url), contents(url)
    planned = call("shard", "add", "s2", url, "--plan-only", "--weight", "50", "--json", **environment).ok()
    assert planned.document["joined"] is False
    assert [shard["slots_after"] for shard in planned.document["plan"]["shards"]] == [43_691, 21_845]
    assert (contents(shards.catalog_url), contents(url)) == before

    joined = call("shard", "add", "s2", url, "--no-run", SHARDKIT_WEIGHT="50", **environment).ok()
    assert "Next: `shardkit rebalance run`" in joined.out
    assert value(shards.on("s1"), "SELECT count(*) FROM public.users") == USERS
    note = call("doctor", "--json", **environment).ok().document
    assert [found["check"] for found in note["findings"] if found["level"] == "note"] == ["shares"]


# --- asking ---------------------------------------------------------------------------------------------------------


def test_asks_before_rows_move(folder: Path, make_shards: MakeShards) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), USERS)
    refused, text = on_terminal(folder, "n\n", "rebalance", "run", "--catalog", shards.catalog_url)
    assert refused == 3
    assert "not answered with yes" in text
    with connect(shards.catalog_url) as connection:
        assert value(connection, "SELECT count(*) FROM shardkit.jobs") == 0

    done, text = on_terminal(folder, "y\n", "rebalance", "run", "--catalog", shards.catalog_url)
    assert done == 0
    assert "s1 -> s2 ━" in text.replace("\x1b[90m", "").replace("\x1b[91m", ""), "no bar was drawn"
    assert "Job 1 (rebalance): done" in text


def test_refuses_to_ask_where_nobody_can_answer(program: Program, make_shards: MakeShards) -> None:
    shards = make_shards(2)
    program("rebalance", "run", answer="y\n", SHARDKIT_CATALOG=shards.catalog_url).failed(
        2, "no terminal", "--yes"
    )
    with connect(shards.catalog_url) as connection:
        assert value(connection, "SELECT count(*) FROM shardkit.jobs") == 0


def on_terminal(folder: Path, answer: str, *arguments: str) -> tuple[int, str]:
    """Run the program on a terminal and answer its question; exit code and all it printed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "shardkit", *arguments],
        cwd=folder,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "160"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    killer = threading.Timer(60, process.kill)
    killer.start()
    text, answered = "", False
    try:
        while data := os.read(ours, 65536):
            text += data.decode(errors="replace")
            if not answered and "[y/N]" in text:
                os.write(ours, answer.encode())
                answered = True
    except OSError:  # the terminal is closed: the program has ended
        pass
    killer.cancel()
    os.close(ours)
    return process.wait(), text


# --- stopping and going on -----------------------------------------------------------------------------------------


class Blocker:
    """A transaction with a write on a shard: no replication slot can be made there until it ends."""

    def __init__(self, url: str) -> None:
        self._connection: psycopg.Connection[Any] = psycopg.connect(
            url.replace("postgresql+psycopg", "postgresql")
        )
        self._connection.execute("SELECT pg_current_xact_id()")

    def __enter__(self) -> Blocker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()


def test_a_stopped_run_goes_on(
    program: Program,
    call: Program,
    start: Callable[..., Running],
    make_shards: MakeShards,
    fresh_database: FreshDatabase,
) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), USERS)
    environment = {"SHARDKIT_CATALOG": shards.catalog_url}

    with Blocker(shards.topology().named("s1").url):
        running = start("rebalance", "run", "--yes", "--json", **environment)
        running.wait_for("waits: the replication slot on shard s1 waits for pid")

        status = call("rebalance", "status", "--json", **environment).ok().document
        (transfer,) = status["job"]["transfers"]
        assert transfer["phase"] == "copying"
        assert "waits for pid" in transfer["waiting_for"]
        assert status["next"].startswith("wait for the mover at work")
        call("rebalance", "resume", **environment).failed(
            5, "Another mover is at work", str(running.process.pid)
        )

        stopped = running.end(signal.SIGINT)
        stopped.failed(5, "s1 -> s2 is copying", "shardkit rebalance resume")
        assert stopped.document["error"] == "mover-stopped"
        assert stopped.document["retryable"] is True
        assert "Stopping after the current step" in stopped.err

        resumed = start("rebalance", "resume", **environment)
        resumed.wait_for("waits: the replication slot on shard s1 waits for pid")
        resumed.end(signal.SIGTERM).failed(5, "s1 -> s2 is copying")

    unfinished = call("doctor", **environment)
    assert unfinished.code == 3
    assert "job 1 is unfinished and nobody works on it" in unfinished.out
    call("rebalance", "run", "--yes", **environment).failed(3, "A job is unfinished")
    url = fresh_database(2)
    call("shard", "add", "s3", url, "--yes", **environment).failed(3, "A job is unfinished")

    done = program("rebalance", "resume", "--json", **environment).ok().document
    assert done["job"]["state"] == "done"
    shards.assert_clean()
    call("rebalance", "resume", **environment).failed(3, "no unfinished job")


def test_a_run_is_paused_from_another_terminal(
    program: Program, call: Program, start: Callable[..., Running], make_shards: MakeShards
) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), USERS)
    environment = {"SHARDKIT_CATALOG": shards.catalog_url}
    call("rebalance", "pause", **environment).failed(3, "no unfinished job")
    with Blocker(shards.topology().named("s1").url):
        running = start("rebalance", "run", "--yes", "--json", **environment)
        running.wait_for("waits: the replication slot")
        paused = call("rebalance", "pause", "--json", **environment).ok().document
        assert (paused["job"]["state"], paused["job"]["paused"], paused["job"]["mover"]) == ("running", True, None)
        assert paused["next"].startswith("`shardkit rebalance resume` goes on")
        ended = running.end().failed(5, "Paused between two steps: s1 -> s2 is copying", "rebalance resume")
        assert ended.document["paused"] is True
        again = call("rebalance", "pause", **environment).ok().out  # nobody is at work
        assert "Job 1 (rebalance): running, paused" in again
        assert "job 1 is paused" in call("doctor", **environment).ok().out
    done = program("rebalance", "resume", "--json", **environment).ok().document
    assert (done["job"]["state"], done["job"]["paused"]) == ("done", False)
    shards.assert_clean()


def test_another_process_sees_how_far_it_is(
    program: Program, call: Program, start: Callable[..., Running], make_shards: MakeShards
) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), USERS)
    environment = {"SHARDKIT_CATALOG": shards.catalog_url}
    running = start("rebalance", "run", "--yes", "--max-rows-per-second", "20", **environment)
    running.wait_for("Deleting the moved rows")

    def seen() -> Any:
        (transfer,) = call("rebalance", "status", "--json", **environment).ok().document["job"]["transfers"]
        assert transfer["phase"] == "purging"
        return transfer["progress"] if transfer["progress"]["rows"] else None

    reported = until(seen, "rows that are deleted")
    assert 0 < reported["rows"] < reported["rows_expected"]
    assert reported["rate"] > 0
    assert reported["seconds_left"] > 0
    assert " rows/s, " in call("rebalance", "status", **environment).ok().out
    running.end(signal.SIGINT).failed(5, "s1 -> s2 is purging")
    (transfer,) = call("rebalance", "status", "--json", **environment).ok().document["job"]["transfers"]
    assert transfer["progress"]["rate"] is None
    limits = ("--max-rows-per-second", "1000000", "--max-wal-retained", "1GB")
    program("rebalance", "resume", *limits, **environment).ok()
    shards.assert_clean()
    call("rebalance", "run", "--max-lag", "7 bananas", **environment).failed(2, "Not a size")


def test_an_aborted_run_leaves_everything_as_it_was(
    program: Program, call: Program, start: Callable[..., Running], make_shards: MakeShards
) -> None:
    shards = make_shards(2)
    fill(shards.on("s1"), USERS)
    environment = {"SHARDKIT_CATALOG": shards.catalog_url}
    with Blocker(shards.topology().named("s1").url):
        running = start("rebalance", "run", "--yes", **environment)
        running.wait_for("waits: the replication slot")
        running.end(signal.SIGINT)
    aborted = program("rebalance", "abort", **environment).ok()
    assert "Job 1 (rebalance): aborted" in aborted.out
    assert "Next: `shardkit rebalance run`" in aborted.out
    shards.assert_clean()
    assert value(shards.on("s1"), "SELECT count(*) FROM public.users") == USERS
    call("doctor", **environment).ok()


# --- the program itself ---------------------------------------------------------------------------------------------


def test_the_installed_program() -> None:
    script = Path(sys.executable).with_name("shardkit")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"shardkit {__version__} (ring: ")
    assert done.stderr == ""


WHOLE_MODELS = """
from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardkit import home, reference, sharded


class Base(DeclarativeBase):
    pass


@reference
class Country(Base):
    __tablename__ = "Country"
    code: Mapped[str] = mapped_column(primary_key=True)


@home("s2")
class Setting(Base):
    __tablename__ = "setting"
    id: Mapped[int] = mapped_column(primary_key=True)


@sharded(by="id")
class Customer(Base):
    __tablename__ = "customer"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    country: Mapped[str] = mapped_column(ForeignKey("Country.code"))
"""


def test_reference_rows_are_there_before_the_rows_that_name_them(
    catalog: str, call: Program, folder: Path, fresh_database: FreshDatabase
) -> None:
    (folder / "whole_models.py").write_text(WHOLE_MODELS)
    first, second = fresh_database(0), fresh_database(1)
    call("init").ok()
    call("shard", "add", "s1", first).ok()
    # The home is no shard yet.
    call("schema", "declare", "whole_models:Base", "--create").failed(3, "There is no shard 's2'")
    with connect(first) as connection:
        assert value(connection, "SELECT to_regclass('public.customer')") is None
    (folder / "models_before.py").write_text(
        WHOLE_MODELS.replace('"s2"', '"s1"').replace("setting", "earlier")
    )
    declared = call("schema", "declare", "models_before:Base", "--create", "--json").ok().document
    assert [(each["name"], each["kind"], each["home"]) for each in declared["tables"]] == [
        ("customer", "sharded", None),
        ("Country", "reference", None),
        ("earlier", "home", "s1"),
    ]
    with connect(first) as connection:
        connection.execute("""INSERT INTO public."Country" SELECT 'c' || n FROM generate_series(1, 50) n""")
        connection.execute(
            "INSERT INTO public.customer SELECT n, 'c' || n % 50 + 1 FROM generate_series(1, 500) n"
        )
    call("shard", "add", "s2", second, "--models", "models_before:Base", "--yes").ok()
    call("schema", "declare", "whole_models:Base", "--create").ok()
    call("doctor").ok()
    joined = """SELECT count(*) FROM public.customer JOIN public."Country" ON country = code"""
    with connect(first) as one, connect(second) as two:
        assert value(one, joined) + value(two, joined) == 500
        assert value(two, joined) > 100
        assert value(two, 'SELECT count(*) FROM public."Country"') == 50
        assert value(one, "SELECT to_regclass('public.setting')") is None
        assert value(two, "SELECT to_regclass('public.earlier')") is None
