"""`shardkit demo`: real servers, a workload, a shard added while it runs, and the check of every write."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from shardkit.core.errors import DemoFailed, UsageError

from .output import narrate, narration_console, result_console, show, wants_json

STDOUT = "-"
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Users = Annotated[
    int, typer.Option("--users", envvar="SHARDKIT_DEMO_USERS", help="Users to begin with, each with posts.")
]
Clients = Annotated[
    int,
    typer.Option(
        "--clients",
        envvar="SHARDKIT_DEMO_CLIENTS",
        help="Client processes; the last of several is asynchronous.",
    ),
]
Seconds = Annotated[
    float,
    typer.Option(
        "--seconds",
        envvar="SHARDKIT_DEMO_SECONDS",
        help="How long the clients work before and after the move, together.",
    ),
]
KillMover = Annotated[
    list[str] | None,
    typer.Option(
        "--kill-mover",
        metavar="copy|purge",
        help="Kill the mover with SIGKILL there and let `rebalance resume` go on; can be repeated.",
    ),
]
Reweight = Annotated[
    bool,
    typer.Option(
        "--reweight", envvar="SHARDKIT_DEMO_REWEIGHT", help="Then give another shard twice its weight."
    ),
]
Remove = Annotated[
    bool,
    typer.Option("--remove", envvar="SHARDKIT_DEMO_REMOVE", help="Then remove one of the first shards."),
]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="PATH", help="Write the result there as JSON; `-` is stdout."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    users: Users = 5000,
    clients: Clients = 3,
    seconds: Seconds = 20.0,
    kill_mover: KillMover = None,
    reweight: Reweight = False,
    remove: Remove = False,
    json_to: Json = None,
) -> None:
    """Add a shard while several processes read and write, then check every write that was acknowledged.

    With --reweight and --remove it changes a weight and removes a shard after that, while they go on.

    Starts three real PostgreSQL servers of its own; nothing of them is left afterwards. Ends with status 0 only if
    every check holds, 4 otherwise.
    """
    # Here, as the command line must work where servers cannot be started.
    from shardkit.dev.demo import Demo, Narrator, Options

    target = json_to or (STDOUT if wants_json(()) else None)
    if target not in (None, STDOUT):
        _refuse_unwritable(Path(str(target)))
    options = Options(users, clients, seconds, tuple(kill_mover or ()), reweight=reweight, remove=remove)
    with _interruptible(), Demo(options, Narrator(narration_console())) as running:
        report = running.run()
    document = report.as_dict()
    if target == STDOUT:
        report.draw(narration_console())
        show(document, True, report.draw)
    else:
        report.draw(result_console())
        if target is not None:
            Path(target).write_text(
                json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    try:
        report.raise_if_failed()
    except DemoFailed as error:
        # The result is one document, and it is printed: the error goes to stderr alone.
        narrate(f"error: {error}")
        raise typer.Exit(error.exit_code) from error


def _refuse_unwritable(path: Path) -> None:
    """`UsageError` before minutes of work rather than after."""
    try:
        path.open("a").close()
    except OSError as error:
        raise UsageError(f"The result cannot be written to {path}: {error.strerror}.") from error


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, and what else ends a program, end the block in order, and then the program. A second one does not disturb
    the clean-up."""

    def on_signal(number: int, frame: FrameType | None) -> Any:
        for other in _ENDING:
            signal.signal(other, signal.SIG_IGN)
        narrate("stopping: the clients, the mover and the servers end")
        raise _Stopped(number)

    before = {number: signal.signal(number, on_signal) for number in _ENDING}
    try:
        yield
    except _Stopped as stopped:
        raise typer.Exit(128 + stopped.number) from stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stopped(BaseException):
    """A signal ended the demo; no `except Exception` on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
