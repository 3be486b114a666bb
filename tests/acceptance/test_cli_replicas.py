"""`shardkit shard replica`, and what `shard list` and `doctor` say of replicas."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from shardkit.dev import Standby
from tests.acceptance.conftest import Program
from tests.fix_postgres import NewCluster


def test_a_replica_is_listed_looked_at_and_taken_off(
    new_cluster: NewCluster, folder: Path, call: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary = new_cluster()
    monkeypatch.setenv("SHARDKIT_CATALOG", primary.create_database("catalog"))
    call("init").ok()
    call("shard", "add", "one", primary.create_database("one")).ok()
    call("shard", "add", "two", primary.create_database("two"), "--no-run").ok()
    with Standby(primary) as standby:
        url = standby.url("one")
        added = call("shard", "replica", "one", url, "--json").ok().document
        assert added["shard"] == "one"
        (listed,) = added["replicas"]
        assert call("shard", "replica", "one", url, "--json").ok().document["version"] == added["version"]
        shards = call("shard", "list", "--json").ok().document["shards"]
        assert [shard["replicas"] for shard in shards] == [[listed], []]
        assert f"replica {listed}" in call("shard", "list").ok().out

        call("shard", "replica", "two", url).failed(3, "is shard 'one'")
        call("shard", "replica", "two", primary.url("two") + "&application_name=x").failed(3, "no standby")
        call("shard", "replica", "three", url).failed(3, "There is no shard 'three'")
        call("shard", "replica", "two", url, "--remove").failed(3, "lists no replica")
        call("shard", "replica", "one", "postgresql://host").failed(2, "names no database")

        standby.catch_up()
        (found,) = [each for each in _findings(call) if each["check"] == "replica"]
        assert (found["subject"], found["level"]) == ("one", "ok")
        assert "bytes behind" in found["detail"]
        standby.pause()
        with psycopg.connect(primary.conninfo("one")) as connection:
            connection.execute("CREATE TABLE public.filler AS SELECT generate_series(1, 10000) AS n")
        (found,) = [each for each in _findings(call) if each["check"] == "replica"]
        assert int(found["detail"].split(", ")[1].split()[0].replace(",", "")) > 10_000

        standby.stop()
        (found,) = [each for each in _findings(call) if each["check"] == "replica"]
        assert found["level"] == "problem"
        assert "--remove" in found["next"]
        call("shard", "replica", "two", standby.url("two")).failed(5, "does not answer")
        assert call("shard", "replica", "one", url, "--remove", "--json").ok().document["replicas"] == []
        assert not [each for each in _findings(call) if each["check"] == "replica"]


def _findings(call: Program) -> list[dict[str, str]]:
    found: list[dict[str, str]] = call("doctor", "--json").document["findings"]
    return found
