"""Splitting: giving each shard its own part of a bound list of keys.

The statement keeps its shape, so SQLAlchemy and the server have it compiled already; only the bound list differs. A
list given as a parameter is replaced there; one inside the statement by a copy of the condition that holds it. Driven
by the planner's scatter; what it cannot split it says, and the whole list is sent with the ownership predicate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.sql.visitors import iterate, replacement_traverse

from .plan import ShardPart
from .recorder import Call, Slot


def with_list(
    statement: Any, parameters: Mapping[str, Any], slot: Slot, call: Call, values: list[Any]
) -> ShardPart | None:
    """The statement with another list in the place of a bound one; None if that cannot be done."""
    cache_key = statement._generate_cache_key()
    in_statement = call.params or {}
    for name in (slot.key, slot.name):
        if name in parameters or name in in_statement:
            return ShardPart(statement, {**parameters, name: values})
    if call.bindparams is None or slot.index is None or cache_key is None or slot.bind.callable:
        return None
    bind = call.bindparams[slot.index]
    replaced = [_replaced(criterion, bind, values) for criterion in statement._where_criteria]
    if sum(new is not old for new, old in zip(replaced, statement._where_criteria, strict=True)) != 1:
        return None
    copy = statement._generate()
    copy._where_criteria = tuple(replaced)
    again = copy._generate_cache_key()
    same = again is not None and again.key == cache_key.key and again.bindparams[slot.index].value is values
    return ShardPart(copy, parameters) if same else None


def _replaced(criterion: Any, bind: BindParameter[Any], values: list[Any]) -> Any:
    if not any(element is bind for element in iterate(criterion)):
        return criterion

    def replace(element: Any, **_: Any) -> Any:
        if element is not bind:
            return None
        copy = bind._clone(maintain_key=True)
        copy.value = values
        return copy

    return replacement_traverse(criterion, {}, replace)
