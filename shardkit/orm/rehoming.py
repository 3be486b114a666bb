"""Rehoming: giving a loaded row another shard key, which an UPDATE on one shard cannot do.

The row is deleted where it lives and inserted where it belongs, in one transaction, so it takes a mode that may write
two shards; it is refused in "single" even where both keys live on one shard today. Driven by `ShardSession.rehome`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy import Table, and_, delete, inspect
from sqlalchemy.orm import InstanceState, Mapper, make_transient
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.schema import sort_tables

from shardkit.core.errors import CrossShardWrite, UnroutableQuery, UsageError

from .declare import key_column
from .keys import mapped_key
from .planning.carriers import id_columns

if TYPE_CHECKING:
    from .session import ShardSession


def rehome(session: ShardSession, instance: object, key: Any) -> None:
    """Move the row of a persistent instance to another shard key; see `ShardSession.rehome`."""
    state: InstanceState[Any] = inspect(instance)
    mapper = state.mapper
    mapped = mapped_key(mapper)
    if state.session is not session or not state.persistent:
        raise UsageError(
            "Only an object that this session has loaded, or flushed, can get another shard key."
        )
    if session.mode == "single":
        raise CrossShardWrite(
            "To give a row another shard key writes the shards of both.",
            hint='Use a session of sessionmaker(mode="two_phase").',
        )
    _vet(mapper)
    (sent,) = mapped.key.sent([key])
    mapped.key.position(sent)  # refused before anything is deleted
    session.flush()
    for attribute in mapper.column_attrs:
        getattr(instance, attribute.key)  # what is expired or deferred is loaded while it can be
    _delete(session, mapper, instance)
    session.expunge(instance)
    make_transient(instance)
    setattr(instance, mapped.attribute, key)
    session.add(instance)
    session.flush()


def _tables(mapper: Mapper[Any]) -> list[Table]:
    return [table for table in mapper.tables if isinstance(table, Table)]


def _vet(mapper: Mapper[Any]) -> None:
    """`UnroutableQuery` where a row does not move alone."""
    for table in _tables(mapper):
        for referring in _referring(mapper, table):
            raise UnroutableQuery(
                f"Rows of {referring.fullname} can refer to this one, and would be left behind.",
                hint="Insert the row under its new key, move those that refer to it, and delete the old one.",
                reason="rehome",
            )
        for found in id_columns(table):
            raise UnroutableQuery(
                f"{found.column} carries the slot of the row's shard key, so it would need another id.",
                hint="Insert the row under its new key and delete the old one.",
                reason="rehome",
            )


def _referring(mapper: Mapper[Any], table: Table) -> Iterator[Table]:
    own = _tables(mapper)
    for other in table.metadata.tables.values():
        for constraint in other.foreign_key_constraints:
            # A table of a joined inheritance refers to the one that it extends, by the row itself.
            inherits = other in own and other is not table
            if constraint.referred_table is table and not inherits:
                yield other


def _delete(session: ShardSession, mapper: Mapper[Any], instance: object) -> None:
    for table in reversed(sort_tables(_tables(mapper))):
        columns = dict.fromkeys((*table.primary_key.columns, key_column(table)))
        values = (getattr(instance, mapper.get_property_by_column(column).key) for column in columns)
        same = (column == value for column, value in zip(columns, values, strict=True))
        result: Any = session.execute(delete(table).where(and_(*same)))
        if result.rowcount != 1:
            raise StaleDataError(f"The row of {instance!r} is not there any more.")
