"""The demo as a newcomer runs it: it passes, it survives killed movers, it fails when it must, it leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shardkit.core.errors import DemoFailed
from shardkit.dev.demo import Demo, Narrator, Options
from shardkit.dev.demo.children import ClientProcess
from shardkit.dev.demo.outcome import Move, Outcome
from shardkit.storage.connections import connect
from tests.acceptance.conftest import Program, Running

SMALL = ("--users", "150", "--clients", "2", "--seconds", "1")


def assert_passed(document: Any) -> None:
    """The numbers of a demo in which everything held."""
    assert document["passed"] is True
    assert not [check for check in document["checks"] if not check["held"]]
    assert {document[kind] for kind in ("errors", "lost", "doubled", "stale")} == {0}
    assert document["operations"] > 0
    assert document["positions_moved"] == document["positions_minimum"] > 0
    assert set(document["rows_before"]) == set(document["rows_after"]) == {"s1", "s2", "s3"}
    for shard, tables in document["rows_after"].items():
        assert set(tables) == {"users", "posts", "comments", "likes"}
        assert all(count > 0 for count in tables.values()), shard
    assert sum(document["rows_before"]["s3"].values()) == 0
    assert set(document["latency_ms"]) == {"before", "during", "after"}
    for latency in document["latency_ms"].values():
        assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
    assert len(document["cutover_pause_ms"]) == 2
    assert all(pause > 0 for pause in document["cutover_pause_ms"])
    assert document["rows_copied"] > 0
    assert document["copy_seconds"] > 0


def test_the_demo_passes(program: Program, tmp_path: Path) -> None:
    done = program("demo", *SMALL, "--json", str(tmp_path / "out.json")).ok()
    assert_passed(json.loads((tmp_path / "out.json").read_text()))
    assert "FAIL" not in done.out
    assert re.search(r"s3 +0 → [1-9]", done.out)
    assert "s1  33.33% in 1 arc" in done.out
    assert "$ shardkit shard add s3 " in done.err


def test_a_shard_added_under_kills_one_weighed_otherwise_and_one_removed(program: Program) -> None:
    kills = ("--kill-mover", "copy", "--kill-mover", "purge")
    done = program("demo", *SMALL, *kills, "--reweight", "--remove", "--json", "-").ok()
    document = done.document
    assert document["passed"] is True
    assert document["movers_killed"] == ["copy", "purge"]
    assert {document[kind] for kind in ("errors", "lost", "doubled", "stale")} == {0}
    assert [change["change"] for change in document["changes"]] == [
        "add shard s3",
        "reweight s1=200",
        "remove s2",
    ]
    for change in document["changes"]:
        assert change["positions_moved"] == change["positions_minimum"] > 0
        assert change["rows_copied"] > 0
        assert all(pause > 0 for pause in change["cutover_pause_ms"])
    assert document["positions_moved"] == sum(change["positions_moved"] for change in document["changes"])
    assert sum(document["rows_after"]["s2"].values()) == 0 < sum(document["rows_before"]["s2"].values())
    assert "remove s2:" in done.err


def test_wrong_options_start_nothing(program: Program, tmp_path: Path) -> None:
    program("demo", "--kill-mover", "lunch").failed(2, "copy, purge")
    program("demo", "--users", "3").failed(2, "users")
    program("demo", *SMALL, "--json", str(tmp_path / "missing" / "out.json")).failed(2, "cannot be written")


# --- a demo that must fail --------------------------------------------------------------------------------------


class Sabotaged(Demo):
    """A demo in whose shards somebody does all that a broken move could, after the clients have ended."""

    def _outcome(self, started: Sequence[ClientProcess], move: Move) -> Outcome:
        s1, s2, s3 = (connect(shard.url) for shard in move.after.shards)
        with s1, s2, s3:
            likes = s1.execute("SELECT min(owner_id) FROM public.likes").fetchone()
            assert s1.execute("DELETE FROM public.likes WHERE owner_id = %s", likes).rowcount > 0
            s3.execute("UPDATE public.users SET bio = 'old' WHERE id = (SELECT max(id) FROM public.users)")
            s3.execute("UPDATE public.users SET revision = -1 WHERE id = (SELECT min(id) FROM public.users)")
            copied = s3.execute("SELECT * FROM public.users ORDER BY id LIMIT 1 OFFSET 1").fetchone()
            s2.execute("INSERT INTO public.users VALUES (%s, %s, %s, %s, %s)", copied)
            s2.execute("INSERT INTO public.users VALUES (1000000, '', '', 0, 0)")
            s2.execute("CREATE PUBLICATION forgotten")
        return super()._outcome(started, move)


def test_the_demo_finds_what_is_wrong(folder: Path) -> None:
    with Sabotaged(Options(users=150, clients=2, seconds=1), Narrator(Console(stderr=True))) as demo:
        report = demo.run()
    document = report.as_dict()
    assert document["lost"] > 0
    assert document["doubled"] == 1
    assert document["stale"] == 2
    assert document["unwritten"] == 1
    assert document["misplaced"] >= 1
    assert document["left_over"] == 1
    assert document["errors"] == 0
    with pytest.raises(DemoFailed):
        report.raise_if_failed()


# --- a demo that ends early -------------------------------------------------------------------------------------


def descendants(pid: int) -> dict[int, str]:
    """Processes below a process, by pid: the time each was started, which tells a pid used again."""
    parents = {}
    started = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)], started[int(entry.name)] = int(fields[1]), fields[19]
    found: dict[int, str] = {}
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found |= {child: started[child] for child in level}
    return found


def is_alive(pid: int, started: str) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[19] == started and fields[0] != "Z"


def folders(pid: int) -> list[Path]:
    """The temporary folders that a demo has locked."""
    held = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return [Path(name).parent for name in held if re.search(r"/shardkit-pg-\w+/lock$", name)]


def assert_gone(processes: dict[int, str]) -> None:
    deadline = time.monotonic() + 20
    while left := [pid for pid, started in processes.items() if is_alive(pid, started)]:
        assert time.monotonic() < deadline, f"still alive: {left}"
        time.sleep(0.01)


@pytest.fixture
def working(start: Callable[..., Running]) -> Callable[[], tuple[Running, dict[int, str], list[Path]]]:
    """A demo whose clients work and whose mover runs, its processes and its folders."""

    def begin() -> tuple[Running, dict[int, str], list[Path]]:
        demo = start("demo", "--users", "150", "--clients", "2", "--seconds", "2")
        demo.wait_for("Copying the rows of the arcs")
        pid = demo.process.pid
        return demo, descendants(pid), folders(pid)

    return begin


def test_a_stopped_demo_leaves_nothing(
    working: Callable[[], tuple[Running, dict[int, str], list[Path]]],
) -> None:
    demo, processes, made = working()
    assert len(processes) > 10, "servers, clients, a mover"
    assert len(made) >= 2
    ended = demo.end(signal.SIGINT)
    assert ended.code == 128 + signal.SIGINT
    assert "Traceback" not in ended.err
    assert_gone(processes)
    assert not [folder for folder in made if folder.exists()]


def test_what_a_killed_demo_leaves_goes_at_the_next_start(
    working: Callable[[], tuple[Running, dict[int, str], list[Path]]],
) -> None:
    demo, processes, made = working()
    demo.end(signal.SIGKILL)
    assert_gone(processes)
    subprocess.run([sys.executable, "-c", "from shardkit.dev import Cluster; Cluster().close()"], check=True)
    assert not [folder for folder in made if folder.exists()]
