"""`shardkit verify` from outside: what it prints, its exit codes, and the question before anything is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkit.storage.connections import connect
from tests.acceptance.conftest import Program
from tests.fix_shards import MakeShards, Shards, fill


@pytest.fixture
def two(make_shards: MakeShards, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Two shards of which the first owns everything; their catalog is in the environment."""
    shards = make_shards(2)
    fill(shards.on("s1"), 100)
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    return shards


def test_from_right_to_wrong_and_back(two: Shards, call: Program, program: Program) -> None:
    right = call("verify").ok()
    assert right.out.endswith("Nothing to do.\n")
    assert "Right: 300 rows of topology" in right.out

    two.on("s2").execute(
        "INSERT INTO public.users VALUES (7, 'user 7'), (8, 'another'), (1000, 'nobody knows')"
    )
    wrong = call("verify")
    assert wrong.code == 4
    assert "WRONG s2, ownership: 3 rows of public.users stand here" in wrong.out
    for line in (
        "  public.users id=7, owner s1: the owner has the same row\n",
        "  public.users id=8, owner s1: the owner's row differs\n",
        "  public.users id=1000, owner s1: the owner has no such row\n",
    ):
        assert line in wrong.out

    call("verify", "--repair").failed(2, "stdin is no terminal", "--yes")
    assert two.on("s2").execute("SELECT count(*) FROM public.users").fetchone() == (3,)

    repaired = program("verify", "--repair", "--yes", "--json")
    assert repaired.code == 4
    assert "To be removed" in repaired.err
    assert "Removed from s2: 1 rows of public.users" in repaired.err
    document = repaired.document
    assert document["repaired"]["removed"] == [
        "s2: 1 rows of public.users that their owners have just the same"
    ]
    assert document["result"] == document["certificate"]["result"] == "wrong"
    (problem,) = document["problems"]
    assert (problem["subject"], problem["rows"], problem["repairable"]) == ("s2", 2, False)
    assert {key["row"]["id"]: key["state"] for key in problem["keys"]} == {8: "differs", 1000: "only here"}

    two.on("s2").execute("DELETE FROM public.users")
    document = call("verify", "--json").ok().document
    assert (document["result"], document["repaired"], document["next"]) == ("right", None, None)
    assert {
        "result", "certificate", "shards", "references", "homes", "moves", "problems", "undecided", "away",
        "repaired", "next",
    } == set(document)  # fmt: skip


def test_a_shard_that_does_not_answer(two: Shards, call: Program) -> None:
    """It is no proof of anything wrong: try again later."""
    database = two.on("s2").info.dbname
    two.on("s2").close()
    with connect(two.fresh_database(1)) as beside:
        beside.execute(f'ALTER DATABASE "{database}" WITH ALLOW_CONNECTIONS false'.encode())
        away = call("verify")
        beside.execute(f'ALTER DATABASE "{database}" WITH ALLOW_CONNECTIONS true'.encode())
    assert away.code == 5
    assert "Away: Shard s2 at " in away.out
    assert "Incomplete: " in away.out


def test_the_certificates_of_a_move(two: Shards, call: Program) -> None:
    call("rebalance", "certificate").failed(3, "There was no job yet")
    call("rebalance", "run", "--yes").ok()
    document = call("rebalance", "certificate", "--json").ok().document
    (entry,) = document["certificates"]
    assert (entry["source"], entry["target"], entry["phase"]) == ("s1", "s2", "done")
    found = entry["certificate"]
    assert (found["kind"], found["format"]) == ("move", 1)
    held = {
        f"public.{name}": len(two.rows(table)["s2"])
        for name, table in zip(("posts", "users"), two.tables, strict=True)
    }
    assert found["rows"] == held
    for table, sides in found["digests"].items():
        assert sides["source"] == sides["target"]
        assert (sides["source"]["rows"], int(sides["source"]["sum"]) != 0) == (held[table], True)
    assert found["chunks"] >= 2
    assert found["rounds"] >= 1
    assert (found["compared_again"], found["checked_in_cutover"]) == (0, 0)
    times = [found[name] for name in ("started_at", "verified_at", "checked_at", "decided_at")]
    assert times == sorted(times)
    with connect(two.catalog_url) as catalog:
        known = [list(row) for row in catalog.execute("SELECT version, digest FROM shardkit.topologies")]
    assert found["decided_by"] in known
    assert all(taken in known for taken in found["topology"].values())
    assert found["topology"]["source"][0] < found["decided_by"][0]

    number = str(entry["transfer"])
    assert call("rebalance", "certificate", number, "--json").ok().document == document
    shown = call("rebalance", "certificate", number).ok().out
    assert f"decided {found['decided_at']} by topology {found['decided_by'][0]}" in shown
    status = call("rebalance", "status", "--json").ok().document
    assert status["job"]["transfers"][0]["certificate"] == found
    call("rebalance", "certificate", "4711").failed(3, "There is no transfer 4711")


def test_a_planted_difference_stops_a_move_with_code_4(two: Shards, program: Program, call: Program) -> None:
    killed = program("rebalance", "run", "--yes", SHARDKIT_FAILPOINT="catching up.end")
    assert killed.code == -9
    two.on("s2").execute("UPDATE public.users SET n = 41 WHERE id = (SELECT min(id) FROM public.users)")
    (key,) = two.on("s2").execute("SELECT id FROM public.users WHERE n = 41").fetchone() or (0,)
    stopped = call("rebalance", "resume", "--json").failed(4, f"public.users id={key}", "rebalance resume")
    assert (stopped.document["error"], stopped.document["keys"]) == (
        "verification-failed",
        [f"public.users id={key}"],
    )
    assert call("rebalance", "status", "--json").ok().document["job"]["transfers"][0]["phase"] == "verifying"
    under_way = call("verify", "--json").ok().document
    assert [move["phase"] for move in under_way["moves"]] == ["verifying"]
    call("rebalance", "abort").ok()
    call("verify").ok()
    two.assert_clean()
