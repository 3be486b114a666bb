"""What clients did, as they record it: one JSON array a line.

A write is recorded twice: before it is sent, and when it is known what became of it. So what a client was doing when
it was killed is known: its outcome is *unknown*. Times are nanoseconds of the machine's monotonic clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

WIDTH = 9
"""Characters of a token; each is made once in a history. An increment's begins with "i"."""


class Kind(StrEnum):
    """What an operation does: with one row, or (the last two) with all rows of a band."""

    READ = "read"
    WRITE = "write"
    INSERT = "insert"
    DELETE = "delete"
    COUNT = "count"
    LIST = "list"


class Outcome(StrEnum):
    """What is known of an operation: done, certainly not done, or neither."""

    DONE = "done"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Row(NamedTuple):
    """What a row holds: the time at which it was inserted, the number of its writes with that one, of its increments,
    and the tokens of its last writes, joined by spaces."""

    born: int
    version: int
    n: int
    tail: str

    def tokens(self) -> list[str]:
        """Tokens of the last writes, the oldest first; one that was cut off is left out."""
        return [token for token in self.tail.split(" ") if len(token) == WIDTH]


class Operation(NamedTuple):
    """One operation. ``row`` is what was read, or what the write left behind, or what was deleted; None: no row.

    ``token`` names a write. ``born`` is that of the row that an INSERT makes or a DELETE is to delete. ``key`` is the
    band of a COUNT or LIST, ``keys`` what a LIST returned, and ``rows`` their number.
    """

    kind: Kind
    key: int
    began: int
    ended: int | None
    outcome: Outcome
    token: str = ""
    born: int = 0
    row: Row | None = None
    keys: tuple[int, ...] = ()
    rows: int = 0


def line(operation: Operation) -> bytes:
    """The operation as a line."""
    return json.dumps(operation, separators=(",", ":")).encode() + b"\n"


def parse(text: str | bytes) -> Operation:
    """The inverse of `line`."""
    kind, key, began, ended, outcome, token, born, row, keys, rows = json.loads(text)
    return Operation(
        Kind(kind), key, began, ended, Outcome(outcome), token, born,
        Row(*row) if row is not None else None, tuple(keys), rows,
    )  # fmt: skip


def load(paths: Sequence[Path]) -> list[Operation]:
    """The history of some files; what was begun and never ended is unknown."""
    return [operation for path in paths for operation in _load(path)]


def _load(path: Path) -> Iterator[Operation]:
    """Of several tasks of one process, whose operations are told apart by kind, key and beginning."""
    open_: dict[tuple[Kind, int, int], Operation] = {}
    for text in path.read_bytes().splitlines(keepends=True):
        if not text.endswith(b"\n"):
            break  # killed while it wrote; nothing was sent yet, or it is unknown
        operation = parse(text)
        identity = (operation.kind, operation.key, operation.began)
        if operation.ended is None and operation.outcome is Outcome.UNKNOWN and identity not in open_:
            open_[identity] = operation
            continue
        open_.pop(identity, None)
        yield operation
    yield from open_.values()
