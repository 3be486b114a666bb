"""Vetting: whether every element of a statement is of a kind whose meaning is known.

Two questions: what may stand in a statement that runs on one shard, where only hidden FROMs are feared; and what may
stand in a scatter, where each value must be the same on any shard. The words that are known are in
`vocabulary`. Driven by the planner, on a `Recording`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sqlalchemy import CompoundSelect, Select

from .recorder import Compiled
from .refusals import Refusal
from .vocabulary import (
    INSERT_FUNCTIONS,
    ONE_SHARD_KINDS,
    READING_FUNCTIONS,
    SCATTER_FUNCTIONS,
)

_OPERATOR_TEXT = re.compile(r"[-+*/<>=~!@#%^&|`?]+|AND|OR|LIKE|ILIKE|SIMILAR TO|AT TIME ZONE", re.IGNORECASE)
_LITERAL_COLUMN = re.compile(r"\*|-?\d+|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*|'[^'\\]*'")
_FIELD = re.compile(r"\w+")


def vet_one_shard(compiled: Compiled) -> None:
    """`Refusal` if something in a statement might read rows that the proof does not see."""
    _kinds(compiled, ONE_SHARD_KINDS, "is not understood")
    _raw_sql(compiled)


def vet_scatter(compiled: Compiled, also: frozenset[str] = frozenset()) -> None:
    """`Refusal` if something in a statement would be another value on another shard. ``also`` are functions that are
    fine in this one."""
    for name in function_names(compiled):
        if name not in SCATTER_FUNCTIONS | also:
            raise Refusal(
                "function",
                f"the function {name}() is not known to return the same on all shards, so it runs on one",
            )
    _literals(compiled)


def vet_pulled(compiled: Compiled) -> None:
    """`Refusal` if a statement cannot run over rows that were read from other shards."""
    given = compiled.given
    if not isinstance(given, Select | CompoundSelect):
        raise Refusal("from-statement", "from_statement() runs on one shard")
    for name in function_names(compiled):
        if name not in READING_FUNCTIONS:
            raise Refusal(
                "function", f"the function {name}() is not known to only read, so it runs on one shard"
            )
    _literals(compiled)
    statements = [block.statement for block in compiled.recording.blocks]
    for statement in (given, *statements):
        if getattr(statement, "_for_update_arg", None) is not None:
            raise Refusal(
                "for-update", "FOR UPDATE of rows that are read from several shards is not supported"
            )


def _literals(compiled: Compiled) -> None:
    # What * stands for in a column list is known to the server alone; in EXISTS and count() it does not matter.
    listed = {
        id(column) for block in compiled.recording.blocks if block.parent is None for column in block.columns
    }
    for column in compiled.recording.elements.get("column", ()):
        name = str(column.name)
        if column.is_literal and not (
            re.fullmatch(r"-?\d+", name) or (name == "*" and id(column) not in listed)
        ):
            raise Refusal("raw-sql", f"the raw SQL {name!r} is not merged over shards")


def vet_insert_scatter(compiled: Compiled) -> None:
    """`Refusal` if an insert of rows on several shards has values that only one database could make."""
    for name in function_names(compiled):
        if name not in INSERT_FUNCTIONS:
            raise Refusal(
                "function", f"the function {name}() is not known to make values for rows of several shards"
            )


def reads_only(compiled: Compiled) -> bool:
    """Whether nothing in a SELECT can write: every function of it is known to only read."""
    return all(name in READING_FUNCTIONS for name in function_names(compiled))


def vet_without_tables(compiled: Compiled) -> None:
    """`Refusal` if a statement without a table would answer differently on another shard."""
    for name in function_names(compiled):
        if name not in READING_FUNCTIONS:
            raise Refusal(
                "function", f"the function {name}() has no shard to run on: no sharded table is named"
            )


def function_names(compiled: Compiled) -> Iterator[str]:
    """The functions of a statement; those of other schemas than ``pg_catalog`` with their schema."""
    return map(plain_name, compiled.recording.elements.get("function", ()))


def plain_name(function: Any) -> str:
    """The name of a function, with its schema if that is another than ``pg_catalog``."""
    packages = tuple(getattr(function, "packagenames", ()))
    name = str(function.name).lower()
    return name if packages in ((), ("pg_catalog",)) else ".".join((*packages, name))


def _kinds(compiled: Compiled, allowed: frozenset[str], verdict: str) -> None:
    if compiled.recording.foreign:
        raise Refusal("custom", f"the custom element {compiled.recording.foreign[0]} {verdict}")
    for kind in compiled.recording.kinds:
        if kind not in allowed:
            raise Refusal(
                _REASONS.get(kind, "unknown-element"), _TEXTS.get(kind, f"the element {kind!r} {verdict}")
            )


_REASONS = {"textclause": "text", "tstring": "text", "tstring_text": "text", "textual_select": "text"}
_TEXTS = dict.fromkeys(_REASONS, "text() can name any table") | {
    "over": "a window function needs all rows of its partition on one shard",
    "subquery": "a subquery runs on one shard",
    "cte": "a common table expression runs on one shard",
    "compound_select": "a set operation runs on one shard",
}


def _raw_sql(compiled: Compiled) -> None:
    """`Refusal` for SQL that is written out in elements which are fine otherwise."""
    elements = compiled.recording.elements
    for column in elements.get("column", ()):
        if column.is_literal and not _LITERAL_COLUMN.fullmatch(str(column.name)):
            raise Refusal("raw-sql", f"the raw SQL {column.name!r} can name any table")
    for kind in ("custom_op_binary", "custom_op_unary_modifier", "custom_op_unary_operator"):
        for element in elements.get(kind, ()):
            _operator(element)
    for extract in elements.get("extract", ()):
        if not _FIELD.fullmatch(str(extract.field)):
            raise Refusal("raw-sql", f"the raw SQL {extract.field!r} can name any table")
    for block in compiled.recording.blocks:
        if block.statement._hints or getattr(block.statement, "_statement_hints", ()):
            raise Refusal("hint", "a hint is SQL text that can name any table")


def _operator(element: Any) -> None:
    for operator in (getattr(element, "operator", None), getattr(element, "modifier", None)):
        text = getattr(operator, "opstring", None)
        if text is not None and not _OPERATOR_TEXT.fullmatch(text.strip()):
            raise Refusal("raw-sql", f"the raw SQL {text!r} can name any table")
