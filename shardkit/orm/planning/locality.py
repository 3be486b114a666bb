"""Locality: whether what a block does with its rows can be done shard by shard, or key by key.

A block groups, numbers or selects rows by comparing them. Where it compares only rows of one shard key, it can be made
on each shard alone; and rows of other keys can be left out of it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Select
from sqlalchemy.sql.elements import Over
from sqlalchemy.sql.selectable import SelectBase

from .closure import BlockProof, Node, holding, linked
from .elements import grouped_by, is_aggregate, is_set, own_elements, unlabelled

Rendered = Callable[[Any], str]
"""The name of a FROM in the SQL."""


def holds_key(elements: Iterable[Any], local: Sequence[Node], rendered: Rendered) -> bool:
    """Whether the shard key of one of the nodes is among the elements: rows that are equal in all of them are then on
    one shard."""
    if not local:
        return False
    found = (local[0].block.find_key(unlabelled(element), rendered) for element in elements)
    return any(node is one for node in found for one in local)


def is_grouped(core: Any, columns: Iterable[Any]) -> bool:
    """Whether a block makes groups of its rows."""
    if core._group_by_clauses or core._having_criteria:
        return True
    todo = [*columns, *core._order_by_clauses]
    while todo:
        element = todo.pop()
        if isinstance(element, Over):
            # What it is a window of is no aggregate; its arguments may be.
            todo += [child for child in element.get_children() if child is not element.element]
            todo += element.element.get_children()
        elif is_aggregate(element):
            return True
        elif not isinstance(element, SelectBase):
            todo += element.get_children()
    return False


def windows_hold_key(core: Any, columns: Iterable[Any], local: Sequence[Node], rendered: Rendered) -> bool:
    """Whether every window of a block has the shard key in its PARTITION BY."""
    for element in own_elements(*columns, *core._order_by_clauses):
        if isinstance(element, Over):
            partition = element.partition_by
            if partition is None or not holds_key(partition, local, rendered):
                return False
    return True


_CUTS = ("_limit_clause", "_offset_clause", "_fetch_clause", "_distinct_on", "_for_update_arg")


def keeps_keys_apart(proof: BlockProof, node: Node, rendered: Rendered) -> bool:
    """Whether the rows of a block that have a shard key of one of its FROMs, which it returns, depend on no rows that
    have another."""
    core, columns = proof.block.statement, proof.block.columns
    if not isinstance(core, Select) or any(is_set(getattr(core, name, None)) for name in _CUTS):
        return False
    local = [
        one
        for one in linked(node, holding(proof.root, proof))
        if one.block is proof and one.scope is proof.root
    ]
    if is_grouped(core, columns) and not holds_key(grouped_by(core), local, rendered):
        return False
    return windows_hold_key(core, columns, local, rendered)
