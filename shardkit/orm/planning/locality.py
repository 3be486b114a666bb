"""Locality: whether what a block does with its rows can be done shard by shard, or key by key.

A block groups, numbers or selects rows by comparing them. Where it compares only rows of one shard key, it can be made
on each shard alone; and rows of other keys can be left out of it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Select, Table
from sqlalchemy.sql.elements import Over
from sqlalchemy.sql.selectable import SelectBase

from .closure import BlockProof, Node, holding, linked
from .elements import chooses, grouped_by, is_aggregate, own_elements, unlabelled

Rendered = Callable[[Any], str]
"""The name of a FROM in the SQL."""


def holds_key(elements: Iterable[Any], local: Sequence[Node], rendered: Rendered) -> bool:
    """Whether the shard key of one of the nodes is among the elements, or its whole primary key, which no two shards
    share: rows that are equal in all of the elements are then on one shard."""
    named: dict[int, set[str]] = {}
    for element in map(unlabelled, elements):
        if not local:
            break
        node = local[0].block.find_column(element, rendered)
        if node is None:
            continue
        if str(element.name) in node.keys and any(node is one for one in local):
            return True
        named.setdefault(id(node), set()).add(str(element.name))
    return any(_primary_key(node) <= named.get(id(node), set()) for node in local if _primary_key(node))


def _primary_key(node: Node) -> set[str]:
    """The names of the columns of the primary key of a FROM; none if it is derived."""
    table = node.source if isinstance(node.source, Table) else getattr(node.source, "element", None)
    if node.derived is not None or not isinstance(table, Table):
        return set()
    return {str(column.name) for column in table.primary_key.columns}


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


def keeps_keys_apart(proof: BlockProof, node: Node, rendered: Rendered) -> bool:
    """Whether the rows of a block that have a shard key of one of its FROMs, which it returns, depend on no rows that
    have another."""
    core, columns = proof.block.statement, proof.block.columns
    if not isinstance(core, Select) or chooses(core) or core._for_update_arg is not None:
        return False
    local = [
        one
        for one in linked(node, holding(proof.root, proof))
        if one.block is proof and one.scope is proof.root
    ]
    if is_grouped(core, columns) and not holds_key(grouped_by(core), local, rendered):
        return False
    return windows_hold_key(core, columns, local, rendered)
