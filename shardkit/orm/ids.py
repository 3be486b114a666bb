"""Slot-carrying ids in models: the column default that makes them, and where its integers come from.

`slot_id` goes into one line of a model. The row's shard key is read where SQLAlchemy evaluates the default, as late as
can be: in a flush after parents have handed their keys to children, in Core and bulk inserts for each row. Integer ids
need leases (`storage.idleases`); those are the cluster's where a session over shards runs the statement, and for a
plain Session the ones named by `lease_ids`. UUIDs need none.
"""

from __future__ import annotations

import os
import threading
import time
from contextvars import ContextVar
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import Column, Table, event
from sqlalchemy.exc import DontWrapMixin
from sqlalchemy.sql.elements import BindParameter, ClauseElement
from sqlalchemy.sql.schema import CallableColumnDefault
from sqlalchemy.types import TypeDecorator

from shardkit.core.errors import DeclarationError, ShardkitError, UnroutableQuery, UsageError
from shardkit.core.idmaking import UuidMaker
from shardkit.core.ids import RANDOM_BITS, Carrier, Layout
from shardkit.core.keyrange import slot_of
from shardkit.storage.idleases import IdLeases

from . import declare
from .idcheck import SlotCheck
from .keys import DIALECT, KeyColumn

LEASES = "shardkit_ids"
"""The execution option by which an engine names the leases that its inserts use."""


def slot_id(*, json_safe: bool = False, floor: int = 0) -> Any:
    """A column default: ids that carry the slot of their row's shard key, so that ``session.get(Post, id)`` asks the
    shard of that slot alone.

    On a UUID column it makes UUIDs of version 7, without coordination. On a BIGINT column it makes 63-bit ids that
    sort by time, or with ``json_safe`` ids below 2^53, which JavaScript reads exactly and which do not tell the time.
    Integers below ``floor`` are older ids that carry no slot; they are found by asking every shard. On the shard key
    itself, any new id will do.

        id: Mapped[int] = mapped_column(BigInteger, primary_key=True, default=shardkit.slot_id())
    """
    return SlotId(json_safe=json_safe, floor=floor)


class SlotId(CallableColumnDefault):
    """What `slot_id` makes."""

    carries_slot = True

    def __init__(self, *, json_safe: bool = False, floor: int = 0) -> None:
        if type(floor) is not int or floor < 0:
            raise UsageError(f"The floor of ids is a number from 0 up, not {floor!r}.")
        self.json_safe = json_safe
        self.floor = floor
        super().__init__(self._make)

    def __new__(cls, *_: Any, **__: Any) -> SlotId:
        return object.__new__(cls)

    def _copy(self) -> SlotId:
        return SlotId(json_safe=self.json_safe, floor=self.floor)

    def _set_parent(self, parent: Any, **kw: Any) -> None:
        super()._set_parent(parent, **kw)
        event.listen(parent, "after_parent_attach", _check_added)

    def carrier(self) -> Carrier:
        """How the ids of this column carry their slot; `DeclarationError` if its type cannot hold them."""
        column: Any = self.column
        family = declare.key_family(column.type)
        if family == "uuid":
            return Carrier(Layout.UUID)
        if family != "int" or not declare.is_bigint(column.type):
            raise DeclarationError(
                f"{column} has a default of slot_id(), and its type {column.type!r} cannot hold such ids.",
                hint="Use BigInteger, or a UUID.",
            )
        return Carrier(Layout.COUNTED if self.json_safe else Layout.TIMED, self.floor)

    def _make(self, context: Any) -> Any:
        try:
            return self._next(context)
        except ShardkitError as error:
            raise unwrapped(error) from error.__cause__

    def _next(self, context: Any) -> Any:
        column: Any = self.column
        key = _key_of(column)
        slot = None if key is column else slot_of(_position(context, key))
        carrier = self.carrier()
        if carrier.layout is Layout.UUID:
            return _returned(column, _uuids.make(slot))
        leases = _leases(context)
        made = leases.timed(slot) if carrier.layout is Layout.TIMED else leases.counted(slot, carrier.floor)
        if made < carrier.floor:
            raise DeclarationError(
                f"The floor of {column} is {carrier.floor}, above the ids that are made now ({made}).",
                hint="It is the highest id of the rows that were there before, plus 1.",
            )
        return _returned(column, made)


