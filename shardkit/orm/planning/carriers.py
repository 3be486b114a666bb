"""Columns that carry slots: which they are, and whether ids that are given fit the shard keys of their rows.

Asked by the planner (for where a row can be, and for rows that are written) and by the flush. Makes no ids: that is
`orm.ids`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Table
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.sql.elements import ClauseElement

from shardkit.core.errors import IdMismatch
from shardkit.core.ids import Carrier, Layout
from shardkit.core.keyrange import slot_of
from shardkit.orm import declare
from shardkit.orm.keys import DIALECT

_carriers: WeakKeyDictionary[Table, Mapping[str, Carrier]] = WeakKeyDictionary()


def carriers(table: Table) -> Mapping[str, Carrier]:
    """The columns of a sharded table, by name, whose values carry the slot of its shard key: those with the default,
    and those that refer to such a one by a foreign key with the shard keys in it."""
    known = _carriers.get(table)
    if known is None:
        known = _carriers[table] = _find_carriers(table, ())
    return known


def own_carriers(table: Table) -> Mapping[str, Carrier]:
    """Those with the default alone."""
    if not declare.is_sharded(table):
        return {}
    key = declare.key_column(table)
    return {
        str(column.name): _carrier(column)
        for column in table.columns
        if declare.carries_slot(column) and column is not key
    }


def _carrier(column: Column[Any]) -> Carrier:
    default: Any = column.default
    found: Carrier = default.carrier()
    return found


def _find_carriers(table: Table, around: tuple[Table, ...]) -> dict[str, Carrier]:
    found = dict(own_carriers(table))
    if not declare.is_sharded(table) or table in around:
        return found
    key = declare.key_column(table)
    for constraint in table.foreign_key_constraints:
        try:
            target = constraint.referred_table
            pairs = [(element.parent, element.column) for element in constraint.elements]
        except InvalidRequestError:  # a table that is not defined yet: create_all tells it
            continue
        # A deferred one can be broken within the transaction that reads.
        if constraint.deferrable or not declare.is_sharded(target):
            continue
        other = declare.key_column(target)
        if any(mine is key and theirs is other for mine, theirs in pairs):
            of_target = _find_carriers(target, (*around, table))
            for mine, theirs in pairs:
                if theirs.name in of_target and mine is not key:
                    found.setdefault(str(mine.name), of_target[str(theirs.name)])
    return found


# --- whether given ids fit their rows ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class IdColumn:
    """What is asked of an id that is given: how it carries its slot, and what makes of a Python value the one sent."""

    column: Column[Any]
    carrier: Carrier
    processor: Callable[[Any], Any] | None

    def vet(self, value: Any, position: int) -> None:
        """`IdMismatch` if a value carries another slot than that of its row's position."""
        if value is None or isinstance(value, ClauseElement):
            return
        sent = value if self.processor is None else self.processor(value)
        slot = carried(self.carrier, sent)
        if slot is not None and slot != slot_of(position):
            raise IdMismatch(
                f"The id {value!r} of {self.column} carries slot {slot}, and the shard key of its row is in slot "
                f"{slot_of(position)}.",
                id=value,
                slot=slot,
            )


def carried(carrier: Carrier, sent: Any) -> int | None:
    """The slot that a value carries as it is sent to the server; None if it carries none."""
    if type(sent) is (UUID if carrier.layout is Layout.UUID else int):
        return carrier.slot(sent)
    return None


_id_columns: WeakKeyDictionary[Table, Sequence[IdColumn]] = WeakKeyDictionary()


def id_columns(table: Table) -> Sequence[IdColumn]:
    """The columns of a table whose given values are vetted."""
    known = _id_columns.get(table)
    if known is None:
        known = _id_columns[table] = tuple(
            IdColumn(column, carrier, column.type.dialect_impl(DIALECT).bind_processor(DIALECT))
            for name, carrier in own_carriers(table).items()
            for column in table.columns
            if column.name == name
        )
    return known


def vet_instance(instance: object, position: int) -> None:
    """`IdMismatch` if an instance was given an id of another slot than its shard key has."""
    state: InstanceState[Any] = instance_state(instance)
    for attribute, known in id_attributes(state.mapper):
        if state.key is None or attribute in state.committed_state:
            known.vet(state.dict.get(attribute), position)


_attributes: WeakKeyDictionary[Mapper[Any], Sequence[tuple[str, IdColumn]]] = WeakKeyDictionary()


def id_attributes(mapper: Mapper[Any]) -> Sequence[tuple[str, IdColumn]]:
    """The attributes of a mapped class whose given values are vetted."""
    known = _attributes.get(mapper)
    if known is None:
        known = _attributes[mapper] = tuple(
            (mapper.get_property_by_column(one.column).key, one)
            for table in mapper.tables
            if isinstance(table, Table)
            for one in id_columns(table)
            if one.column in mapper.columns.values()
        )
    return known
