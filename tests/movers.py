"""Movers in processes of their own, killed and stopped at named points.

``python -m tests.movers`` imports everything once and forks a mover for each order it reads, a JSON object a line; a
mover then costs some milliseconds. `Movers` is the other end. A forked mover is what the command runs: it stops by
SIGINT and SIGTERM between two steps, and ends with the exit code of its error.

`run_forked` is for tests that want one process after the other, and no more of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import pytest

LOCKED_ROWS = 150
"""Rows of a locked step."""
STOPPED = "stopped"
FORKED_SECONDS = 120.0
REFUSED, RETRY_LATER = 3, 5
"""Exit codes: a move cannot go on as things are; stopped by the operator, or something is away."""


class Movers:
    """Starts one mover at a time; a context manager that ends the process. ``environment`` is that of the movers."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._said = folder / "mover.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.movers"],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid: int | None = None
        self.code: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._process.communicate()

    def start(
        self,
        act: str,
        catalog: str,
        *,
        point: str = "",
        weights: Mapping[int, int] | None = None,
        mode: str = "auto",
        patience: float = 30.0,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Fork a mover that does a ``move`` to some weights, if there is no job yet, or ``keep`` its sources, a
        ``rollback``, a ``finalize``, a ``resume`` or an ``abort``, with a point armed; or a ``command`` of the program,
        with its arguments; or ``call`` a function, "MODULE:NAME" and its arguments, for an exit code. ``environment``
        is what it has beside that of all."""
        assert self.pid is None, "one at a time"
        order = {
            "act": act, "catalog": catalog, "point": point, "weights": weights, "mode": mode, "patience": patience,
            "arguments": arguments, "environment": dict(environment or {}),
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**order, "said": str(self._said)}) + "\n")
        self._process.stdin.flush()
        self.code = None
        self.pid = self._answer()["pid"]

    def wait(self) -> str | int:
        """`STOPPED`, or the exit code (negative: the signal) of the mover that was started."""
        answer = self._answer()
        if STOPPED in answer:
            return STOPPED
        self.pid = None
        self.code = int(answer["code"])
        return self.code

    def signal(self, number: int) -> None:
        """Send a signal to the mover."""
        assert self.pid is not None
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End the mover, if there is one, at once."""
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            while self.wait() == STOPPED:
                pass

    @property
    def said(self) -> str:
        """What the last mover wrote to its stderr."""
        return self._said.read_text(errors="replace")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks movers has died"
        answer: dict[str, Any] = json.loads(line)
        return answer


@cache
def _shared() -> tuple[Movers, TemporaryDirectory[str]]:
    """One for all tests of this process; it ends with it."""
    folder = TemporaryDirectory(prefix="shardkit-movers-")
    return Movers(Path(folder.name), {}), folder


def run_forked(act: str, catalog: str, point: str = "", **options: Any) -> int:
    """A mover, or a command, under the environment of this process: -SIGKILL if it was killed at its point, else 0;
    fails with what it said if it ended otherwise."""
    movers, _ = _shared()
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("SHARDKIT_", "PG")) and name != "SHARDKIT_FAILPOINT"
    }
    movers.start(act, catalog, point=point, environment=variables, **options)
    late = threading.Timer(FORKED_SECONDS, movers.signal, [signal.SIGKILL])
    late.start()
    try:
        code = movers.wait()
    finally:
        late.cancel()
    if code not in (0, -signal.SIGKILL):
        pytest.fail(f"{act} ended with {code}: {movers.said}")
    return int(code)


# --- the process that forks ------------------------------------------------------------------------------------------


def _main() -> None:
    # Before a fork, so that each mover has it already. (Nothing of it may start a thread.)
    import shardkit.cli.app
    import shardkit.cli.failures
    import shardkit.cli.running
    import shardkit.rebalance.mover  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(order)
        _tell(pid=pid)
        while True:
            _, status = os.waitpid(pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                break
            _tell(stopped=True)
        _tell(code=os.waitstatus_to_exitcode(status))


def _tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _become(order: Mapping[str, Any]) -> None:
    code = 1
    try:
        said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.update(order["environment"])
        code = {"command": _command, "call": _call}.get(order["act"], _carry)(order)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _command(order: Mapping[str, Any]) -> int:
    from shardkit.cli.app import run
    from shardkit.storage import failpoints

    os.environ["SHARDKIT_CATALOG"] = order["catalog"]
    failpoints.arm(order["point"])
    return run(order["arguments"])


def _call(order: Mapping[str, Any]) -> int:
    from shardkit.storage import failpoints

    function, *arguments = order["arguments"]
    call: Callable[..., int] = resolve_name(function)
    failpoints.arm(order["point"])
    return call(*arguments)


def _carry(order: Mapping[str, Any]) -> int:
    from shardkit.cli.failures import understood
    from shardkit.cli.running import carry
    from shardkit.core.move import Mode
    from shardkit.rebalance import locked
    from shardkit.rebalance.mover import Mover
    from shardkit.storage import failpoints
    from shardkit.storage.catalog import Job

    def act(mover: Mover) -> Job:
        what = order["act"]
        if what in ("move", "keep") and mover.catalog.running_job() is None:
            weights = {int(shard): weight for shard, weight in (order["weights"] or {}).items()}
            mover.start("rebalance", weights or None, Mode(order["mode"]), keep_source=what == "keep")
        others = {"abort": mover.abort, "rollback": mover.rollback, "finalize": mover.finalize}
        return others.get(what, mover.run)()

    locked.ROWS_A_STEP = LOCKED_ROWS  # several steps, in the small tables of tests
    failpoints.arm(order["point"])
    began = time.monotonic()
    try:
        carry(order["catalog"], act, parallel=2, patience=order["patience"])
    except Exception as error:
        traceback.print_exc()
        known = understood(error)
        print(f"{time.monotonic() - began:.2f} s: {known.code}: {known}", file=sys.stderr)
        return known.exit_code
    return 0


if __name__ == "__main__":
    _main()
