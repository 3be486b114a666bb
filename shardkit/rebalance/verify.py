"""Verification: the moving rows are the same on both sides, by content, while writers go on.

Counts prove nothing, and two snapshots of a table that is written never agree. So: digests of whole chunks first; the
rows of chunks that differ, and the rows that triggers on the source note as written, are compared again one by one
after the target has applied everything up to then. A row that differs though nobody wrote it since is a real
difference. What is still noted when that ends is small, and is compared for the last time inside the cutover, when
nobody can write: `remaining_differences`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from shardkit.core.errors import VerificationFailed
from shardkit.core.keyrange import Arc, ArcSet
from shardkit.core.topology import ShardedTable
from shardkit.storage import digest, sourceguard
from shardkit.storage.connections import Connection
from shardkit.storage.inspection import shape
from shardkit.storage.tables import describe

T = TypeVar("T")
Suspect = tuple[int, str]
"""A table's number and which row of it, as `digest.identity_text` has it."""

NOTES_A_ROUND = 20_000
ROWS_A_QUERY = 1_000
ROWS_A_BUCKET = 1_000
SUSPECTS = 50_000
"""More rows than that are looked at before the next chunk: what is held here does not grow with the rows that move."""
SMALL = 200
"""So many noted rows may be left for the cutover."""
IN_CUTOVER = 5 * SMALL
"""So many rows are compared while applications wait; with more the cutover is put off."""


class TooMany(Exception):
    """More rows were written since the last comparison than can be compared while applications wait."""


