"""Making the sequences of primary keys disjoint over the shards, so that no two rows get one id.

The sequence of the shard with the number n is set to give what leaves n when divided by the stride, above everything
that was given before on any shard (the *floor*); then the topology records it. Driven by `shardkit ids split`, and by
`storage.membership` for a shard that joins. The caller holds the lease, so no row moves meanwhile.

No number is given twice, whoever writes meanwhile: ALTER SEQUENCE waits for every transaction that has taken a number
and makes all sessions drop those they keep (CACHE), on all shards before anywhere a number of the new kind is given. A
crash leaves sequences that are disjoint already, or not yet, and nothing recorded: the next run begins again.
"""

from __future__ import annotations

import heapq
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from shardkit.core.errors import (
    IdsNotSplit,
    JobRunning,
    MoveWaiting,
    NotInitialised,
    PreflightFailed,
    UsageError,
)
from shardkit.core.residues import ID_TYPES, STRIDE_MAX, widens
from shardkit.core.topology import ShardedTable, Split, Topology

from . import change, inspection, sequences
from .catalog import Catalog
from .connections import Connection, ShardConnections, transaction, value
from .failpoints import failpoint
from .numbering import Numbering, column_of, is_split, of_column, state
from .predicate import relation

PATIENCE = 60.0
_USED = "SELECT 1 FROM shardkit.topologies WHERE state IN ('current', 'past') AND document @> %s LIMIT 1"
_SHOWN = 10
"""So many ids are named that two shards have."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a shard's sequence becomes: it goes on with ``first``, and has ``left`` numbers then."""

    shard: str
    sequence: str
    first: int
    left: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A table and how its ids are to be split; ``done`` if they are."""

    table: ShardedTable
    column: str
    stride: int
    floor: int
    done: bool
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """A table whose ids are numbered, with its sequence on each shard by number."""

    table: ShardedTable
    column: str
    by_shard: dict[int, Numbering]


# --- the plan ------------------------------------------------------------------------------------------------------


def plan(
    topology: Topology, shards: ShardConnections, names: Sequence[str] = (), stride: int | None = None
) -> list[Planned]:
    """How the ids of the named tables, or of all that need it, would be split; changes nothing.

    ``stride`` is the number of shards there can ever be; without one it is what is recorded, or that of the column's
    type. Raises `PreflightFailed` with every reason why not, `UsageError` for a table that needs no split.
    """
    planned, reasons = [], []
    for table in _chosen(topology, shards, names):
        try:
            planned.append(_planned(topology, shards, table, stride))
        except ValueError as error:
            reasons.append(str(error))
    if reasons:
        raise PreflightFailed(
            "These ids cannot be split:\n" + "\n".join(f"  - {text}" for text in reasons), reasons=reasons
        )
    return planned


def _chosen(topology: Topology, shards: ShardConnections, names: Sequence[str]) -> list[ShardedTable]:
    first = shards.get(topology.shards[0])
    if not names:
        return [
            table
            for table in topology.tables
            if is_split(topology, table) is not None or column_of(first, table) is not None
        ]
    chosen = dict.fromkeys(_named(topology, name) for name in names)
    for table in chosen:
        if is_split(topology, table) is None and column_of(first, table) is None:
            raise UsageError(
                f"The primary key of {table} is not numbered by the server alone, so it needs no split.",
                hint="Without a name, `shardkit ids split` finds the tables that need it.",
            )
    return list(chosen)


def _named(topology: Topology, name: str) -> ShardedTable:
    found = [table for table in topology.tables if name in (str(table), table.name)]
    exact = [table for table in found if name == str(table)] or found
    if len(exact) != 1:
        known = shlex.join(str(table) for table in topology.tables)
        raise UsageError(
            f"{name!r} is {'no' if not exact else 'more than one'} declared sharded table.",
            hint=f"The sharded tables are: {known or 'none'}.",
        )
    return exact[0]


def _planned(
    topology: Topology, shards: ShardConnections, table: ShardedTable, wanted: int | None
) -> Planned:
    """`ValueError` with the reason why not."""
    known = is_split(topology, table)
    column = known.column if known is not None else column_of(shards.get(topology.shards[0]), table)
    assert column is not None
    found = _find(topology, shards, table, column)
    stride = _stride(topology, shards, found, known, wanted)
    if known is not None and known.stride == stride and _as_recorded(found, known):
        floor, done = known.floor, True
    else:
        floor, done = _floor(topology, shards, found, known), False
    parts = []
    for shard in topology.shards:
        numbering = found.by_shard[shard.id]
        first = numbering.next if done else numbering.first(floor, stride, shard.id)
        parts.append(Part(shard.name, numbering.sequence, first, numbering.left(first, stride)))
    return Planned(table, column, stride, floor, done, tuple(parts))


def _floor(topology: Topology, shards: ShardConnections, found: _Found, known: Split | None) -> int:
    """The highest id that there is on any shard, or was given by a sequence."""
    return max(
        known.floor if known is not None else 0,
        *(numbering.given for numbering in found.by_shard.values()),
        *(_highest(shards.get(shard), found.table, found.column) for shard in topology.shards),
    )


def _find(topology: Topology, shards: ShardConnections, table: ShardedTable, column: str) -> _Found:
    by_shard = {}
    for shard in topology.shards:
        try:
            numbering = of_column(shards.get(shard), table, column)
        except ValueError as error:
            raise ValueError(f"shard {shard.name}: {error}") from None
        if numbering.step < 0:
            raise ValueError(f"shard {shard.name}: the sequence {numbering.sequence} of {table} counts down")
        by_shard[shard.id] = numbering
    return _Found(table, column, by_shard)


def _stride(
    topology: Topology, shards: ShardConnections, found: _Found, known: Split | None, wanted: int | None
) -> int:
    kind = next(iter(found.by_shard.values())).kind
    stride = wanted or (known.stride if known is not None else ID_TYPES[kind].stride)
    highest = max(shard.id for shard in topology.shards)
    if not highest < stride <= STRIDE_MAX:
        raise ValueError(
            f"{found.table}: there are shards with numbers up to {highest}, so {stride} is not enough "
            f"(up to {STRIDE_MAX} can be)"
        )
    if known is not None and not widens(stride, known.stride):
        raise ValueError(
            f"{found.table}: its ids are split by {known.stride}, and only a multiple of that can follow"
        )
    for other in topology.splits:
        if other is not known and other.stride != stride and _shares(topology, shards, found, other):
            raise ValueError(
                f"{found.table} shares its sequence with {other}, whose ids are split by {other.stride}"
            )
    return stride


def _shares(topology: Topology, shards: ShardConnections, found: _Found, other: Split) -> bool:
    first = topology.shards[0]
    theirs = sequences.of_table(shards.get(first), topology.by_table[other.schema, other.name])
    return theirs.get(other.column) == found.by_shard[first.id].sequence


def _as_recorded(found: _Found, split: Split) -> bool:
    return not any(numbering.problems(split, shard_id) for shard_id, numbering in found.by_shard.items())


def _highest(connection: Connection, table: ShardedTable, column: str) -> int:
    query = sql.SQL("SELECT max({}) FROM {}").format(sql.Identifier(column), relation(table))
    return int(value(connection, query) or 0)


# --- the change ----------------------------------------------------------------------------------------------------


def split(
    catalog: Catalog,
    shards: ShardConnections,
    names: Sequence[str] = (),
    stride: int | None = None,
    *,
    patience: float = PATIENCE,
    report: change.Report = lambda reason: None,
) -> list[Planned]:
    """Split the ids of tables as `plan` says, and record it; what was done.

    Applications go on; inserts into a table wait for a moment while its sequences are altered. ``patience`` is how
    long, in seconds, it waits for transactions that have taken a number; then `MoveWaiting`. Raises what `plan` does,
    `JobRunning`, and `PreflightFailed` if rows of two shards have the same ids already.
    """
    change.settle(catalog, shards)
    topology = catalog.current()
    if topology is None:
        raise NotInitialised("The catalog has no shard yet.")
    _refuse_moving(catalog, topology)
    for planned in plan(topology, shards, names, stride):
        if planned.done:
            continue
        found = _find(topology, shards, planned.table, planned.column)
        known = is_split(topology, planned.table)
        floor = _alter(catalog, shards, topology, planned, found, patience, report)
        failpoint("ids.altered")
        if known is None or not _as_recorded(found, known):
            _refuse_doubles(topology, shards, planned)
        table = planned.table
        made = Split(table.schema, table.name, planned.column, planned.stride, floor)
        topology = change.apply(catalog, shards, _recording(made))
        change.announce(catalog, shards, topology)
    report(None)
    return plan(topology, shards, names, stride)


def _recording(made: Split) -> Callable[[Topology | None, int], Topology]:
    def record(now: Topology | None, version: int) -> Topology:
        assert now is not None
        return now.with_splits(version, [made])

    return record


def _refuse_moving(catalog: Catalog, topology: Topology) -> None:
    if catalog.running_job() is not None:
        raise JobRunning
    if marked := [shard.name for shard in topology.shards if shard.in_transit]:
        raise JobRunning(
            f"Rows are in transit on {', '.join(marked)}.", hint="`shardkit doctor` tells more."
        )


def _alter(
    catalog: Catalog,
    shards: ShardConnections,
    topology: Topology,
    planned: Planned,
    found: _Found,
    patience: float,
    report: change.Report,
) -> int:
    """Alter the table's sequence on every shard, all at once; the floor. Tries only when nobody holds one for long, so
    that inserts never queue behind a lock that waits for a long transaction."""
    deadline, pause = time.monotonic() + patience, 0.002
    while True:
        holder = _holder(topology, shards, planned)
        if holder is None:
            try:
                return _alter_once(catalog, shards, topology, planned, found)
            except psycopg.errors.LockNotAvailable:
                holder = _holder(topology, shards, planned, seconds=0.0)
        if holder is not None:
            report(f"the sequence of {planned.table} is held by {holder}")
        if time.monotonic() > deadline:
            raise MoveWaiting(
                f"The sequence of {planned.table} could not be altered within {patience:.0f} s"
                + (f": it is held by {holder}." if holder else "."),
                hint="End that transaction, then run it again.",
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)


def _holder(
    topology: Topology, shards: ShardConnections, planned: Planned, seconds: float = change.LOCK_TIMEOUT
) -> str | None:
    for shard, part in zip(topology.shards, planned.parts, strict=True):
        found = inspection.holder_of(
            shards.get(shard), part.sequence, inspection.Against.WRITERS, seconds=seconds
        )
        if found is not None:
            return f"{found}, on shard {shard.name}"
    return None


def _alter_once(
    catalog: Catalog, shards: ShardConnections, topology: Topology, planned: Planned, found: _Found
) -> int:
    table, column, stride = found.table, found.column, planned.stride
    # That of the rows, as they were; what the sequences gave since is known to themselves.
    floor = planned.floor
    with ExitStack() as stack:
        states: dict[int, Numbering] = {}
        for shard in topology.shards:
            before, connection = found.by_shard[shard.id], shards.get(shard)
            stack.enter_context(transaction(connection, *change.CLOSING))
            change.claim(connection, catalog.token or 0)
            # This takes the lock: whoever has taken a number has ended, whoever comes waits and keeps none of before.
            _set(connection, before.sequence, sql.SQL("INCREMENT BY {} NO CYCLE").format(sql.Literal(stride)))
            states[shard.id] = state(connection, before.sequence, before.kind)
            floor = max(floor, states[shard.id].given)
            if inspection.is_indexed(connection, table, column):
                floor = max(floor, _highest(connection, table, column))
        for shard in topology.shards:
            _restart(shards.get(shard), states[shard.id], floor, stride, shard.id)
        failpoint("ids.restarted")
    return floor


def _restart(connection: Connection, numbering: Numbering, floor: int, stride: int, residue: int) -> None:
    try:
        first = numbering.first(floor, stride, residue)
    except ValueError as error:
        raise PreflightFailed(f"The ids cannot be split: {error}.", reasons=[str(error)]) from error
    _set(
        connection,
        numbering.sequence,
        sql.SQL("INCREMENT BY {} NO CYCLE START WITH {first} RESTART WITH {first}").format(
            sql.Literal(stride), first=sql.Literal(first)
        ),
    )


def _set(connection: Connection, sequence: str, options: sql.Composable) -> None:
    # The name is as the server writes it: qualified and quoted.
    connection.execute(sql.SQL("ALTER SEQUENCE {} {}").format(sql.SQL(sequence), options))


def _refuse_doubles(topology: Topology, shards: ShardConnections, planned: Planned) -> None:
    """`PreflightFailed` if rows of two shards have one id: from before the sequences were disjoint."""
    if len(topology.shards) == 1:
        return
    with ExitStack() as stack:
        streams = [
            _ids(stack, shards.get(shard), planned.table, planned.column) for shard in topology.shards
        ]
        doubles: list[int] = []
        before: int | None = None
        for number in heapq.merge(*streams):
            if number == before and (not doubles or doubles[-1] != number):
                doubles.append(number)
                if len(doubles) == _SHOWN:
                    break
            before = number
    if doubles:
        listed = ", ".join(map(str, doubles)) + (", ..." if len(doubles) == _SHOWN else "")
        raise PreflightFailed(
            f"Rows of {planned.table} have the same {planned.column} on two shards: {listed}",
            hint="The sequences are disjoint now. Give one of two such rows another id, then run it again.",
            reasons=[f"{planned.table}.{planned.column}: {listed}"],
        )


def _ids(stack: ExitStack, connection: Connection, table: ShardedTable, column: str) -> Iterator[int]:
    stack.enter_context(transaction(connection))
    cursor = stack.enter_context(connection.cursor("shardkit_ids"))
    cursor.itersize = 10_000
    # Of a key of several columns a number may stand in many rows of one shard.
    cursor.execute(
        sql.SQL("SELECT DISTINCT {column} FROM {table} ORDER BY {column}").format(
            column=sql.Identifier(column), table=relation(table)
        )
    )
    return (number for (number,) in cursor)


# --- a shard that joins --------------------------------------------------------------------------------------------


def check_join(
    topology: Topology, shards: ShardConnections, newcomer: Connection, shard_id: int, name: str
) -> None:
    """`IdsNotSplit` if a second shard, or one of this number, could make a primary key that another has."""
    unsplit: dict[str, str] = {}
    narrow: dict[str, int] = {}
    broken: list[str] = []
    for table in topology.tables:
        known = is_split(topology, table)
        if known is None:
            column = column_of(shards.get(topology.shards[0]), table)
            if column is not None:
                unsplit[str(table)] = column
            continue
        if shard_id >= known.stride:
            narrow[str(table)] = known.stride
        for shard in topology.shards:
            try:
                found = of_column(shards.get(shard), table, known.column).problems(known, shard.id)
            except ValueError as error:
                found = [str(error)]
            broken += [f"shard {shard.name}: {text}" for text in found]
        try:
            of_column(newcomer, table, known.column).first(known.floor, known.stride, shard_id)
        except ValueError as error:
            broken.append(f"shard {name}: {error}")
    if unsplit:
        listed = ", ".join(f"{table} ({column})" for table, column in unsplit.items())
        raise IdsNotSplit(
            f"A second shard would number rows as the first does, by its own sequence: {listed}.",
            hint=f"`shardkit ids split {shlex.join(unsplit)}` makes the sequences disjoint; then add the shard.",
            tables=list(unsplit),
        )
    if narrow:
        raise IdsNotSplit(
            f"The ids of {', '.join(narrow)} are split over {min(narrow.values())} shards, and this one would have the "
            f"number {shard_id}.",
            hint=f"`shardkit ids split --shards {_wide_enough(narrow, shard_id)} {shlex.join(narrow)}` makes room.",
            tables=list(narrow),
        )
    if broken:
        raise IdsNotSplit(
            "Sequences are not as they were recorded:\n" + "\n".join(f"  - {text}" for text in broken),
            hint="`shardkit ids split` sets them again; then add the shard.",
            reasons=broken,
        )


def _wide_enough(narrow: dict[str, int], shard_id: int) -> int:
    stride = max(narrow.values())
    while stride <= shard_id:
        stride *= 2
    return stride


def enter(
    catalog: Catalog, shards: ShardConnections, newcomer: Connection, topology: Topology, shard_id: int
) -> None:
    """Set the sequences of a shard that joins, before it can take a row. Can be run again."""
    used = value(catalog.connection, _USED, (Jsonb({"shards": [{"id": shard_id}]}),)) is not None
    for known in topology.splits:
        table = topology.by_table[known.schema, known.name]
        floor = known.floor
        if used:  # by a shard that has left, whose rows are on the others now
            floor = max(floor, *(_highest_of(shards.get(shard), known, shard_id) for shard in topology.shards))
        with transaction(newcomer, *change.OPENING):
            change.claim(newcomer, catalog.token or 0)
            _restart(newcomer, of_column(newcomer, table, known.column), floor, known.stride, shard_id)


def _highest_of(connection: Connection, known: Split, shard_id: int) -> int:
    """The highest id of the numbers of one shard."""
    query = sql.SQL("SELECT max({column}) FROM {table} WHERE {column} %% {stride} = {shard}").format(
        column=sql.Identifier(known.column),
        table=sql.Identifier(known.schema, known.name),
        stride=sql.Literal(known.stride),
        shard=sql.Literal(shard_id),
    )
    return int(value(connection, query, ()) or 0)
