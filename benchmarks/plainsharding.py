"""Sharding as SQLAlchemy brings it along, `sqlalchemy.ext.horizontal_shard`, with choosers as in its documentation.

The owner of a key is what shardkit's own ring says, so that both sides do the same work on the same shards. There is no
fence, and a statement whose key is not found goes to all shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import sessionmaker
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import BinaryExpression

from shardkit.core.ring import Ring

KEYS = {("users", "id"), ("posts", "user_id")}


def maker(engines: Mapping[int, Engine], ring: Ring) -> sessionmaker[Any]:
    """A factory of sessions over engines by the number of their shard."""
    names = {number: str(number) for number in engines}

    def of_key(key: int) -> str:
        return names[ring.owner(key)]

    def of_instance(mapper: Any, instance: Any, clause: Any = None) -> str:
        return of_key(instance.id if mapper.local_table.name == "users" else instance.user_id)

    def of_identity(mapper: Any, primary_key: Any, **_: Any) -> list[str]:
        return [of_key(primary_key[0])]

    def of_statement(context: Any) -> Iterable[str]:
        found = set(_keys(context.statement, context.parameters))
        return {of_key(key) for key in found} or names.values()

    return sessionmaker(
        class_=ShardedSession,
        shards={names[number]: engine for number, engine in engines.items()},
        shard_chooser=of_instance,
        identity_chooser=of_identity,
        execute_chooser=of_statement,
    )


def _keys(statement: Any, parameters: Any) -> Iterable[int]:
    """The values that a statement compares shard keys with."""
    for element in visitors.iterate(statement):
        if not isinstance(element, BinaryExpression) or element.operator is not operators.eq:
            continue
        column, value = element.left, element.right
        table = getattr(column, "table", None)
        if (getattr(table, "name", None), getattr(column, "name", None)) in KEYS:
            bound = getattr(value, "effective_value", None)
            if bound is None and parameters:
                bound = parameters.get(getattr(value, "key", None))
            if bound is not None:
                yield bound