@dataclass
class Verifier:
    """Compares the rows of ``arcs`` in ``tables`` on two servers; one for the whole life of a transfer's driver."""

    source: Connection
    target: Connection
    transfer: int
    token: int
    tables: Sequence[ShardedTable]
    arcs: ArcSet
    wait_replayed: Callable[[], object]
    on_rows: Callable[[int], None]
    suspects: set[Suspect] = field(default_factory=set)
    certificate: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[str, str] = ("", "")
    """Of the tables on both sides, before anything was compared."""
    _compared: list[digest.Compared] = field(default_factory=list)

    def run(self) -> None:
        """Compare everything; `VerificationFailed` names the rows that differ."""
        self.shapes = self.shapes_now()
        self._compared = [self._compared_of(table) for table in self.tables]
        sourceguard.forget_changes(self.source, self.transfer, self.token)
        self.suspects.clear()
        counts: dict[str, int] = {}
        number_of_chunks = 0
        for index, table in enumerate(self.tables):
            rows, pieces = self._compare_chunks(index, table)
            counts[str(table)] = rows
            number_of_chunks += pieces
        rounds = self._settle()
        self.certificate = {
            "rows": counts,
            "chunks": number_of_chunks,
            "rounds": rounds,
            "arcs": [list(arc) for arc in self.arcs],
        }

    def shapes_now(self) -> tuple[str, str]:
        """What DDL, or a TRUNCATE, would have changed on either side since `shapes`."""
        return (
            shape(self.source, self.tables, self.transfer),
            shape(self.target, self.tables, self.transfer),
        )

    def remaining_differences(self, statement_timeout: str) -> None:
        """The last comparison, inside the cutover: of what was written since. Nobody may be writing.

        ``psycopg.errors.QueryCanceled`` where a query takes longer than ``statement_timeout``.
        """
        left = self.suspects | set(sourceguard.peek_changes(self.source, self.transfer, IN_CUTOVER + 1))
        if len(left) > IN_CUTOVER:
            raise TooMany
        differing = self._compare_rows(left, ("statement_timeout", statement_timeout))
        self.certificate["checked_in_cutover"] = len(left)
        if differing:
            self._fail(differing)

    def settle_once(self) -> int:
        """Compare what was noted so far; the number of rows noted since, which the caller may want smaller: more than
        `SMALL` is not counted."""
        noted = self.suspects | set(
            sourceguard.take_changes(self.source, self.transfer, self.token, NOTES_A_ROUND)
        )
        self.wait_replayed()
        differing = self._compare_rows(noted)
        if real := differing - sourceguard.noted_among(self.source, self.transfer, differing):
            self._fail(real)
        self.suspects = differing
        since = sourceguard.peek_changes(self.source, self.transfer, SMALL + 1)
        return len(differing.union(since))

    def _settle(self, rounds: int = 50) -> int:
        """Rounds until little is left; the number made. A table written faster than it can be compared ends too: the
        cutover has the last word."""
        for made in range(1, rounds + 1):
            if self.settle_once() <= SMALL:
                return made
        return rounds

    def _compared_of(self, table: ShardedTable) -> digest.Compared:
        found = describe(self.source, table)
        assert found is not None
        types = {column.name: column.type for column in found.columns}
        return digest.Compared(found.row_identity(table.key), tuple(types), types)

    def _compare_chunks(self, index: int, table: ShardedTable) -> tuple[int, int]:
        found = describe(self.source, table)
        pieces = digest.chunks(self.arcs, found.rows_estimate if found else 0)
        columns = self._compared[index].columns
        with digest.snapshot(self.source):
            mine = digest.by_chunk(self.source, table, columns, pieces)
        with digest.snapshot(self.target):
            theirs = digest.by_chunk(self.target, table, columns, pieces)
        for place in sorted(mine.keys() | theirs.keys()):
            if mine.get(place) != theirs.get(place):
                held = max(found[place].rows for found in (mine, theirs) if place in found)
                self.suspects |= {(index, row) for row in self._differing_rows(index, pieces[place], held)}
                if len(self.suspects) > SUSPECTS:
                    self.settle_once()
        rows = sum(part.rows for part in mine.values())
        self.on_rows(rows)
        return rows, len(pieces)

    def _differing_rows(self, index: int, piece: Arc, held: int) -> set[str]:
        """Which rows of a chunk differ. A large key makes a large chunk: only what differs is brought here."""
        table, compared = self.tables[index], self._compared[index]
        buckets = 1 << max(0, held // ROWS_A_BUCKET).bit_length()
        both = (self.source, self.target)
        parts = []
        for connection in both:
            with digest.snapshot(connection):
                parts.append(digest.by_bucket_of_chunk(connection, table, compared, piece, buckets))
        wanted = sorted(_differing(*parts))
        rows = []
        for connection in both:
            with digest.snapshot(connection):
                rows.append(digest.by_row_of_chunk(connection, table, compared, piece, buckets, wanted))
        return _differing(*rows)

    def _compare_rows(self, suspects: Iterable[Suspect], *settings: tuple[str, str]) -> set[Suspect]:
        by_table: dict[int, list[str]] = {}
        for index, row in suspects:
            by_table.setdefault(index, []).append(row)
        settings = (*digest.BY_INDEX, *settings)
        differing: set[Suspect] = set()
        for index, rows in by_table.items():
            table, compared = self.tables[index], self._compared[index]
            for start in range(0, len(rows), ROWS_A_QUERY):
                part = rows[start : start + ROWS_A_QUERY]
                with digest.snapshot(self.source, *settings):
                    mine = digest.by_row(self.source, table, compared, part)
                with digest.snapshot(self.target, *settings):
                    theirs = digest.by_row(self.target, table, compared, part)
                differing |= {(index, row) for row in _differing(mine, theirs)}
        return differing

    def _fail(self, differing: set[Suspect]) -> None:
        named = [self._named(index, row) for index, row in sorted(differing)]
        shown = ", ".join(named[:10]) + (f" and {len(named) - 10} more" if len(named) > 10 else "")
        raise VerificationFailed(f"The copy differs from its source in the rows of: {shown}.", keys=named)

    def _named(self, index: int, row: str) -> str:
        values = json.loads(row)
        shown = " ".join(f"{name}={values[name]}" for name in self._compared[index].identity)
        return f"{self.tables[index]} {shown}"


def _differing(mine: Mapping[T, digest.Digest], theirs: Mapping[T, digest.Digest]) -> set[T]:
    return {what for what in mine.keys() | theirs.keys() if mine.get(what) != theirs.get(what)}
