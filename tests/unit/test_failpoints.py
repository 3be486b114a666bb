"""Failpoints: inert unless armed, and all that the code passes are named in one place."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardkit
from shardkit.core.move import Phase
from shardkit.storage import failpoints

PACKAGE = Path(shardkit.__file__).parent
PHASE = re.compile(r"f'\{(self|run|self\._run)\.row\.phase\.value\}(.*)'")
"""What the names of the phases' own points are made of."""
PROGRAM = """
from shardkit.storage.failpoints import failpoint
for _ in range(3):
    failpoint("change.proposed")
    print("passed", flush=True)
"""


def points_of(source: str) -> Iterator[str]:
    """Every name that a module passes; a step's two."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name == "failpoint":
            yield from names(node.args[0])
        steps: list[ast.expr] = []
        if name == "writing":
            steps = [argument for argument in node.args if isinstance(argument, ast.Constant)]
        elif name == "transaction":
            steps = [keyword.value for keyword in node.keywords if keyword.arg == "step"]
        for step in steps:
            if not isinstance(step, ast.Name):  # passed on, and named by the caller
                yield from (f"{found}.{edge}" for found in names(step) for edge in ("commit", "committed"))


def names(argument: ast.expr) -> list[str]:
    if isinstance(argument, ast.Constant):
        return [str(argument.value)]
    made = PHASE.fullmatch(ast.unparse(argument))
    assert made, f"the registry cannot be compared with {ast.unparse(argument)}"
    return [point for phase in Phase if (point := phase.value + made[2]) in failpoints.POINTS]


def test_every_point_in_the_code_is_registered_and_the_other_way_round() -> None:
    found = {
        point
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("failpoints.py", "connections.py")
        for point in points_of(path.read_text())
    }
    assert found == failpoints.POINTS


@pytest.mark.parametrize(
    ("armed", "times"), [("change.proposed", 0), ("change.proposed:3", 2), ("", 3), ("other", 3)]
)
def test_the_armed_point_kills(armed: str, times: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"SHARDKIT_FAILPOINT": armed}, capture_output=True, text=True
    )
    assert done.stdout.count("passed") == times, done.stderr
    assert done.returncode == (0 if times == 3 else -signal.SIGKILL)


def test_a_process_can_be_stopped_and_go_on() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={"SHARDKIT_FAILPOINT": "change.proposed:2=stop"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        # Not by Popen, which would take a stopped process for one that has ended.
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.read().count("passed") == 3
        assert process.wait() == 0
