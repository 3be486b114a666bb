"""Scattered writes: whether an UPDATE or DELETE may run on several shards.

It may where a SELECT of the same conditions may (`anchor`): each row that it writes is decided about on its own
shard. Its rows, if it returns any, are one shard's after another's. Driven by the planner; pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Delete, Table, Update
from sqlalchemy.sql.selectable import Alias
from sqlalchemy.sql.visitors import iterate

from shardkit.core.keyrange import POSITION_MIN, Arc, ArcSet
from shardkit.core.topology import ShardedTable

from .anchor import anchored
from .closure import BlockProof, Node
from .gather import Rows
from .ownership import owned_only
from .proof import prove
from .recorder import Compiled
from .refusals import Refusal
from .scatter import vet_clauses
from .vetting import vet_scatter
from .vocabulary import STEADY_TIMES

Compile = Callable[[Any], Compiled]
"""Compiles and records a statement."""


@dataclass(frozen=True, slots=True)
class Writing:
    """An UPDATE or DELETE that may run on several shards.

    A table is the same object in all statements of one shape, but an alias is each statement's own: ``place`` is that
    of the anchor among the aliases of a statement, None for a table. ``blocks`` are the tables of its blocks.
    ``makes`` says whether Python makes the value of a column on update.
    """

    anchor: Node
    place: int | None
    blocks: list[dict[str, ShardedTable | None]]
    makes: bool
    merge = Rows()

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
        if [_tables(block) for block in prove(compiled)] != self.blocks:
            raise _no_place()


def writing(compiled: Compiled, proofs: list[BlockProof], compile_: Compile) -> Writing:
    """How an UPDATE or DELETE runs on several shards; `Refusal` if that could do otherwise than one database.
    ``compile_`` records another statement of the same parameters."""
    statement = compiled.given
    if statement.is_from_statement or not isinstance(statement, Update | Delete):
        raise Refusal("from-statement", "from_statement() of a writing statement runs on one shard")
    anchor = anchored(proofs)
    vet_scatter(compiled, STEADY_TIMES)
    vet_clauses(compiled.statement)
    found = Writing(
        anchor, _place(compiled, anchor), [_tables(proof) for proof in proofs], _makes_on_update(compiled)
    )
    found.rehearse(compiled, compile_)
    return found


def _makes_on_update(compiled: Compiled) -> bool:
    """Whether Python makes a value, which is one for all rows of the statement."""
    if not compiled.given.is_update:
        return False
    table = compiled.statement.table
    columns = [column.onupdate for column in getattr(table, "element", table).columns]
    return any(made is not None and (made.is_scalar or made.is_callable) for made in columns)


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


def _place(compiled: Compiled, anchor: Node) -> int | None:
    if isinstance(anchor.source, Table):
        return None
    for place, alias in enumerate(_aliases(compiled.given)):
        if hash(alias) == hash(anchor.source):
            return place
    raise _no_place()


def _tables(block: BlockProof) -> dict[str, ShardedTable | None]:
    return {name: None if node is None else node.table for name, node in block.names.items()}
