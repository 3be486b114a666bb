"""Shard keys of loaded instances, where the primary key does not hold them: remembered while attributes are expired.

A refresh asks for a row by its primary key alone. Where the shard key is another column it is kept with the instance's
state, so that `session.refresh` and the loads of expired attributes go to one shard; and so does what is flushed. Kept
by SQLAlchemy's events for the mapped classes that need it; asked by `orm.dispatch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Executable, Select, Table, event, inspect
from sqlalchemy.orm import InstanceState, Mapper, class_mapper

from shardkit.core.errors import DeclarationError

from . import declare
from .keys import shard_key_attribute

_INFO = "shardkit_key"

REFRESHING = "_sa_orm_load_options"
"""SQLAlchemy's execution option that names, among others, the instance that is refreshed."""


@event.listens_for(Mapper, "mapper_configured")
def _configured(mapper: Mapper[Any], class_: type[Any]) -> None:
    table = mapper.local_table
    if not isinstance(table, Table) or not declare.is_sharded(table):
        return
    try:
        name = shard_key_attribute(mapper)
        held = any(mapper.get_property_by_column(column).key == name for column in mapper.primary_key)
    except DeclarationError:  # told where the class is used
        return
    if held:
        return

    def remember(instance: Any, *_: Any) -> None:
        state: InstanceState[Any] = inspect(instance)
        if name in state.dict:
            state.info[_INFO] = state.dict[name]

    for happening in ("load", "refresh"):
        event.listen(class_, happening, remember)
    # An UPDATE never changes it, so what was inserted stays.
    event.listen(mapper, "after_insert", lambda _mapper, _connection, instance: remember(instance))


def bound(statement: Executable, options: Mapping[str, Any]) -> Executable | None:
    """The statement with a condition on the remembered shard key of the instance that it refreshes, if it does.

    Where it finds no row, there may be one of another shard key.
    """
    state: InstanceState[Any] | None = getattr(options.get(REFRESHING), "_refresh_state", None)
    if state is None or _INFO not in state.info or not isinstance(statement, Select):
        return None
    attribute = getattr(state.class_, shard_key_attribute(class_mapper(state.class_)))
    return statement.where(attribute == state.info[_INFO])