def _key_of(column: Column[Any]) -> Column[Any]:
    if not declare.is_sharded(column.table):
        raise DeclarationError(
            f"{column} has a default of slot_id(), and its table no shard key.",
            hint="Put @sharded(by=...) above the class.",
        )
    return declare.key_column(column.table)


def _position(context: Any, key: Column[Any]) -> int:
    """The position of the row that an execution context is making."""
    value = _given(context, key)
    if isinstance(value, ClauseElement):
        raise UnroutableQuery(
            f"The shard key {key.table.name}.{key.name} is an expression, so the id's slot is not known.",
            hint="Give the key as a value.",
        )
    known = KeyColumn.of(key)
    return known.position(value if known.processor is None else known.processor(value))


def _given(context: Any, key: Column[Any]) -> Any:
    parameters = context.get_current_parameters()
    if key.key in parameters:
        return parameters[key.key]
    # A parameter of the statement's own name, as in values(user_id=bindparam("u")), or an expression.
    state = context.compiled.compile_state
    value: Any = None
    for name, given in (state._dict_parameters or {}).items():
        if (name if isinstance(name, str) else name.key) == key.key:
            value = given
    return parameters.get(value.key) if isinstance(value, BindParameter) else value


def _returned(column: Column[Any], made: Any) -> Any:
    """An id as the application has it: of a decorated type, of a UUID column that holds strings."""
    if isinstance(column.type, TypeDecorator):
        return column.type.process_result_value(made, DIALECT)
    return str(made) if getattr(column.type, "as_uuid", True) is False else made


# --- where integers come from --------------------------------------------------------------------------------------

_current: ContextVar[IdLeases | None] = ContextVar("shardkit_ids", default=None)
_of_process: IdLeases | None = None


def lease_ids(catalog: str | None) -> None:
    """Name the catalog whose leases integer ids are made with where no session over shards is at work: by a plain
    Session, or Core, on one database.

    The catalog may be that database: ``shardkit init --catalog URL`` makes one. None undoes it.
    """
    global _of_process
    if _of_process is not None:
        _of_process.release()
    _of_process = None if catalog is None else IdLeases(catalog)


class leasing:
    """Defaults that are evaluated in the block, before a shard is chosen, use these leases."""

    __slots__ = ("_leases", "_token")

    def __init__(self, leases: IdLeases | None) -> None:
        self._leases = leases

    def __enter__(self) -> None:
        self._token = _current.set(self._leases)

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


def _leases(context: Any) -> IdLeases:
    found = _current.get()
    if found is None and hasattr(type(context), "execution_options"):
        found = context.execution_options.get(LEASES)
    found = found or _of_process
    if found is None:
        raise UsageError(
            "Integer ids need leases, and no cluster is at work here.",
            hint="Name a catalog once with `shardkit.lease_ids(url)`, or use a UUID column, which needs none.",
        )
    return found


class _Uuids:
    """The UUIDs of this process."""

    def __init__(self) -> None:
        self.begin()
        os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        """Start anew: the child of a fork would step on from where its parent does."""
        self._lock = threading.Lock()
        self._maker = UuidMaker()

    def make(self, slot: int | None) -> UUID:
        """The next one, of any slot if None."""
        random = int.from_bytes(os.urandom(10))
        with self._lock:
            return self._maker.make(
                random >> RANDOM_BITS if slot is None else slot,
                time.time_ns() // 1_000_000,
                random & (1 << RANDOM_BITS) - 1,
            )


_uuids = _Uuids()


@cache
def _unwrapped(kind: type[ShardkitError]) -> type[ShardkitError]:
    def reduce(self: ShardkitError) -> tuple[Any, ...]:
        made: tuple[Any, ...] = kind(self.message, hint=self.hint, **self.fields).__reduce__()
        return made

    return type(kind.__name__, (kind, DontWrapMixin), {"__doc__": kind.__doc__, "__reduce__": reduce})


def unwrapped(error: ShardkitError) -> ShardkitError:
    """The error as SQLAlchemy passes it through, which wraps what is raised where it evaluates defaults."""
    kind: Any = type(error)
    return _unwrapped(kind)(error.message, hint=error.hint, **error.fields)


# --- the CHECK -----------------------------------------------------------------------------------------------------


def _check_added(column: Column[Any], table: Any) -> None:
    if isinstance(table, Table):
        table.append_constraint(SlotCheck(column))
