"""Freezing: what callables of bound parameters return is asked once, so that what is routed by is what is sent.

`bindparam(callable_=...)`, and comparisons of relationships with instances, have values that are made when they are
needed. The planner needs them, then SQLAlchemy does, on each shard, and nothing says that they are the same each time.
So the session freezes a statement after autoflush and before it is planned: a copy, and all that is derived from it,
has the values in its cache key, from which the planner and SQLAlchemy take them, also where compiled SQL is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from sqlalchemy import Executable
from sqlalchemy.sql.base import Generative
from sqlalchemy.sql.elements import BindParameter, ClauseElement
from sqlalchemy.sql.visitors import iterate

from shardkit.core.errors import UnroutableQuery


def frozen(statement: Executable) -> Executable:
    """The statement, with values in the place of callables."""
    given: Any = statement
    if not isinstance(given, Generative) or not isinstance(given, ClauseElement):
        return statement
    key = given._generate_cache_key()
    if key is None:
        return _without_cache_key(given)
    if not any(bind.callable for bind in key.bindparams):
        return statement
    kind: Any = type(given)
    class_ = _frozen_class(kind)
    copy: Any = class_.__new__(class_)
    copy.__dict__ = dict(given._generate().__dict__)
    copy._shardkit_frozen = _values(key.bindparams)
    return copy  # type: ignore[no-any-return]


def _values(binds: Iterable[BindParameter[Any]]) -> Mapping[str, Any]:
    """What the callables return, by the keys of their parameters. Of two parameters of one name, SQLAlchemy takes the
    last."""
    values: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    for bind in binds:
        if bind.callable and asked.get(bind.key) is not bind.callable:
            asked[bind.key] = bind.callable
            values[bind.key] = bind.effective_value
    return values


def _without_cache_key(statement: Any) -> Executable:
    """The same for a statement that SQLAlchemy compiles each time: by ``params()``, which count before callables."""
    for rows in getattr(statement, "_multi_values", ()):
        for row in rows:
            for value in row.values() if isinstance(row, Mapping) else row:
                if isinstance(value, ClauseElement) and _callables(value):
                    raise UnroutableQuery(
                        "A list of VALUES holds a bound parameter with a callable.",
                        hint="Give the value that it returns.",
                        reason="callable",
                    )
    binds = _callables(statement)
    return statement.params(_values(binds)) if binds else statement  # type: ignore[no-any-return]


def _callables(element: Any) -> list[BindParameter[Any]]:
    return [one for one in iterate(element) if isinstance(one, BindParameter) and one.callable]


class _Frozen:
    """A statement whose cache key holds values."""

    inherit_cache = True
    _shardkit_frozen: Mapping[str, Any]

    def _gen_cache_key(self, anon_map: Any, bindparams: list[BindParameter[Any]]) -> Any:
        before = len(bindparams)
        inherited: Any = super()
        key = inherited._gen_cache_key(anon_map, bindparams)
        for place in range(before, len(bindparams)):
            bind = bindparams[place]
            if bind.callable and bind.key in self._shardkit_frozen:
                value: Any = bind._clone(maintain_key=True)
                value.callable, value.value = None, self._shardkit_frozen[bind.key]
                bindparams[place] = value
        return key

    def _compile_w_cache(self, dialect: Any, *, compiled_cache: Any, **kw: Any) -> Any:
        # Values are taken from the cache key only where what was compiled is kept.
        kept = {} if compiled_cache is None else compiled_cache
        inherited: Any = super()
        return inherited._compile_w_cache(dialect, compiled_cache=kept, **kw)


@cache
def _frozen_class(statement: Any) -> Any:
    return type(f"Frozen{statement.__name__}", (_Frozen, statement), {"inherit_cache": True})
