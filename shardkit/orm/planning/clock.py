"""One clock: what time it is, said to all shards of a statement in the place of functions that tell it.

A compiler with one clock renders `now()` and its like as a parameter. What the planner derives (`prepared`) is compiled
by it; what runs on several shards as it was given, which is what writes, is compiled by it while its connection is
`telling` the time, with what SQLAlchemy adds only then: column defaults, criteria of options, expressions of types.
Which statements need it, `asks_the_time` says to the planner; who is asked, `orm.transaction`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, cast

from sqlalchemy import ColumnElement, Connection, Date, DateTime
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects.postgresql import TIME, TIMESTAMP
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import BindParameter

from shardkit.storage.dialect import WRITES

from .recorder import Compiled
from .vetting import function_names, plain_name
from .vocabulary import STEADY_TIMES, TIME_FUNCTIONS, TRANSACTION_TIMES

NOW, STARTED = "shardkit_now", "shardkit_started"
"""The parameters that are when the transaction and when the statement began, timestamps with time zone."""

Times = Mapping[str, Any]
"""Their values."""


def _timestamp(precision: int | None, *, timezone: bool = True) -> Any:
    made: Any = TIMESTAMP
    return made(timezone=timezone, precision=precision)


def _time(precision: int | None, *, timezone: bool = True) -> Any:
    made: Any = TIME
    return made(timezone=timezone, precision=precision)


_TYPES: dict[str, Callable[[int | None], Any]] = {
    "localtimestamp": lambda precision: _timestamp(precision, timezone=False),
    "current_date": lambda _: Date(),
    "current_time": _time,
    "localtime": lambda precision: _time(precision, timezone=False),
}

_told: ContextVar[Callable[[], Times]] = ContextVar("shardkit_times")


def _value_of(parameter: str) -> Callable[[], Any]:
    return lambda: _told.get()()[parameter]


_VALUES = {parameter: _value_of(parameter) for parameter in (NOW, STARTED)}


class _OneClock:
    """A compiler that renders functions which tell the time, those of ``times``, as parameters."""

    times: frozenset[str]

    def visit_function(self, func: Any, add_to_result_map: Any = None, **kw: Any) -> str:
        inherited: Any = super()
        made = self._told(func)
        if made is None:
            return str(inherited.visit_function(func, add_to_result_map=add_to_result_map, **kw))
        if add_to_result_map is not None:
            add_to_result_map(func.name, func.name, (func.name,), func.type)
        return str(inherited.process(made, **kw))

    def _told(self, func: Any) -> ColumnElement[Any] | None:
        """What stands for a function; None for those that stay, with arguments that no server takes among them."""
        name = plain_name(func)
        if name not in self.times:
            return None
        arguments = [str(one) for one in func.clauses]
        if len(arguments) > 1 or not all(one.isdecimal() for one in arguments):
            return None
        precision = int(arguments[0]) if arguments else None
        parameter = NOW if name in TRANSACTION_TIMES else STARTED
        value = BindParameter(parameter, callable_=_VALUES[parameter], type_=DateTime(timezone=True))
        return sql_cast(value, _TYPES[name](precision) if name in _TYPES else _timestamp(precision))


@cache
def one_clock(compiler: Any, times: frozenset[str] = TIME_FUNCTIONS) -> Any:
    """The compiler of a dialect, with a parameter in the place of functions that tell the time."""
    return type("OneClock", (_OneClock, compiler), {"times": times})


def asks_the_time(compiled: Compiled) -> bool:
    """Whether a statement names a function that tells the time."""
    return not TIME_FUNCTIONS.isdisjoint(function_names(compiled))


def ask(connection: Connection) -> Times:
    """What time it is on one shard."""
    options = {WRITES: False}
    asked = connection.exec_driver_sql("SELECT now(), clock_timestamp()", execution_options=options)
    now, started = asked.one()
    return {NOW: now, STARTED: started}


# --- statements that run as they are -------------------------------------------------------------------------------

_CLOCKED = "_shardkit_one_clock"


@contextmanager
def telling(connection: Connection, times: Callable[[], Times]) -> Iterator[None]:
    """What is executed on the connection in the block has these times, which are asked for where they are needed."""
    dialect, token = connection.dialect, _told.set(times)
    connection.dialect = _with_one_clock(dialect)
    try:
        yield
    finally:
        connection.dialect = dialect
        _told.reset(token)


def _with_one_clock(dialect: Dialect) -> Dialect:
    """The dialect as it is, but for its compiler: so SQLAlchemy keeps what it compiles apart."""
    known: Dialect | None = getattr(dialect, _CLOCKED, None)
    if known is None:
        compiler = one_clock(cast(Any, dialect.statement_compiler), STEADY_TIMES)
        own = {"statement_compiler": compiler, "supports_statement_cache": True}
        made: Any = object.__new__(type(f"OneClock{type(dialect).__name__}", (type(dialect),), own))
        made.__dict__ = dialect.__dict__  # one state, whatever is found out later
        known = made
        setattr(dialect, _CLOCKED, known)
    assert known is not None
    return known
