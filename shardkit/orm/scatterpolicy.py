"""Scatter policy: what a session does about statements that are not bound to keys.

Such a statement asks all shards, so it gets dearer with every shard that joins. A session, or one statement, can allow
it (the default), warn of it with the line of the application that sent it, or refuse it; and whoever listens is told of
each one, so that a test suite can assert that there is none (`shardkit.testing`). Driven by `orm.dispatch`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import sqlalchemy
from sqlalchemy import Executable

from shardkit.core.errors import ScatterRefused, UsageError

Policy = Literal["allow", "warn", "refuse"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

SCATTER = "scatter"
"""Execution option: the policy for one statement."""

_INSIDE = tuple(str(Path(module).parent) for module in (sqlalchemy.__file__, __file__))


class ScatterWarning(UserWarning):
    """A statement was sent to all shards."""


@dataclass(frozen=True, slots=True)
class Scattered:
    """A statement that was sent to all shards, and the line of the application that sent it."""

    statement: Executable
    reason: str
    file: str
    line: int

    def __str__(self) -> str:
        text = " ".join(str(self.statement).split())
        return f"{self.file}:{self.line}: {self.reason}: {text}"


listeners: list[Callable[[Scattered], None]] = []
"""Told of each statement that is sent to all shards, whatever the policy; for `shardkit.testing`."""


def check_policy(policy: Any) -> Policy:
    """The policy; `UsageError` if it is none."""
    for known in POLICIES:
        if policy == known:
            return known
    raise UsageError(
        f"{policy!r} is no policy for statements that ask all shards.",
        hint=f"It is {' or '.join(map(repr, POLICIES))}.",
    )


def met(statement: Executable, reason: str, policy: Any) -> None:
    """A statement is about to be sent to all shards; `ScatterRefused` if it may not."""
    policy = check_policy(policy)
    if policy == "allow" and not listeners:
        return
    file, line = _caller()
    scattered = Scattered(statement, reason, file, line)
    for listener in listeners:
        listener(scattered)
    if policy == "refuse":
        raise ScatterRefused(
            f"This statement asks all shards: {reason} ({file}:{line}).",
            hint="Bind it to a shard key, or give it the execution option scatter='allow'.",
            reason="scatter",
            file=file,
            line=line,
        )
    if policy == "warn":
        warnings.warn_explicit(f"asks all shards: {scattered}", ScatterWarning, file, line)


def _caller() -> tuple[str, int]:
    """File and line of the innermost frame that is neither SQLAlchemy's nor ours."""
    for frame in _frames():
        file = frame.f_code.co_filename
        if not file.startswith(_INSIDE) and not file.startswith("lib/sqlalchemy"):
            return file, frame.f_lineno
    return "<unknown>", 0


def _frames() -> Iterator[FrameType]:
    """The frames of the caller; where an async session runs us in a greenlet, those of its task too."""
    frame: FrameType | None = sys._getframe(2)
    yield from _outwards(frame)
    greenlet = sys.modules.get("greenlet")
    current: Any = None if greenlet is None else greenlet.getcurrent()
    while current is not None and current.parent is not None:
        current = current.parent
        yield from _outwards(current.gr_frame)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
