"""Key values: from what an application gives to the int, str or UUID that PostgreSQL compares and hashes.

Driven by the planner (bound values), by the splitting of rows and by the session's flush (mapped instances). Never
guesses: a value that is not exactly of the key's type is no key, as what PostgreSQL makes of it is its own business
("5" is 5 to an integer column, 5.7 is never equal, True is an error).
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Table
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.orm import InstanceState, LoaderCallableStatus, Mapper
from sqlalchemy.orm.attributes import instance_state

from shardkit.core.errors import DeclarationError, KeyTypeError, UnroutableQuery
from shardkit.core.ring import position, positions
from shardkit.core.topology import KeyType

from . import declare

EXACT: dict[KeyType, type] = {"int": int, "text": str, "uuid": UUID}

DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call]  # SQLAlchemy's dialects are untyped


def exact_position(value: Any, family: KeyType) -> int | None:
    """The position of a value as it is sent to the server, or None if it is no key of this family."""
    kind: type = type(value)
    if kind is not EXACT[family]:
        return None
    try:
        return position(value)
    except KeyTypeError:  # beyond 64 bits, a surrogate: PostgreSQL refuses it, wherever it is sent
        return None


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """What is asked about a key column for each row: its family, the length of a varchar, and what makes of a Python
    value of it (a decorated type, an Enum) the one that is sent."""

    name: str
    family: KeyType
    length: int | None
    processor: Callable[[Any], Any] | None

    @classmethod
    def of(cls, column: Column[Any]) -> KeyColumn:
        """That of the shard key of a sharded table."""
        known = _key_columns.get(column)
        if known is None:
            family = declare.key_family(column.type)
            assert family is not None
            impl = column.type.dialect_impl(DIALECT)
            length = getattr(impl, "length", None) if family == "text" else None
            known = cls(f"{column.table.name}.{column.name}", family, length, impl.bind_processor(DIALECT))
            _key_columns[column] = known
        return known

    def sent(self, values: Sequence[Any]) -> Sequence[Any]:
        """The values as they are sent to the server."""
        return values if self.processor is None else [self.processor(value) for value in values]

    def position(self, sent: Any) -> int:
        """The position of a row to be written, from its key as it is sent; `KeyTypeError` if that is no key."""
        found = exact_position(sent, self.family)
        if found is None or self._too_long(sent):
            raise self._no_key(sent)
        return found

    def positions(self, sent: Sequence[Any]) -> Sequence[int]:
        """The same for many rows."""
        kind: Any = EXACT[self.family]
        for value in sent:
            if type(value) is not kind or self._too_long(value):
                raise self._no_key(value)
        try:
            return positions(sent)
        except KeyTypeError as error:
            raise self._no_key(error.fields.get("value")) from error

    def _too_long(self, sent: Any) -> bool:
        # To a varchar(5) PostgreSQL does not store "abcde " but "abcde", which is another key.
        return self.length is not None and len(sent) > self.length

    def _no_key(self, sent: Any) -> KeyTypeError:
        shown = "None" if sent is None else f"{reprlib.repr(sent)} ({type(sent).__name__})"
        limit = "" if self.length is None else f", of {self.length} characters at most"
        return KeyTypeError(
            f"{shown} cannot be the shard key {self.name}, which is of type {self.family}.",
            hint=f"Give it a value of exactly the type {EXACT[self.family].__name__}{limit}.",
            value=sent,
        )


_key_columns: WeakKeyDictionary[Column[Any], KeyColumn] = WeakKeyDictionary()


def required_positions(values: Sequence[Any], column: Column[Any]) -> Sequence[int]:
    """The positions of rows to be written, from their keys as the application gives them; `KeyTypeError`."""
    key = KeyColumn.of(column)
    return key.positions(key.sent(values))


# --- Python defaults -----------------------------------------------------------------------------------------------


class _NoContext:
    """Stands for the statement's context, which does not exist before the shard is chosen."""

    def __getattr__(self, name: str) -> Any:
        raise UnroutableQuery(
            "The default of a column looks at the context of its statement, which does not exist before the shard "
            "is chosen.",
            hint="Use a function without a parameter, or give the value.",
        )


