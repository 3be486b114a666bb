"""Scatter: whether a statement may run on several shards, and how its results become one.

A block may scatter if all its sharded FROMs have one shard key by inner joins, so that each of its rows is made on one
shard, and if what it does with the rows can be done shard by shard: plain rows, and COUNT, SUM, MIN, MAX of integers.
Everything else is refused by name. Driven by the planner; pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Delete, Select, Table, Update
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import FunctionFilter, Label
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import Alias
from sqlalchemy.sql.visitors import iterate
from sqlalchemy.types import TypeDecorator

from shardkit.core.keyrange import POSITION_MIN, Arc, ArcSet
from shardkit.core.topology import ShardedTable

from . import declare
from .gather import Aggregates, Merge, Rows
from .ownership import owned_only
from .proof import BlockProof, Node, holding, linked, prove, ungrouped
from .recorder import Compiled
from .refusals import Refusal
from .vetting import vet_scatter
from .vocabulary import AGGREGATES, ORDER_KINDS

Compile = Callable[[Any], Compiled]
"""Compiles and records a statement."""


@dataclass(frozen=True, slots=True)
class Scatter:
    """A statement that may run on several shards: ``anchor`` is a FROM of it; the shard keys of all others equal its.

    A table is the same object in all statements of one shape, but an alias is each statement's own: ``place`` is that
    of the anchor among the aliases of a statement, None for a table.
    """

    anchor: Node
    merge: Merge
    place: int | None

    def owned_only(self, statement: Any, owned: ArcSet, in_transit: ArcSet, compile_: Compile) -> Any:
        """The statement with the ownership predicate of a shard."""
        restricted = self._restricted(statement, owned, in_transit)
        if self.place is not None:
            self._check(compile_(restricted))
        return restricted

    def rehearse(self, compiled: Compiled, compile_: Compile) -> None:
        """`Refusal` if the ownership predicate cannot be put into statements of this shape, whether or not a shard
        needs it today: what is refused does not depend on the topology."""
        half = ArcSet([Arc(POSITION_MIN, -1)])
        self._check(compile_(self._restricted(compiled.given, half, ~half)))

    def _restricted(self, statement: Any, owned: ArcSet, in_transit: ArcSet) -> Any:
        source = self.anchor.source if self.place is None else _aliases(statement)[self.place]
        column = _key_of(source, self.anchor.table)
        return statement.where(owned_only(column, self.anchor.table.key_type, owned, in_transit))

    def _check(self, compiled: Compiled) -> None:
        seen = [_tables(block) for block in prove(compiled)]
        if seen != [_tables(self.anchor.block)]:
            raise _no_place()


def _no_place() -> Refusal:
    return Refusal(
        "predicate", "rows in transit cannot be kept out of it, because of how its FROMs are aliased"
    )


def _key_of(source: Any, table: ShardedTable) -> ColumnElement[Any]:
    for column in source.c:
        if str(column.name) == table.key:
            found: ColumnElement[Any] = column
            return found
    raise _no_place()


def _aliases(statement: Any) -> list[Any]:
    """The aliases of a statement; in the same order for statements of one shape."""
    found: dict[int, Any] = {}
    for element in iterate(statement):
        if isinstance(element, Alias):
            found.setdefault(hash(element), element)  # annotated copies hash alike
    return list(found.values())


def _anchored(compiled: Compiled, proof: BlockProof) -> tuple[Node, int | None]:
    """The anchor and its place: a table if there is one."""
    for node in proof.nodes:
        if isinstance(node.source, Table):
            return node, None
    for node in proof.nodes:
        for place, alias in enumerate(_aliases(compiled.given)):
            if hash(alias) == hash(node.source):
                return node, place
    raise _no_place()


def _tables(block: BlockProof) -> dict[str, ShardedTable | None]:
    return {name: None if node is None else node.table for name, node in block.names.items()}


def scatter(compiled: Compiled, proofs: list[BlockProof], compile_: Compile) -> Scatter:
    """How a statement runs on several shards; `Refusal` if that could answer differently from one database.
    ``compile_`` records another statement of the same parameters."""
    statement = compiled.given
    if statement.is_from_statement:
        raise Refusal("from-statement", "from_statement() runs on one shard")
    if not isinstance(statement, Select | Update | Delete):
        raise Refusal("set-operation", "a set operation runs on one shard")
    if len(proofs) != 1:
        raise Refusal("subquery", "a subquery runs on one shard")
    (proof,) = proofs
    if proof.outer_join:
        raise Refusal("outer-join", "an outer join runs on one shard")
    _only_nodes(proof)
    _one_key(proof)
    if compiled.returns_defaults:
        raise Refusal(
            "synchronize",
            "objects of the session are not synchronized by rows that several shards return",
            hint="Use the execution option synchronize_session='evaluate' or False.",
        )
    grouped = _is_grouped_by_key(compiled, proof)
    _no_clauses(proof.block.statement, except_order=grouped)
    vet_scatter(compiled, ORDER_KINDS if grouped else frozenset())
    anchor, place = _anchored(compiled, proof)
    found = Scatter(anchor, _merge(compiled, proof), place)
    found.rehearse(compiled, compile_)
    return found


def _only_nodes(proof: BlockProof) -> None:
    for name, node in proof.names.items():
        if node is None:
            raise Refusal("derived", f"{name} in its FROM runs on one shard")


def _one_key(proof: BlockProof) -> None:
    anchor, *others = proof.nodes
    together = {id(node) for node in linked(anchor, holding(proof.root, proof))}
    for node in others:
        if id(node) not in together:
            raise Refusal(
                "not-co-located",
                f"{node} and {anchor} are not joined by their shard keys",
                hint=f"Join on {node} = {anchor}, or bind both to one value.",
            )


_CLAUSES: dict[str, tuple[str, str]] = {
    "_order_by_clauses": ("order-by", "ORDER BY"),
    "_group_by_clauses": ("group-by", "GROUP BY"),
    "_having_criteria": ("having", "HAVING"),
    "_limit_clause": ("limit", "LIMIT"),
    "_offset_clause": ("limit", "OFFSET"),
    "_fetch_clause": ("limit", "FETCH"),
    "_distinct": ("distinct", "DISTINCT"),
    "_distinct_on": ("distinct", "DISTINCT ON"),
    "_for_update_arg": ("for-update", "FOR UPDATE"),
    "_independent_ctes": ("cte", "WITH"),
    "_prefixes": ("prefix", "a prefix"),
    "_suffixes": ("prefix", "a suffix"),
    "_post_select_clause": ("extension", "a syntax extension"),
    "_pre_columns_clause": ("extension", "a syntax extension"),
    "_post_criteria_clause": ("extension", "a syntax extension"),
    "_post_body_clause": ("extension", "a syntax extension"),
}


def _is_grouped_by_key(compiled: Compiled, proof: BlockProof) -> bool:
    """Whether this is the statement of a ``selectinload``: it asks for the rows of many parents by a list of their
    keys, and puts those with equal keys together. Rows of one shard key are on one shard, so the order in which that
    returns them is all that ORDER BY is for."""
    path = getattr(getattr(compiled.given, "_compile_options", None), "_current_path", None)
    if path is None or path.is_root:
        return False
    return any(
        one.listed and one.single and one.slot.key == "primary_keys" for one in proof.nodes[0].constraints
    )


def _no_clauses(statement: Any, *, except_order: bool) -> None:
    for attribute, (reason, name) in _CLAUSES.items():
        if except_order and attribute == "_order_by_clauses":
            continue
        value = getattr(statement, attribute, None)
        if bool(value) if isinstance(value, tuple | bool) else value is not None:
            raise Refusal(reason, f"{name} is not merged over shards")


# --- merging -------------------------------------------------------------------------------------------------------


def _merge(compiled: Compiled, proof: BlockProof) -> Merge:
    columns = [_unlabelled(column) for column in proof.block.columns]
    names = [_aggregate(column) for column in columns]
    seen = [f for f in compiled.recording.elements.get("function", ()) if str(f.name).lower() in AGGREGATES]
    merged = [name for name in names if name is not None]
    if not seen:
        return Rows(_identities(compiled, proof, columns))
    if len(merged) < len(columns) or len(seen) != len(merged):
        raise Refusal(
            "aggregate",
            "an aggregate is merged over shards only as a column of its own, beside no plain column",
        )
    for element in compiled.recording.elements.get("unary", ()):
        if element.operator is operators.distinct_op:
            raise Refusal("aggregate-distinct", "an aggregate of distinct values is not merged over shards")
    return Aggregates(tuple(merged))


def _unlabelled(column: Any) -> Any:
    column = ungrouped(column)
    while isinstance(column, Label):
        column = ungrouped(column.element)
    return column


def _aggregate(column: Any) -> Any:
    """The name of a merged aggregate that a column is, or None."""
    function = column.func if isinstance(column, FunctionFilter) else column
    if not isinstance(function, FunctionElement):
        return None
    name = str(getattr(function, "name", "")).lower()
    if name not in AGGREGATES:
        return None
    if name != "count":
        for type_ in (function.type, *(argument.type for argument in function.clauses)):
            if isinstance(type_, TypeDecorator) or declare.key_family(type_) != "int":
                raise Refusal(
                    "aggregate-type",
                    f"{name.upper()} of values that are no integers is not merged over shards",
                )
    return name


def _identities(compiled: Compiled, proof: BlockProof, columns: list[Any]) -> tuple[tuple[int, ...], ...]:
    """The places of the primary keys among the columns: equal ones on two shards are a conflict."""
    if not isinstance(compiled.statement, Select):
        return ()
    places: dict[tuple[str, str], int] = {}
    for place, column in enumerate(columns):
        table = getattr(column, "table", None)
        if table is not None:
            places.setdefault((compiled.rendered_name(table), str(column.name)), place)
    found: list[tuple[int, ...]] = []
    for node in proof.nodes:
        table = node.source if isinstance(node.source, Table) else node.source.element
        wanted = [places.get((node.name, str(column.name))) for column in table.primary_key.columns]
        here = [place for place in wanted if place is not None]
        if here and len(here) == len(wanted):
            found.append(tuple(here))
    return tuple(found)
