"""The ledger: on disk, every write that was acknowledged to a client, in the order of the acknowledgements.

A client appends after COMMIT has returned; the end check replays the ledgers of all clients and knows what the shards
must hold. A commit whose outcome is unknown is kept too: either state is right then. One line a transaction.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from .book import Change
from .content import Key

_ACKNOWLEDGED = "+"
_UNKNOWN = "?"


class Ledger:
    """The ledger of one client, open for appending; a context manager that closes it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def acknowledged(self, changes: Sequence[Change]) -> None:
        """A transaction with these changes was committed."""
        self._write(_ACKNOWLEDGED, changes)

    def unknown(self, changes: Sequence[Change]) -> None:
        """Whether a transaction with these changes was committed is not known."""
        self._write(_UNKNOWN, changes)

    def _write(self, mark: str, changes: Sequence[Change]) -> None:
        if changes:
            self._file.write(json.dumps([mark, changes], separators=(",", ":")) + "\n")


@dataclass
class Expected:
    """What the shards must hold.

    ``rows[table][key]`` is the last acknowledged revision, None for a deletion; ``unknown[table, key]`` holds what
    may stand there instead.
    """

    rows: dict[str, dict[Key, int | None]] = field(default_factory=dict)
    unknown: dict[tuple[str, Key], set[int | None]] = field(default_factory=dict)
    writes: int = 0

    def replay(self, lines: Iterable[str]) -> None:
        """Take in one ledger. Ledgers of different clients have no key in common, so their order does not matter."""
        for line in lines:
            mark, changes = json.loads(line)
            for table, parts, revision in changes:
                key = tuple(parts)
                if mark == _UNKNOWN:
                    self.unknown.setdefault((table, key), set()).add(revision)
                else:
                    self.rows.setdefault(table, {})[key] = revision
                    self.unknown.pop((table, key), None)
                    self.writes += 1

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Self:
        """Replay the ledgers of these files."""
        expected = cls()
        for path in paths:
            with path.open(encoding="utf-8") as lines:
                expected.replay(lines)
        return expected

    def allows(self, table: str, key: Key, revision: int | None) -> bool:
        """Whether a row may stand at this revision, or (None) be absent."""
        if self.rows.get(table, {}).get(key) == revision:
            return True
        return revision in self.unknown.get((table, key), ())
