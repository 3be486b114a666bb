"""The CHECK by which a server refuses an id that carries another slot than its row's shard key has.

It stands in ``Table.constraints``, so ``create_all`` on any engine and Alembic make it; it says nothing but
PostgreSQL's own hash functions, so it holds on a plain database too. What it compares is found when it is rendered, as
a class is declared sharded after its table is made; on other servers than PostgreSQL, and on the shard key itself,
there is none.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Integer,
    Table,
    func,
    literal_column,
    or_,
    type_coerce,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import conv

from shardkit.core.ids import SLOT_MASK, SLOT_SHIFT, UUID_VERSION, Carrier, Layout
from shardkit.core.keyrange import SLOT_BITS, SLOTS
from shardkit.storage.predicate import HASH_FUNCTIONS

from . import declare

_NAME_BYTES = 63


class SlotCheck(CheckConstraint):
    """CHECK (slot of the id = slot of the shard key); one a column."""

    def __init__(self, column: Column[Any]) -> None:
        self.of = column
        name = f"shardkit_slot_of_{column.name}"
        super().__init__(
            _SameSlot(column),
            name=conv(name if len(name.encode()) <= _NAME_BYTES else "shardkit_slot"),
        )
        applies: Any = _applies
        self.ddl_if(callable_=applies)

    @property
    def _type_bound(self) -> bool:
        """For Alembic, which does not ask `_applies`: it leaves a constraint out that comes with its column."""
        return _compared(self.of) is None

    @_type_bound.setter
    def _type_bound(self, _: bool) -> None:
        pass

    def _set_parent(self, parent: Any, **kw: Any) -> None:
        # A copy of a table copies its columns, whose defaults bring the constraint, and the constraint again.
        standing = [c for c in parent.constraints if isinstance(c, SlotCheck) and c.of.name == self.of.name]
        if not standing:
            super()._set_parent(parent, **kw)

    def copy(self, *, target_table: Table | None = None, **_: Any) -> Any:
        """For the copy of a table."""
        return SlotCheck(self.of if target_table is None else target_table.columns[self.of.key])

    _copy = copy


def _applies(ddl: Any, target: Any, bind: Any, dialect: Any, **_: Any) -> bool:
    return dialect.name == "postgresql" and _compared(target.of) is not None


class _SameSlot(ColumnElement[bool]):
    """The condition, found when it is rendered."""

    type = Boolean()
    inherit_cache = False

    def __init__(self, column: Column[Any]) -> None:
        self.column = column


@compiles(_SameSlot)
def _render(element: _SameSlot, compiler: Any, **kw: Any) -> str:
    condition = _compared(element.column)
    rendered: str = compiler.process(literal_column("true") if condition is None else condition, **kw)
    return rendered


def _compared(column: Column[Any]) -> ColumnElement[bool] | None:
    if not declare.is_sharded(column.table) or declare.key_column(column.table) is column:
        return None
    default: Any = column.default
    key = declare.key_column(column.table)
    family = declare.key_family(key.type)
    if family is None:
        return None
    # A bigint is shifted with its sign, so what comes out is -32768 to 32767, in ring order.
    function = getattr(func.pg_catalog, HASH_FUNCTIONS[family])
    position: ColumnElement[int] = function(key, _number(0), type_=BigInteger())
    of_key = position.bitwise_rshift(_number(SLOT_BITS)) + _number(SLOTS // 2)
    return _carried(column, default.carrier(), of_key)


def _carried(column: Column[Any], carrier: Carrier, of_key: ColumnElement[int]) -> ColumnElement[bool]:
    if carrier.layout is Layout.UUID:
        raw: Any = func.pg_catalog.uuid_send(column)
        octet = func.pg_catalog.get_byte
        low = octet(raw, _number(14), type_=Integer()) * _number(256)
        slot = low + octet(raw, _number(15), type_=Integer())
        version = octet(raw, _number(6), type_=Integer()).bitwise_rshift(_number(4))
        return or_(version != _number(UUID_VERSION), slot == of_key)
    value: ColumnElement[int] = type_coerce(column, BigInteger())
    shift = SLOT_SHIFT if carrier.layout is Layout.TIMED else 0
    shifted = value.bitwise_rshift(_number(shift)) if shift else value
    of_id = shifted.bitwise_and(_number(SLOT_MASK))
    return or_(value < _number(carrier.floor), of_id == of_key)


def _number(value: int) -> ColumnElement[int]:
    return literal_column(str(value), Integer())