def has_default(column: Column[Any]) -> bool:
    """Whether a column has a default that Python can evaluate."""
    return column.default is not None and (column.default.is_scalar or column.default.is_callable)


def default_value(column: Column[Any]) -> Any:
    """The value of a column's Python default, evaluated now."""
    return evaluated(column.default)


def evaluated(default: Any) -> Any:
    """The value of a default or onupdate that Python evaluates."""
    return default.arg(_NoContext()) if default.is_callable else default.arg


# --- mapped instances ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MappedKey:
    """The shard key of a mapped class: the attribute, the column in the class's own table, and what is asked of it."""

    attribute: str
    column: Column[Any]
    key: KeyColumn


def mapped_key(mapper: Mapper[Any]) -> MappedKey:
    """The shard key of a mapped class; `DeclarationError` if it has none, or if a table of its inheritance lives by
    another one."""
    known = _mapped_keys.get(mapper)
    if known is None:
        attribute = _find_attribute(mapper)
        table: Any = mapper.local_table
        column = declare.key_column(table)
        known = _mapped_keys[mapper] = MappedKey(attribute, column, KeyColumn.of(column))
    return known


_mapped_keys: WeakKeyDictionary[Mapper[Any], MappedKey] = WeakKeyDictionary()


def shard_key_attribute(mapper: Mapper[Any]) -> str:
    """The name of the attribute that is the shard key of a mapped class; `DeclarationError`."""
    return mapped_key(mapper).attribute


def key_column_of(mapper: Mapper[Any]) -> Column[Any]:
    """The key column of a mapped class, in its own table; `DeclarationError`."""
    return mapped_key(mapper).column


def _find_attribute(mapper: Mapper[Any]) -> str:
    names: set[str] = set()
    for table in mapper.tables:
        if not isinstance(table, Table) or declare.sharded_table(table) is None:
            raise DeclarationError(
                f"{mapper.class_.__name__} is stored in {table}, which is not declared as sharded.",
                hint="Put @sharded(by=...) above each class that has a table.",
            )
        names.add(mapper.get_property_by_column(declare.key_column(table)).key)
    if len(names) != 1:
        listed = ", ".join(sorted(names)) or "none"
        raise DeclarationError(
            f"The tables of {mapper.class_.__name__} are sharded by different attributes ({listed}).",
            hint="Shard every table of an inheritance by the columns that join them.",
        )
    return names.pop()


def instance_position(instance: object) -> int:
    """The position of a mapped instance, for its flush.

    `KeyTypeError` if its shard key is no key (None included), `UnroutableQuery` if the key of a persistent instance was
    changed: its row would have to move, which an UPDATE on one shard cannot do.
    """
    state: InstanceState[Any] = instance_state(instance)
    mapped = mapped_key(state.mapper)
    name, key, loaded = mapped.attribute, mapped.key, state.dict
    value = loaded[name] if name in loaded else getattr(instance, name)
    if state.key is not None and name in state.committed_state:
        before = state.committed_state[name]
        # NO_VALUE: it was set before it was loaded, so what it was is not known.
        if before is LoaderCallableStatus.NO_VALUE or before != value:
            raise changed_key(mapped.column)
    return key.position(value if key.processor is None else key.processor(value))


def fill_default_key(instance: object) -> None:
    """Give a pending instance without a shard key the Python default of its key column, as the flush would do too
    late. Does nothing if there is no such default."""
    state: InstanceState[Any] = instance_state(instance)
    mapped = mapped_key(state.mapper)
    if state.dict.get(mapped.attribute) is None and has_default(mapped.column):
        setattr(instance, mapped.attribute, default_value(mapped.column))


def changed_key(column: Column[Any]) -> UnroutableQuery:
    """The refusal of a statement that changes shard keys."""
    return UnroutableQuery(
        f"The shard key {column.table.name}.{column.name} would be changed, and its row belong to another shard.",
        hint="Use session.rehome(instance, key), or insert the row under its new key and delete the old one.",
        reason="changed-key",
    )
