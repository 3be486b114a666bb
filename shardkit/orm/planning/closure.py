"""The closure: what the rows of each sharded FROM of a block are bound to, by equalities that hold for them.

The data of a proof and how it is closed; `proof` reads a statement into it. Equalities are closed transitively
where they hold (`Scope`); a FROM of a subquery is bound through one of a block around it; a subquery in a FROM is bound
by its body, and its body by it. Pure: sees no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy.sql.elements import ColumnClause

from shardkit.core.topology import DeclaredTable, HomeTable, KeyType, ReferenceTable, ShardedTable

from .idrouting import IdConstraint
from .recorder import Block, Slot


@dataclass(frozen=True, slots=True, eq=False)
class Constraint:
    """A shard key equals one bound value, or one of a bound list (``listed``); ``part`` is its place in a list of
    tuples. ``single`` says that the value is used nowhere else; ``column`` names the key for people."""

    slot: Slot
    family: KeyType
    listed: bool
    part: int | None
    single: bool
    column: str


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A shard key is bound by each branch of an OR, by all of the constraints of one branch or another."""

    branches: tuple[tuple[Constraint, ...], ...]
    column: str


Bound = Constraint | Choice


@dataclass(slots=True, eq=False)
class Scope:
    """Conditions that hold together, wherever the FROMs of this part of a FROM clause are present."""

    parent: Scope | None = None
    links: list[tuple[Node, Node]] = field(default_factory=list)
    bounds: list[tuple[Node, Bound]] = field(default_factory=list)
    ids: list[tuple[Node, IdConstraint]] = field(default_factory=list)

    def mentioned(self) -> Iterator[Node]:
        """The nodes that are present where this scope holds, as its equalities are not of NULL."""
        for link in self.links:
            yield from link
        for node, _ in (*self.bounds, *self.ids):
            yield node

    def chain(self) -> Iterator[Scope]:
        """This scope and those around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent


@dataclass(slots=True, eq=False)
class Node:
    """One sharded FROM of one block: a table, or an alias of one. ``present`` is whether every row of the block has a
    row of it, so that the block is empty where no value fits the ``constraints``. ``ids`` leave slots, not positions.

    Or a subquery or common table expression, ``derived`` from the FROM of its body whose shard key it returns;
    ``table`` is then that one's. ``keys`` are the names of the columns that are its shard key. Where its body is a set
    operation, ``branches`` are the blocks of that, and for each the FROM on whose shard its rows are made; such a one
    may return no shard key.
    """

    name: str
    table: ShardedTable
    source: Any
    block: BlockProof
    scope: Scope
    keys: frozenset[str]
    derived: Node | None = None
    branches: tuple[Branch, ...] = ()
    deriving: list[Node] = field(default_factory=list)
    """The FROMs that are derived from this one, row by row of its keys."""
    constraints: tuple[Bound, ...] = ()
    ids: tuple[IdConstraint, ...] = ()
    present: bool = False

    def __str__(self) -> str:
        return f"{self.name}.{min(self.keys)}" if self.keys else self.name

    @property
    def key(self) -> Any:
        """A column of it that is its shard key."""
        return next(column for column in self.source.c if str(column.name) in self.keys)


class Branch(NamedTuple):
    """One branch of a set operation: its block, and the FROM of it on whose shard each of its rows is made; None if it
    reads no sharded table, so that any shard makes them."""

    block: BlockProof
    anchor: Node | None


@dataclass(slots=True, eq=False)
class BlockProof:
    """What is known of one block. ``names`` are those of its FROMs; the ones that are no nodes have None, but those of
    reference and home tables, which are in ``references`` and ``homes``. ``strange`` are nodes whose shard key is
    compared with a bound value of another type."""

    block: Block
    parent: BlockProof | None
    root: Scope = field(default_factory=Scope)
    nodes: list[Node] = field(default_factory=list)
    names: dict[str, Node | None] = field(default_factory=dict)
    references: dict[str, ReferenceTable] = field(default_factory=dict)
    homes: dict[str, HomeTable] = field(default_factory=dict)
    strange: list[Node] = field(default_factory=list)
    read: bool = False
    aggregated_from_inside: bool = False
    """Whether a block of the statement has an aggregate of the rows of one around it."""
    conditions: list[tuple[Any, Scope]] = field(default_factory=list)
    """Each conjunct of WHERE and ON, and where it holds."""

    def tables(self) -> Iterator[DeclaredTable]:
        """The table of each FROM that is one."""
        for node in self.nodes:
            if node.derived is None:
                yield node.table
        yield from self.references.values()
        yield from self.homes.values()

    def find(self, name: str) -> Node | None:
        """The sharded FROM that a qualified column names, here or in a block around this one; None if it is another
        kind of FROM or unknown."""
        block: BlockProof | None = self
        while block is not None:
            if name in block.names:
                return block.names[name]
            if name in block.references or name in block.homes:
                return None
            block = block.parent
        return None

    def find_column(self, element: Any, rendered: Callable[[Any], str]) -> Node | None:
        """The node that a bare column is of; ``rendered`` tells the name of a FROM."""
        if not isinstance(element, ColumnClause) or element.table is None or element.is_literal:
            return None
        return self.find(rendered(element.table))

    def find_key(self, element: Any, rendered: Callable[[Any], str]) -> Node | None:
        """The node whose shard key a bare column is."""
        node = self.find_column(element, rendered)
        return node if node is not None and str(element.name) in node.keys else None


def close(proof: BlockProof) -> None:
    """The constraints of each node of a block; those of the blocks around it are known."""
    everywhere = holding(proof.root, proof)
    for node in proof.nodes:
        node.present = any(scope is node.scope for scope in everywhere)
        scopes = holding(node.scope, proof)
        found: dict[int, Bound] = {}
        ids: dict[int, IdConstraint] = {}
        for reached in linked(node, scopes):
            if reached.derived is not None and not reached.branches:
                found.update((id(constraint), constraint) for constraint in reached.derived.constraints)
            own = [constraint for scope in scopes for bound, constraint in scope.bounds if bound is reached]
            inherited = reached.constraints if reached.block is not proof else ()
            found.update((id(constraint), constraint) for constraint in (*own, *inherited))
            own_ids = [constraint for scope in scopes for bound, constraint in scope.ids if bound is reached]
            inherited_ids = reached.ids if reached.block is not proof else ()
            ids.update((id(constraint), constraint) for constraint in (*own_ids, *inherited_ids))
        node.constraints = tuple(found.values())
        node.ids = tuple(ids.values())


def holding(scope: Scope, proof: BlockProof) -> list[Scope]:
    """All scopes that hold where this one does: those around it, and those of the nodes that their equalities show
    to be present."""
    found: dict[int, Scope] = {}
    todo = list(scope.chain())
    while todo:
        one = todo.pop()
        if id(one) in found:
            continue
        found[id(one)] = one
        for node in one.mentioned():
            if node.block is proof:
                todo += node.scope.chain()
    return list(found.values())


def linked(start: Node, scopes: Sequence[Scope]) -> list[Node]:
    """The nodes whose shard keys equal that of ``start`` where all of ``scopes`` hold, itself included."""
    found: dict[int, Node] = {id(start): start}
    todo = [start]
    while todo:
        node = todo.pop()
        for scope in scopes:
            for a, b in scope.links:
                other = b if a is node else a if b is node else None
                if other is not None and id(other) not in found:
                    found[id(other)] = other
                    todo.append(other)
    return list(found.values())


def push_down(proof: BlockProof) -> None:
    """What binds a FROM that is derived binds the FROMs of its body, or of all branches of it, which have that key, if
    nothing else is derived from them: rows with other keys are not asked for."""
    for node in proof.nodes:
        for inner in [node.derived] if not node.branches else [branch.anchor for branch in node.branches]:
            if inner is None or inner.deriving != [node]:
                continue
            for one in inner.block.nodes:
                if any(other is inner for other in linked(one, holding(one.scope, one.block))):
                    one.constraints = tuple(dict.fromkeys((*one.constraints, *node.constraints)))
                    one.ids = tuple(dict.fromkeys((*one.ids, *node.ids)))
            push_down(inner.block)
