"""Prepared statements: SQL that the planner derives from an application's statement, compiled once a shape.

What runs on the shards of a scatter is not the statement as it was given but one derived from it: with hidden columns,
another LIMIT, the ownership predicate; and with one clock (`clock`). It is compiled when the shape is proved; each call
only looks up the values of its parameters, as `recorder.Slot` finds them. Results are rows as the driver gives them.
All that is private in how SQLAlchemy executes compiled SQL is used here alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from sqlalchemy import CursorResult
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import BindParameter, ClauseElement

from .clock import NOW, STARTED, one_clock
from .recorder import MISSING, Call, Compiled, Slot
from .refusals import Refusal


class Prepared(Executable, ClauseElement):
    """A derived statement. ``own`` are the names of the parameters that it has beside those of the original,
    ``instead`` what stands in it in the place of a SELECT of the original, by `id`."""

    inherit_cache = False
    __visit_name__ = "shardkit_prepared"

    def __init__(
        self,
        dialect: Dialect,
        statement: Any,
        compiled: Compiled,
        own: Mapping[str, Any] | None = None,
        instead: Mapping[int, Any] | None = None,
    ) -> None:
        derived = statement._generate()
        # The columns of mapped classes bring the ORM's compilation with them, which was done already.
        derived._propagate_attrs = derived._propagate_attrs.__class__()
        self.compiled: Any = _compiler(dialect, compiled, instead or {})(dialect, derived)
        self._own = dict(own or {})
        self._slots: dict[str, Slot] = {}
        for bind in self.compiled.bind_names:
            if bind.key not in self._own and bind.key not in (NOW, STARTED):
                self._slots[bind.key] = _slot(compiled, bind)

    def values(
        self, call: Call, parameters: Mapping[str, Any], own: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The parameters of one call. ``own`` are those of its own, and values for others than the call's."""
        found = {name: slot.value(call, parameters) for name, slot in self._slots.items()}
        given = {name: value for name, value in found.items() if value is not MISSING}
        return {**self._own, **given, **(own or {})}

    def __str__(self) -> str:
        return str(self.compiled)

    # --- SQLAlchemy's private side ---------------------------------------------------------------------------------

    def _execute_on_connection(self, connection: Any, parameters: Any, options: Any) -> Any:
        return connection._execute_clauseelement(self, parameters, options)

    def _compile_w_cache(self, dialect: Any, **_: Any) -> Any:
        return self.compiled, None, None, dialect.CACHING_DISABLED


ONCE = "shardkit_once"
"""The parameter that is true on one shard: the one that makes the rows which any shard can make."""


def _compiler(dialect: Dialect, compiled: Compiled, instead: Mapping[int, Any]) -> Any:
    """A compiler that knows of the criteria of options (`with_loader_criteria`): they are in the statement by now, but
    subqueries of it, which it compiles as the ORM does, look for them there. And of what is to stand in the place of
    some SELECTs."""
    base = one_clock(cast(Any, dialect.statement_compiler))

    def visit_select(self: Any, element: Any, *args: Any, **kw: Any) -> Any:
        return base.visit_select(self, instead.get(id(element), element), *args, **kw)

    own = {"visit_select": visit_select} if instead else {}
    attributes = dict(compiled.compiler._global_attributes)
    return type("Derived", (base,), {"_global_attributes": attributes, **own})


def _slot(compiled: Compiled, bind: BindParameter[Any]) -> Slot:
    slot = compiled.slot(bind)
    if slot is None:
        raise Refusal("derived", f"the value {bind.key} of it cannot be told apart")
    return slot


def raw_rows(result: CursorResult[Any]) -> tuple[Any, list[Any]]:
    """What the driver's cursor says of the columns of a result, and all of its rows as the driver gives them."""
    cursor: Any = result.cursor
    description, rows = cursor.description, list(cursor.fetchall())
    result.close()
    return description, rows


def raw_stream(result: CursorResult[Any], at_hand: int) -> Iterator[Any]:
    """The rows of a result as the driver gives them, fetched ``at_hand`` at a time."""
    while result.cursor is not None:
        # The strategy has fetched the first row already.
        yield from result.cursor_strategy.fetchmany(result, result.cursor, at_hand)
