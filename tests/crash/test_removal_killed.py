"""`shard remove` killed with SIGKILL at every step: the same command goes on, and so does `rebalance resume`."""

from __future__ import annotations

import pytest

from shardkit.cli.app import run
from shardkit.core.topology import ReferenceTable
from shardkit.storage.catalog import Catalog
from shardkit.storage.claims import read
from shardkit.storage.connections import connect
from tests.crash.test_joining_killed import killed_at
from tests.fix_shards import SCHEMA, TABLES, FencedWriter, MakeShards, Shards, fill

COUNTRIES = ReferenceTable("public", "countries")
USERS = 200


@pytest.fixture
def two(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Two shards, the second with nothing, and a reference table."""
    schema = SCHEMA + "CREATE TABLE public.countries (code text PRIMARY KEY);"
    shards = make_shards(2, schema=schema, tables=(*TABLES, COUNTRIES))
    shards.tables = TABLES
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    for name in ("s1", "s2"):
        shards.on(name).execute("INSERT INTO public.countries VALUES ('de')")
    return shards


USUAL = [
    ("placement.recorded", "remove"),
    ("change.proposed:2", "resume"),
    ("leave.closed", "remove"),
    ("change.decided:2", "resume"),
]
REST = [
    ("change.proposed:1", "remove"),
    ("change.recorded:1", "remove"),
    ("placement.recorded", "resume"),
    ("change.proposed:2", "remove"),
    ("leave.closed", "resume"),
    ("change.decided:2", "remove"),
    ("change.opened", "resume"),
    ("change.opened", "remove"),
    ("change.recorded:2", "remove"),
]


def test_a_shard_that_owns_nothing(two: Shards, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kill leaves something that one of both commands ends; then the database is the next shard."""
    killed_and_gone_on(two, capsys, USUAL)


@pytest.mark.slow
def test_a_shard_that_owns_nothing_at_every_other_point(
    two: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_and_gone_on(two, capsys, REST)


def killed_and_gone_on(
    two: Shards, capsys: pytest.CaptureFixture[str], points: list[tuple[str, str]]
) -> None:
    url = two.topology().named("s2").url
    for number, (failpoint, way) in enumerate(points, start=1):
        killed_at(failpoint, "shard", "remove", "s2", "--yes")
        capsys.readouterr()
        goes_on = ["rebalance", "resume"] if way == "resume" else ["shard", "remove", "s2", "--yes"]
        assert run(goes_on) == 0, (failpoint, way, capsys.readouterr())
        assert [shard.name for shard in two.topology().shards] == ["s1"], (failpoint, way)
        capsys.readouterr()
        assert run(["doctor"]) == 0, (failpoint, way, capsys.readouterr().out)
        assert run(["shard", "add", "s2", url, "--no-run"]) == 0, capsys.readouterr()
        assert two.topology().named("s2").id == number + 1, "numbers are not given out again"
    with connect(url) as connection:
        claim = read(connection)
        assert connection.execute("SELECT code FROM public.countries").fetchall() == [("de",)]
    assert claim is not None
    assert claim.shard_id == len(points) + 1


def test_a_claim_of_one_that_left_and_never_came_again_is_found(
    two: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    url = two.topology().named("s2").url
    assert run(["shard", "remove", "s2", "--yes"]) == 0
    killed_at("join.claimed", "shard", "add", "again", url, "--no-run")
    capsys.readouterr()
    assert run(["doctor"]) == 3
    assert "was claimed for shard again, which never joined" in capsys.readouterr().out
    assert run(["shard", "add", "again", url, "--no-run"]) == 0
    capsys.readouterr()
    assert run(["doctor"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("failpoint", "goes_on"),
    [
        ("placement.recorded", ["rebalance", "run", "--yes"]),
        ("copying.poll", ["shard", "remove", "s2", "--yes"]),
        pytest.param("opening.commit:2", ["shard", "remove", "s2", "--yes"], marks=pytest.mark.slow),
        pytest.param("leave.closed", ["rebalance", "resume"], marks=pytest.mark.slow),
    ],
)
def test_a_shard_with_rows_under_writers(
    two: Shards, capsys: pytest.CaptureFixture[str], failpoint: str, goes_on: list[str]
) -> None:
    fill(two.on("s1"), USERS)
    two.move()
    writers = [FencedWriter(two, number, 2, USERS) for number in range(2)]
    for writer in writers:
        writer.start()
    try:
        killed_at(failpoint, "shard", "remove", "s2", "--yes")
        assert run(goes_on) == 0, capsys.readouterr()
        left = two.topology()
    finally:
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join()
    assert [shard.name for shard in left.shards] == ["s1"]
    for writer in writers:
        writer.check()
    two.assert_clean()
    with Catalog.open(two.catalog_url) as catalog:
        assert catalog.shards_ever() == {0: "s1", 1: "s2"}
