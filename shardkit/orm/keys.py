"""Key values: from what an application gives to the int, str or UUID that PostgreSQL compares and hashes.

Driven by the planner (bound values) and by the session's flush (mapped instances). Never guesses: a value that is
not exactly of the key's type is no key.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import inspect

from shardkit.core.errors import KeyTypeError
from shardkit.core.ring import position

from . import declare


def instance_position(instance: object) -> int:
    """The position of a mapped instance of a sharded table, for its flush.

    `KeyTypeError` if its shard key is no key (None included); `UnroutableQuery` if the key of a persistent instance was
    changed, which a flush cannot do.
    """
    state: Any = inspect(instance)
    column = declare.key_column(state.mapper.local_table)
    value = state.dict.get(state.mapper.get_property_by_column(column).key)
    if value is None:
        raise KeyTypeError(f"{instance!r} has no shard key.")
    return position(value)
