"""The demo's child processes: clients and commands. None of them outlives the demo, however it ends.

The kernel kills them with the demo (Linux); where it does not, a client ends with its stdin. They are in sessions of
their own, as Ctrl-C is the demo's to handle.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.core.errors import DemoFailed
from shardkit.dev.processes import launcher

from .client import Configuration
from .outcome import ClientReport

SHARDKIT = (sys.executable, "-m", "shardkit")
"""The program `shardkit` of this interpreter, wherever its script is installed."""
_ENDING = 60.0
"""Seconds that a client may take to end what it is doing."""
_TAIL = 2000


@contextmanager
def children_environment(passfile: Path, catalog: str) -> Iterator[None]:
    """The environment of this process and its children: the demo's servers and catalog, nothing of the user's own."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("PG", "SHARDKIT_")) and name != "SHARDKIT_RING":
            del os.environ[name]
    os.environ["PGPASSFILE"] = str(passfile)
    os.environ["SHARDKIT_CATALOG"] = catalog
    # Servers of a demo need not survive a power cut; the mover asks to be told so.
    os.environ["SHARDKIT_ALLOW_FSYNC_OFF"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit status (negative: the signal that killed it), its output, the seconds it took."""

    status: int
    output: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL


def command(*arguments: str, extra: Mapping[str, str] | None = None, quiet: bool = False) -> Ended:
    """Run `shardkit ARGUMENTS` to its end; its stderr is ours, or if ``quiet`` part of the output."""
    began = time.monotonic()
    process = subprocess.Popen(
        launcher(None, signal.SIGKILL, *SHARDKIT, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        env={**os.environ, **(extra or {})},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    finally:
        process.kill()
        process.wait()
    return Ended(process.returncode, output, time.monotonic() - began)


class ClientProcess:
    """A client process, from its start to the report it ends with."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.operations = 0
        self.errors = 0
        self.report: ClientReport | None = None
        self._log = Path(configuration.folder, f"client-{configuration.number}.log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                launcher(
                    None,
                    signal.SIGKILL,
                    sys.executable,
                    "-m",
                    "shardkit.dev.demo",
                    configuration.dump(),
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._told: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            self.operations = told.get("operations", self.operations)
            self.errors = told.get("errors", self.errors)
            if told["event"] != "progress":
                self._told.put(told)
        self._told.put(None)

    def say(self, word: str) -> None:
        """Send a word; one that is dead does not hear it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()

    def wait_loaded(self) -> None:
        """Wait until its rows are loaded; `DemoFailed` if it ends before."""
        if self._told.get() is None:
            raise DemoFailed(f"Client {self.configuration.number} ended while it loaded:\n{self.log_tail()}")

    def wait_done(self, deadline: float) -> None:
        """Wait for its report, until a time of the monotonic clock; ``report`` stays None if none comes."""
        with suppress(queue.Empty):
            told = self._told.get(timeout=max(0.0, deadline - time.monotonic()))
            if told is not None:
                self.report = ClientReport(**{name: told[name] for name in told if name != "event"})

    def log_tail(self) -> str:
        """The end of what it wrote on stderr."""
        return self._log.read_text(errors="replace").strip()[-_TAIL:] or "(it wrote nothing)"

    def close(self) -> None:
        """End it if it lives."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


@contextmanager
def clients(configurations: Sequence[Configuration]) -> Iterator[list[ClientProcess]]:
    """Client processes that are ended with the block."""
    started: list[ClientProcess] = []
    try:
        for configuration in configurations:
            started.append(ClientProcess(configuration))  # noqa: PERF401 - those made are closed if the next one fails
        yield started
    finally:
        for client in started:
            client.close()


def stop(started: Sequence[ClientProcess]) -> None:
    """Tell all clients to end, and take their reports."""
    for client in started:
        client.say("stop")
    deadline = time.monotonic() + _ENDING
    for client in started:
        client.wait_done(deadline)
