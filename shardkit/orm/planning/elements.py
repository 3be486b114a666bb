"""Elements: small questions about SQLAlchemy's elements that several modules ask. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BooleanClauseList,
    ClauseList,
    FunctionFilter,
    Grouping,
    Label,
    WithinGroup,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import SelectBase

from .vocabulary import ALL_AGGREGATES


def is_set(clause: Any) -> bool:
    """Whether a clause of a statement was given."""
    return bool(clause) if isinstance(clause, tuple | bool) else clause is not None


CHOOSING = (
    "_limit_clause", "_offset_clause", "_fetch_clause", "_distinct_on", "_pre_columns_clause", "_post_select_clause",
    "_post_criteria_clause", "_post_body_clause",
)  # fmt: skip
"""Clauses of a SELECT, syntax extensions (among them DISTINCT ON) included, by which some rows decide about others."""


def chooses(core: Any) -> bool:
    """Whether a SELECT has such a clause."""
    return any(is_set(getattr(core, name, None)) for name in CHOOSING)


def conjuncts(condition: Any) -> Iterator[Any]:
    """The parts of a condition that are all true when it is."""
    condition = ungrouped(condition)
    if isinstance(condition, BooleanClauseList) and condition.operator is operators.and_:
        for part in condition.clauses:
            yield from conjuncts(part)
    else:
        yield condition


def ungrouped(element: Any) -> Any:
    """An element without its parentheses."""
    while isinstance(element, Grouping):
        element = element.element
    return element


def unlabelled(element: Any) -> Any:
    """An element without its label and parentheses."""
    element = ungrouped(element)
    while isinstance(element, Label) or getattr(element, "__visit_name__", "") == "label_reference":
        element = ungrouped(element.element)
    return element


def grouped_by(core: Any) -> list[Any]:
    """What a SELECT is grouped by, each without its label. (The ORM makes one list of several.)"""
    found: list[Any] = []
    todo = list(core._group_by_clauses)
    while todo:
        element = todo.pop(0)
        if isinstance(element, ClauseList):
            todo[:0] = element.clauses
        else:
            found.append(unlabelled(element))
    return found


def structure(element: Any) -> Any:
    """What an element has in common with those that are written like it, as SQLAlchemy tells statements apart by it;
    None if it has nothing of the kind."""
    key = element._generate_cache_key() if hasattr(element, "_generate_cache_key") else None
    return None if key is None else key.key


def is_aggregate(element: Any) -> bool:
    """Whether an element is an aggregate, with its FILTER if it has one."""
    function = element.func if isinstance(element, FunctionFilter) else element
    if isinstance(function, WithinGroup):  # rank() and its like are window functions elsewhere
        return True
    return (
        isinstance(function, FunctionElement) and str(getattr(function, "name", "")).lower() in ALL_AGGREGATES
    )


def own_elements(*roots: Any) -> Iterator[Any]:
    """The elements of a block's clauses, but not those of blocks inside it."""
    todo = list(roots)
    while todo:
        element = todo.pop()
        yield element
        if not isinstance(element, SelectBase):
            todo += element.get_children()
