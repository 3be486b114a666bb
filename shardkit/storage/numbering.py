"""Primary keys that each server numbers by itself: which they are, and whether their sequences are disjoint.

Asked by `storage.idsplit`, which makes them so, by `storage.idjoin`, by a move before it sets sequences on, and by the
doctor. Changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from psycopg import sql

from shardkit.core.residues import ID_TYPES, first_above, is_of, left
from shardkit.core.topology import ShardedTable, Split, Topology

from . import sequences, tables
from .connections import Connection, value
from .predicate import relation

# Its columns are its own; the start in pg_sequence is that of RESTART without a number, as TRUNCATE does it.
_STATE = sql.SQL("""
SELECT q.last_value, q.is_called, s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcycle
FROM {sequence} q, pg_sequence s WHERE s.seqrelid = {name}::regclass
""")
# By the name that `slot_id()` gives it: such ids are made by applications, whatever default was left on the server.
_SLOT_CHECK = """
SELECT 1 FROM pg_constraint
WHERE conrelid = %s::regclass AND contype = 'c' AND starts_with(conname, 'shardkit_slot')
"""
_NEXTVAL = re.compile(r"nextval\('.*'::regclass\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Numbering:
    """The sequence of a column on one server, as it is now.

    ``last`` is what it gave last or, if nothing was given yet (``called`` is false), what it gives first; ``start`` is
    where TRUNCATE .. RESTART IDENTITY sets it back to.
    """

    sequence: str
    kind: str
    last: int
    called: bool
    start: int
    step: int
    minimum: int
    maximum: int
    cycles: bool

    @property
    def given(self) -> int:
        """The highest number that it can have given, those that sessions keep for later (CACHE) among them."""
        return self.last if self.called else self.last - 1

    @property
    def next(self) -> int:
        """The number that comes next."""
        return self.last + self.step if self.called else self.last

    @property
    def limit(self) -> int:
        """The highest number that it can give and the column hold."""
        return min(self.maximum, ID_TYPES[self.kind].maximum)

    def first(self, floor: int, stride: int, residue: int) -> int:
        """The number to go on with; `ValueError` if there is none."""
        number = first_above(max(floor, self.minimum - 1), stride, residue)
        if number > self.limit:
            raise ValueError(f"the sequence {self.sequence} has no number left above {floor:,}")
        return number

    def left(self, number: int, stride: int) -> int:
        """How many numbers it has if it goes on with ``number``."""
        return left(number, stride, self.limit)

    def problems(self, split: Split, shard_id: int) -> list[str]:
        """How it differs from what the split says, in words."""
        found = []
        if self.step <= 0 or self.step % split.stride:
            found.append(f"it counts by {self.step} instead of {split.stride}")
        if not is_of(self.last, split.stride, shard_id):
            found.append(f"it is at {self.last}, a number of another shard")
        elif self.next <= split.floor:
            found.append(
                f"it is at {self.last}, below the numbers that were given before ({split.floor} at most)"
            )
        if not is_of(self.start, split.stride, shard_id):
            found.append(f"it starts again with {self.start}, a number of another shard")
        if self.cycles:
            found.append("it begins again at its end (CYCLE)")
        return [
            f"the sequence {self.sequence} of {split}.{split.column} was altered: {text}" for text in found
        ]


def column_of(connection: Connection, table: ShardedTable) -> str | None:
    """The column that alone makes the table's primary key differ from row to row, numbered by this server; None if it
    has none, or if the key holds what is unique over shards."""
    found = tables.describe(connection, table)
    if found is None or not found.primary_key or table.key in found.primary_key:
        return None
    columns = [column for name in found.primary_key if (column := found.column(name)) is not None]
    if any(column.base == "uuid" for column in columns):
        return None
    if value(connection, _SLOT_CHECK, (relation(table).as_string(connection),)) is not None:
        return None
    numbered = sequences.of_table(connection, table)
    return next((column.name for column in columns if column.name in numbered), None)


def of_column(connection: Connection, table: ShardedTable, column: str) -> Numbering:
    """The sequence of a column; `ValueError` if it has none that can be made disjoint."""
    described = tables.describe(connection, table)
    found = described.column(column) if described is not None else None
    name = sequences.of_table(connection, table).get(column) if found is not None else None
    if found is None or name is None:
        raise ValueError(f"column {table}.{column} has no sequence")
    if found.base not in ID_TYPES:
        raise ValueError(f"column {table}.{column} is {found.type}, no smallint, integer or bigint")
    if not found.identity and not _NEXTVAL.fullmatch(found.default or ""):
        raise ValueError(f"the default of {table}.{column} is more than the next number of a sequence")
    return state(connection, name, found.base)


def state(connection: Connection, sequence: str, kind: str) -> Numbering:
    """A sequence of a column of this type, as it is now."""
    # The name is as the server writes it: qualified and quoted.
    query = _STATE.format(name=sql.Literal(sequence), sequence=sql.SQL(sequence))
    row = connection.execute(query).fetchone()
    assert row is not None
    return Numbering(sequence, kind, *row)


def is_split(topology: Topology, table: ShardedTable) -> Split | None:
    """What is recorded of the table's ids."""
    return topology.by_split.get((table.schema, table.name))


def problems(connection: Connection, topology: Topology, table: ShardedTable, shard_id: int) -> list[str]:
    """Why rows of the table that are made on this shard can have the primary keys of others', in words; empty if they
    cannot, or if there is no other shard."""
    split = is_split(topology, table)
    if split is not None:
        try:
            return of_column(connection, table, split.column).problems(split, shard_id)
        except ValueError as error:
            return [f"the ids of {table} are recorded as split, but {error}"]
    column = column_of(connection, table) if len(topology.shards) > 1 else None
    return (
        [] if column is None else [f"{table}.{column}, its primary key, is numbered by each shard by itself"]
    )


def shared(
    source: Connection, target: Connection, topology: Topology, moved: Iterable[ShardedTable], target_id: int
) -> list[tuple[str, str]]:
    """The sequences, of source and target, that are to be set on when rows of the tables move."""
    return [
        pair
        for table in moved
        for pair in sequences.shared(source, target, table, apart(target, topology, table, target_id))
    ]


def apart(connection: Connection, topology: Topology, table: ShardedTable, shard_id: int) -> frozenset[str]:
    """The sequences of the table on this shard that are disjoint as recorded, so that rows which come from other
    shards bring no number of theirs."""
    split = is_split(topology, table)
    if split is None:
        return frozenset()
    try:
        found = of_column(connection, table, split.column)
    except ValueError:
        return frozenset()
    return frozenset() if found.problems(split, shard_id) else frozenset([found.sequence])
