"""`shard add` killed before, between and after its two writes: doctor names what is left, the same command goes on."""

from __future__ import annotations

import os
import signal

import pytest

from shardkit.cli.app import run
from shardkit.core.errors import MoveWaiting
from shardkit.core.topology import ReferenceTable
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage.connections import connect, value
from tests.fix_postgres import FreshDatabase
from tests.fix_shards import SCHEMA, TABLES, MakeShards, Shards, fill
from tests.movers import run_forked

USERS = 200


@pytest.fixture
def one(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """A catalog, which is in the environment, with one shard that holds rows."""
    shards = make_shards(1)
    fill(shards.on("s1"), USERS)
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    return shards


def newcomer(fresh_database: FreshDatabase, server: int) -> str:
    url = fresh_database(server)
    with connect(url) as connection:
        connection.execute(SCHEMA)
    return url


def killed_at(failpoint: str, *arguments: str) -> None:
    """Run the program, which must be killed at the point."""
    catalog = os.environ.get("SHARDKIT_CATALOG", "")
    code = run_forked("command", catalog, failpoint, arguments=arguments)
    assert code == -signal.SIGKILL, f"it never passed {failpoint}"


def test_a_claim_that_no_topology_knows_is_named_and_can_be_taken(
    one: Shards, fresh_database: FreshDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = newcomer(fresh_database, 1), newcomer(fresh_database, 2)
    before = one.topology()
    killed_at("join.claimed", "shard", "add", "two", first, "--no-run")
    assert one.topology() == before

    assert run(["doctor"]) == 3
    found = capsys.readouterr().out
    assert "was claimed for shard two, which never joined" in found
    assert "`DELETE FROM shardkit.shard` there gives it up" in found

    # Another database takes the number that the claim names.
    assert run(["shard", "add", "three", second, "--no-run"]) == 0
    assert run(["shard", "add", "two", first, "--no-run"]) == 0
    assert [shard.name for shard in one.topology().shards] == ["s1", "three", "two"]
    with connect(first) as connection:
        row = connection.execute("SELECT shard_id, name FROM shardkit.shard").fetchone()
    assert row == (one.topology().named("two").id, "two")
    capsys.readouterr()
    assert run(["doctor"]) == 0, capsys.readouterr().out


def test_a_claim_can_be_given_up(
    one: Shards, fresh_database: FreshDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    url = newcomer(fresh_database, 1)
    killed_at("join.claimed", "shard", "add", "two", url, "--no-run")
    with connect(url) as connection:
        connection.execute("DELETE FROM shardkit.shard")
    assert run(["doctor"]) == 0, capsys.readouterr().out


def test_a_database_that_took_part_is_never_taken(
    one: Shards, fresh_database: FreshDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    """The catalog was restored from before the shard joined: its rows would be taken for strays."""
    url = newcomer(fresh_database, 1)
    assert run(["shard", "add", "two", url, "--no-run"]) == 0
    with connect(one.catalog_url) as connection:
        connection.execute("DELETE FROM shardkit.topologies WHERE state = 'current'")
        connection.execute(
            "UPDATE shardkit.topologies SET state = 'current' "
            "WHERE version = (SELECT max(version) FROM shardkit.topologies)"
        )
    assert run(["shard", "add", "two", url, "--no-run"]) == 3
    assert "of which the catalog knows nothing" in capsys.readouterr().err


@pytest.mark.parametrize("failpoint", ["change.proposed", "change.opened", "change.recorded"])
def test_the_same_command_goes_on(
    one: Shards, fresh_database: FreshDatabase, capsys: pytest.CaptureFixture[str], failpoint: str
) -> None:
    url = newcomer(fresh_database, 1)
    killed_at(failpoint, "shard", "add", "two", url, "--yes")
    assert run(["shard", "add", "two", url, "--weight", "50", "--yes"]) == 3
    refused = capsys.readouterr().err
    assert "Shard two has joined already, with the weight 100" in refused
    assert run(["shard", "add", "two", url, "--yes"]) == 0
    assert "Job 1 (add shard two): done" in capsys.readouterr().out
    with connect(url) as connection:
        assert 0 < value(connection, "SELECT count(*) FROM public.users") < USERS
    one.assert_clean()

    # And once more, when all is done: nothing is left to do, and nothing is done.
    version = one.topology().version
    assert run(["shard", "add", "two", url, "--yes"]) == 0
    assert "Nothing has to move" in capsys.readouterr().out
    assert one.topology().version == version


@pytest.mark.parametrize("failpoint", ["change.proposed", "join.copied"])
def test_the_same_command_goes_on_where_the_change_proves_impossible(
    make_shards: MakeShards,
    fresh_database: FreshDatabase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failpoint: str,
) -> None:
    """With reference tables a joining closes a shard, and a proposal that it never took is discarded."""
    countries = ReferenceTable("public", "countries")
    schema = SCHEMA + "CREATE TABLE public.countries (code text PRIMARY KEY);"
    shards = make_shards(1, schema=schema, tables=(*TABLES, countries))
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    shards.on("s1").execute("INSERT INTO public.countries VALUES ('de')")
    url = fresh_database(1)
    with connect(url) as connection:
        connection.execute(schema)
    killed_at(failpoint, "shard", "add", "two", url, "--yes")
    assert run(["shard", "add", "two", url, "--yes"]) == 0, capsys.readouterr().err
    with connect(url) as connection:
        assert connection.execute("SELECT code FROM public.countries").fetchall() == [("de",)]
    capsys.readouterr()
    assert run(["doctor"]) == 0, capsys.readouterr().out


def test_a_joining_that_waited_in_vain_is_told_from_a_shard(
    one: Shards,
    fresh_database: FreshDatabase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def waited(*args: object, **options: object) -> None:
        raise MoveWaiting("The fence of shard s1 could not be had.")

    monkeypatch.setattr("shardkit.storage.membership.join", waited)
    assert run(["shard", "add", "two", newcomer(fresh_database, 1), "--no-run"]) == 5
    told = capsys.readouterr().err
    assert "then run it again" in told
    assert "has joined" not in told


def test_the_first_shard_goes_on(
    fresh_database: FreshDatabase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = fresh_database(0)
    monkeypatch.setenv("SHARDKIT_CATALOG", fresh_database(0))
    monkeypatch.setenv(ALLOW_FSYNC_OFF, "1")
    assert run(["init"]) == 0
    killed_at("change.proposed", "shard", "add", "one", url)
    assert run(["shard", "add", "one", url]) == 0
    capsys.readouterr()
    assert run(["doctor"]) == 0, capsys.readouterr().out


def test_a_settled_joining_has_a_next_step(
    one: Shards, fresh_database: FreshDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    url = newcomer(fresh_database, 1)
    killed_at("change.proposed", "shard", "add", "two", url, "--yes")
    assert run(["rebalance", "resume"]) == 0
    assert "Next: `shardkit rebalance run`" in capsys.readouterr().out
