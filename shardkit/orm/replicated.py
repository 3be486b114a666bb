"""Writes of reference tables: one statement, run on every shard, so that each holds the same rows afterwards.

Shards are written in ascending order of their ids, each behind a lock on the table that lets one writer in and all
readers: who has it on the first shard has it on all, so that two writers come in the same order everywhere, and a
condition means the same rows. What Python makes of a row (defaults) is made once, for the first shard. Driven by
`orm.dispatch`, `orm.bulk` and the flush; the route is `planning.whole`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from psycopg import sql
from sqlalchemy import CursorResult
from sqlalchemy.exc import DBAPIError

from shardkit.core.errors import CrossShardWrite, ReferenceDiffers, UnroutableQuery
from shardkit.core.topology import DeclaredTable, ReferenceTable
from shardkit.storage.predicate import relation
from shardkit.storage.scope import Mode

from .planning.routing import Parameters, Route

if TYPE_CHECKING:
    from .session import ShardSession


_FAIL = (
    "DO $$BEGIN RAISE 'shardkit: a write of a reference table did not come out the same on all shards'; END$$"
)


def admit(mode: Mode, tables: Collection[ReferenceTable]) -> None:
    """`CrossShardWrite` if a session of this mode may not write reference tables; also where there is one shard only,
    as that is no property of the statement."""
    if mode == "single" and tables:
        listed = ", ".join(sorted(map(str, tables)))
        raise CrossShardWrite(
            f"Every shard holds the reference table {listed}, and a transaction in mode 'single' writes one shard.",
            hint="Make the session with mode='best_effort'.",
            tables=listed,
        )


def lock(session: ShardSession, tables: Iterable[DeclaredTable], shard_ids: Collection[int]) -> None:
    """Be the only writer of reference tables, on shards that are held, to the end of the transaction."""
    shards = session.shards
    for table in sorted(tables, key=str):
        for shard_id in sorted(shard_ids):
            if (shard_id, table) in shards.locked:
                continue
            connection = shards.connection(shard_id)
            sent = shards.scope.participants[shard_id].sent
            statement = sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(relation(table))
            connection.exec_driver_sql(statement.as_string(None).replace("%", "%%"))
            if sent and connection.get_isolation_level() in ("REPEATABLE READ", "SERIALIZABLE"):
                raise UnroutableQuery(
                    f"The snapshot of this transaction may be older than the last write of {table}.",
                    hint="Write reference tables first in a transaction, or use READ COMMITTED.",
                    reason="reference-snapshot",
                )
            # A rollback to a savepoint gives back what was locked in it.
            if not session.in_nested_transaction():
                shards.locked.add((shard_id, table))


def execute(
    session: ShardSession, tables: Iterable[ReferenceTable], route: Route, options: Mapping[str, Any]
) -> CursorResult[Any]:
    """Run a statement on every shard of its route, one after the other; the result of the first."""
    tables = tuple(tables)
    lock(session, tables, route.shards)
    options = {name: value for name, value in options.items() if name not in ("stream_results", "yield_per")}
    first: CursorResult[Any] | None = None
    rows: Sequence[Any] = ()
    for shard_id, part in route.shards.items():
        connection = session.shards.connection(shard_id)
        parameters = part.parameters if first is None else with_defaults(part.parameters, first)
        result = connection.execute(part.statement, parameters, execution_options=options)
        found = [tuple(row) for row in result] if result.returns_rows else ()
        if first is None:
            first, rows = result, found
        elif len(found) != len(rows) or result.rowcount != first.rowcount:
            listed = ", ".join(map(str, tables))
            fail(session, shard_id)
            raise ReferenceDiffers(
                f"A write of {listed} met {first.rowcount} rows on one shard and {result.rowcount} on another.",
                tables=listed,
            )
    assert first is not None
    return first._rewind(rows) if first.returns_rows else first


def fail(session: ShardSession, shard_id: int) -> None:
    """Make the transaction on a shard fail, as an error of the server would: nothing of it can be committed then,
    unless a savepoint is rolled back that was made before."""
    try:
        session.shards.connection(shard_id).exec_driver_sql(_FAIL)
    except DBAPIError:
        return


def with_defaults(parameters: Parameters, first: CursorResult[Any]) -> Parameters:
    """The parameters, with what Python made for the first shard of the columns that were not given."""
    compiled: Any = first.context.compiled
    prefetched = compiled.prefetch
    if not prefetched:
        return parameters
    name = compiled._within_exec_param_key_getter
    made = [
        {column.key: values[name(column)] for column in prefetched}
        for values in first.context.compiled_parameters
    ]
    if isinstance(parameters, Sequence):
        return [{**row, **more} for row, more in zip(parameters, made, strict=True)]
    return {**(parameters or {}), **made[0]}
