"""Verification: the moving rows are the same on both sides, by content, while writers go on.

Counts prove nothing, and two snapshots of a table that is written never agree. So: digests of whole chunks first; the
rows of chunks that differ, and the rows that triggers on the source note as written, are compared again one by one
after the target has applied everything up to then. A row that differs though nobody wrote it since is a real
difference. What is still noted when that ends is small, and is compared for the last time inside the cutover, when
nobody can write: `remaining_differences`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from shardkit.core.errors import VerificationFailed
from shardkit.core.keyrange import Arc, ArcSet, hex_position
from shardkit.core.topology import ShardedTable
from shardkit.storage import digest, inspection, sourceguard
from shardkit.storage.connections import Connection, at_once
from shardkit.storage.digest import Digest
from shardkit.storage.tables import describe

T = TypeVar("T")
Suspect = tuple[int, str]
"""A table's number and which row of it, as `digest.identity_text` has it."""

NOTES_A_ROUND = 20_000
ROWS_A_QUERY = 1_000
ROWS_A_BUCKET = 1_000
LOOK_AGAIN = (0.1, 0.3, 0.6)
"""Seconds after which rows that differ are compared again, before it is told."""
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
    wait_applied: Callable[[], object]
    on_rows: Callable[[int], None]
    suspects: set[Suspect] = field(default_factory=set)
    certificate: dict[str, Any] = field(default_factory=dict)
    shapes: Sequence[str] = ()
    """Of the tables on both sides, before anything was compared."""
    _compared: list[digest.Compared] = field(default_factory=list)
    _compared_again: int = 0

    def run(self) -> None:
        """Compare everything; `VerificationFailed` names the rows that differ."""
        self.shapes = self.shapes_now()
        self._compared = [self._compared_of(table) for table in self.tables]
        for side in (self.source, self.target):
            sourceguard.forget_changes(side, self.transfer, self.token)
        self.suspects.clear()
        self._compared_again = 0
        started_at, topologies = _now(), {"source": _taken(self.source), "target": _taken(self.target)}
        compared = {
            str(table): self._compare_chunks(index, table) for index, table in enumerate(self.tables)
        }
        rounds = self._settle()
        self.certificate = {
            "kind": "move",
            "format": 1,
            "started_at": started_at,
            "verified_at": _now(),
            "topology": topologies,
            "arcs": [[hex_position(arc.first), hex_position(arc.last)] for arc in self.arcs],
            "rows": {table: mine.rows for table, (mine, _, _) in compared.items()},
            "digests": {
                table: {"source": _document(mine), "target": _document(theirs)}
                for table, (mine, theirs, _) in compared.items()
            },
            "chunks": sum(pieces for _, _, pieces in compared.values()),
            "rounds": rounds,
            "compared_again": self._compared_again,
        }

    def shapes_now(self) -> list[str]:
        """What DDL, or a TRUNCATE, would have changed on either side since `shapes`."""
        return inspection.shapes((self.source, self.target), self.tables, self.transfer)

    def remaining_differences(self, written: set[Suspect], statement_timeout: str) -> None:
        """The last comparison, inside the cutover: of what was ``written`` since, noted at the source when nobody could
        write there any more, and at the target, where somebody else may have, when it had caught up.

        ``psycopg.errors.QueryCanceled`` where a query takes longer than ``statement_timeout``.
        """
        left = self.suspects | written
        if len(left) > IN_CUTOVER:
            raise TooMany
        differing = self._compare_rows(left, ("statement_timeout", statement_timeout))
        self.certificate |= {"checked_in_cutover": len(left), "checked_at": _now()}
        if differing:
            self._fail(differing)

    def settle_once(self) -> int:
        """Compare what was noted so far; the number of rows noted since, which the caller may want smaller: more than
        `SMALL` is not counted."""
        noted = set(self.suspects)
        for side in (self.source, self.target):
            noted |= set(sourceguard.take_changes(side, self.transfer, self.token, NOTES_A_ROUND))
        self.wait_applied()
        differing = self._compare_rows(noted)
        self._compared_again += len(noted)
        if real := self._lasting(differing - self._noted_among(differing)):
            self._fail(real)
        self.suspects = differing
        return len(differing | self._noted(SMALL + 1))

    def _lasting(self, differing: set[Suspect]) -> set[Suspect]:
        """Those that still differ after a while: a cascade on the target may be committed before that on the source."""
        for pause in LOOK_AGAIN:
            if not differing:
                break
            time.sleep(pause)
            self.wait_applied()
            differing = self._compare_rows(differing)
            differing -= self._noted_among(differing)
        return differing

    def _noted(self, limit: int) -> set[Suspect]:
        """Rows written since, on the source by applications, on the target by whoever has no business there; about
        ``limit`` a side at most."""
        return {
            suspect
            for side in (self.source, self.target)
            for suspect in sourceguard.peek_changes(side, self.transfer, limit)
        }

    def _noted_among(self, rows: set[Suspect]) -> set[Suspect]:
        """Those of the rows that were written since, on either side."""
        return {
            suspect
            for side in (self.source, self.target)
            for suspect in sourceguard.noted_among(side, self.transfer, rows)
        }

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

    def _compare_chunks(self, index: int, table: ShardedTable) -> tuple[Digest, Digest, int]:
        """The digests of both sides, in all chunks together, and the number of chunks."""
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
        ours = _total(mine)
        self.on_rows(ours.rows)
        return ours, _total(theirs), len(pieces)

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
                sides = self.source, self.target
                with at_once(*sides), digest.snapshot(sides[0], *settings), digest.snapshot(sides[1], *settings):
                    asked = [digest.ask_by_row(side, table, compared, part) for side in sides]
                mine, theirs = map(digest.read_by_row, asked)
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


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _taken(connection: Connection) -> list[Any]:
    """Version and digest of the topology that a shard took last."""
    row = connection.execute(
        "SELECT version, digest FROM shardkit.topology ORDER BY version DESC LIMIT 1"
    ).fetchone()
    return list(row) if row is not None else []


def _total(parts: Mapping[int, Digest]) -> Digest:
    return Digest(sum(part.rows for part in parts.values()), sum(part.sum for part in parts.values()))


def _document(found: Digest) -> dict[str, Any]:
    # As text: it is larger than what every reader of JSON takes for a number.
    return {"rows": found.rows, "sum": str(found.sum)}


def _differing(mine: Mapping[T, Digest], theirs: Mapping[T, Digest]) -> set[T]:
    return {what for what in mine.keys() | theirs.keys() if mine.get(what) != theirs.get(what)}
