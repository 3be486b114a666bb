"""The proof: which shard keys the rows of a statement have, from the equalities that hold for each of them.

Every sharded FROM of a block is a node. An equality between shard keys, or of a shard key with a bound value, that must
be true for every row which a node contributes binds it; equalities are closed transitively. A node of a subquery may
be bound through an equality with a node of a block around it. What binds all nodes of all blocks to one position
makes the statement a one-key statement: all its rows are on one shard. Pure: drives nothing, sees no values.

Which equalities hold where (``Scope``): WHERE and ON of inner joins hold for every row. ON of ``a LEFT JOIN b`` holds
where b is present, so it binds b and never a: its scope is a child of that of the join. An equality is never true
of NULL, so one that holds and names a node says that this node is present, and with it holds its own scope. ON of a
FULL JOIN holds nowhere. OR, NOT, functions, casts, other operators bind nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Table
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    ColumnClause,
    Tuple,
)
from sqlalchemy.sql.selectable import (
    CTE,
    Alias,
    FromGrouping,
    Join,
    Lateral,
    Subquery,
    TableValuedAlias,
    Values,
)

from shardkit.core.topology import (
    DeclaredTable,
    ReferenceTable,
    ShardedTable,
)
from shardkit.orm import declare

from .closure import BlockProof, Choice, Constraint, Node, Scope, close, holding, linked, push_down
from .elements import chooses, conjuncts, is_aggregate, own_elements, ungrouped, unlabelled
from .idrouting import IdConstraint, carrier_of
from .locality import keeps_keys_apart
from .recorder import Block, Compiled
from .refusals import Refusal
from .united import United, leaves, united, united_node

_DERIVED = (Subquery, CTE, Lateral, TableValuedAlias, Values)
"""FROMs that hold no rows of their own: what they are made of is in blocks of its own, or in no table."""


_COMPARISONS = (operators.in_op, operators.not_in_op)


def prove(compiled: Compiled) -> list[BlockProof]:
    """The blocks of a statement, outer ones first, with the constraints of each node; `Refusal` for a FROM that is
    not understood or not sharded."""
    known: dict[int, BlockProof] = {}
    bodies: dict[int, BlockProof | United] = {}
    for block in compiled.recording.blocks:
        proof = BlockProof(block, None if block.parent is None else known[id(block.parent)])
        known[id(block)] = proof
        if block.derived is not None:
            bodies[hash(block.derived)] = proof
    for compound in compiled.recording.compounds:
        if compound.derived is not None:
            bodies[hash(compound.derived)] = united(compound, known)
    if any(_aggregates_outside(compiled, block) for block in compiled.recording.blocks):
        bodies.clear()
        for proof in known.values():
            proof.aggregated_from_inside = True
    proofs = list(known.values())
    for proof in proofs:
        _read(compiled, proof, bodies)
    for proof in proofs:
        if proof.parent is None:
            push_down(proof)
    _account_for_tables(compiled, proofs)
    return proofs


def _read(compiled: Compiled, proof: BlockProof, bodies: Mapping[int, BlockProof | United]) -> None:
    """Read a block, and before it those that it is derived from."""
    if proof.read:
        return
    proof.read = True
    for from_ in proof.block.froms:
        for element in _leaves(from_):
            body = bodies.get(hash(_origin(element)))
            for block in () if body is None else leaves(body):
                _read(compiled, block, bodies)
    _Reader(compiled, proof, bodies).read()
    close(proof)


def _aggregates_outside(compiled: Compiled, block: Block) -> bool:
    """Whether a block inside another has an aggregate of the other's rows: one that names no FROM of its own."""
    if block.parent is None:
        return False
    own = {compiled.rendered_name(leaf) for from_ in block.froms for leaf in _leaves(from_)}
    statement = block.statement
    clauses = [
        getattr(statement, clause, ())
        for clause in ("_where_criteria", "_having_criteria", "_order_by_clauses", "_group_by_clauses")
    ]
    for element in own_elements(*block.columns, *(one for clause in clauses for one in clause)):
        if is_aggregate(element):
            columns = [one for one in own_elements(element) if isinstance(one, ColumnClause)]
            named = {compiled.rendered_name(one.table) for one in columns if one.table is not None}
            if named and not named & own:
                return True
    return False


def _leaves(from_: Any) -> Iterator[Any]:
    if isinstance(from_, FromGrouping):
        yield from _leaves(from_.element)
    elif isinstance(from_, Join):
        yield from _leaves(from_.left)
        yield from _leaves(from_.right)
    else:
        yield from_


def _origin(from_: Any) -> Any:
    """The common table expression that an alias of one stands for."""
    while isinstance(from_, CTE) and from_._cte_alias is not None:
        from_ = from_._cte_alias
    return from_


def _account_for_tables(compiled: Compiled, proofs: Sequence[BlockProof]) -> None:
    """Every table in a rendered FROM is named: whatever else could put one there is not understood."""
    named: dict[DeclaredTable, int] = {}
    for proof in proofs:
        for one in proof.tables():
            named[one] = named.get(one, 0) + 1
    names = {table.name: table for table in compiled.recording.tables}
    for table, times in compiled.recording.tables.items():
        if names[table.name] is not table:
            raise Refusal("ambiguous-name", f"two tables of it are named {table.name!r}")
        if times != named.get(declared(table), 0):
            raise Refusal("hidden-from", f"{table.fullname} is read in a way that is not understood")


def declared(table: Any) -> DeclaredTable:
    """The declaration of a table in a FROM; `Refusal` if it has none."""
    found = declare.declared_table(table) if isinstance(table, Table) else None
    if found is None:
        raise Refusal("unsharded", f"{table} is not declared, so it is not known where its rows are")
    return found


def sharded(table: Any) -> ShardedTable:
    """The declaration of a sharded table; `Refusal` if it is not sharded."""
    found = declared(table)
    if not isinstance(found, ShardedTable):
        raise Refusal("unsharded", f"{table} is not sharded")
    return found


# --- reading a block -----------------------------------------------------------------------------------------------


class _Reader:
    """Fills a `BlockProof` from the FROMs and conditions of its block."""

    def __init__(
        self, compiled: Compiled, proof: BlockProof, bodies: Mapping[int, BlockProof | United]
    ) -> None:
        self._compiled = compiled
        self._proof = proof
        self._bodies = bodies
        self._conditions: list[tuple[Any, Scope]] = []  # as they are written

    def read(self) -> None:
        """Nodes first, then the equalities between them."""
        for from_ in self._proof.block.froms:
            self._from(from_, self._proof.root)
        for criterion in self._proof.block.criteria:
            self._conditions.append((criterion, self._proof.root))
        for condition, scope in self._conditions:
            for conjunct in conjuncts(condition):
                self._proof.conditions.append((conjunct, scope))
                self._conjunct(conjunct, scope)
        self._compare()

    def _from(self, from_: Any, scope: Scope) -> None:
        if isinstance(from_, FromGrouping):
            self._from(from_.element, scope)
        elif isinstance(from_, Join):
            self._join(from_, scope)
        elif isinstance(from_, Table):
            self._table(from_, declared(from_), scope)
        elif isinstance(from_, Alias) and isinstance(from_.element, Table):
            self._table(from_, declared(from_.element), scope)
        elif isinstance(from_, _DERIVED) or (
            isinstance(from_, Alias) and isinstance(from_.element, _DERIVED)
        ):
            self._name(from_, self._derived(from_, scope))
        else:
            raise Refusal("unknown-from", f"a FROM of the kind {type(from_).__name__} is not understood")

    def _join(self, join: Join, scope: Scope) -> None:
        if join.full:
            self._from(join.left, Scope(scope))
            self._from(join.right, Scope(scope))
        elif join.isouter:
            inside = Scope(scope)
            self._from(join.left, scope)
            self._from(join.right, inside)
            self._conditions.append((join.onclause, inside))
        else:
            self._from(join.left, scope)
            self._from(join.right, scope)
            self._conditions.append((join.onclause, scope))

    def _rendered(self, from_: Any) -> str:
        return self._compiled.rendered_name(from_)

    def _table(self, from_: Any, table: DeclaredTable, scope: Scope) -> None:
        if isinstance(table, ShardedTable):
            self._name(from_, self._node(from_, table, scope, frozenset({table.key})))
        elif isinstance(table, ReferenceTable):
            self._proof.references[self._new_name(from_)] = table
        else:
            self._proof.homes[self._new_name(from_)] = table

    def _node(
        self, from_: Any, table: ShardedTable, scope: Scope, keys: frozenset[str], derived: Node | None = None
    ) -> Node:
        return Node(self._rendered(from_), table, from_, self._proof, scope, keys, derived)

    def _derived(self, from_: Any, scope: Scope) -> Node | None:
        """A FROM whose rows have the shard key of one of its body's FROMs; None if it does not return that."""
        body = self._bodies.get(hash(_origin(from_)))
        if isinstance(body, United):
            return united_node(self._compiled, self._proof, scope, from_, body)
        if body is None or body.parent is not None or not isinstance(from_, Subquery | CTE):
            return None
        columns = list(from_.c)
        if len(columns) != len(body.block.columns):
            return None
        inner: Node | None = None
        keys: set[str] = set()
        for column, made in zip(columns, body.block.columns, strict=True):
            node = body.find_key(unlabelled(made), self._rendered)
            if node is None or node.block is not body or node.scope is not body.root:
                continue
            if inner is None:
                inner = node
            if any(other is inner for other in linked(node, holding(body.root, body))):
                keys.add(str(column.name))
        if inner is None:
            return None
        found = self._node(from_, inner.table, scope, frozenset(keys), inner)
        if keeps_keys_apart(body, inner, self._rendered):
            inner.deriving.append(found)
        return found

    def _new_name(self, from_: Any) -> str:
        name, proof = self._rendered(from_), self._proof
        if name in proof.names or name in proof.references or name in proof.homes:
            raise Refusal("ambiguous-name", f"two FROMs are named {name!r}")
        return name

    def _name(self, from_: Any, node: Node | None) -> None:
        self._proof.names[self._new_name(from_)] = node
        if node is not None:
            self._proof.nodes.append(node)

    # --- equalities ------------------------------------------------------------------------------------------------

    def _conjunct(self, conjunct: Any, scope: Scope) -> None:
        if isinstance(conjunct, BooleanClauseList) and conjunct.operator is operators.or_:
            self._choice(conjunct, scope)
        if not isinstance(conjunct, BinaryExpression):
            return
        left, right = ungrouped(conjunct.left), ungrouped(conjunct.right)
        if conjunct.operator is operators.eq:
            a, b = self._key(left), self._key(right)
            if a is not None and b is not None:
                if a.table.key_type == b.table.key_type:
                    scope.links.append((a, b))
            elif a is not None:
                self._bind(a, right, scope)
            elif b is not None:
                self._bind(b, left, scope)
            elif not self._bind_id(left, right, scope):
                self._bind_id(right, left, scope)
        elif conjunct.operator is operators.in_op:
            self._in(left, right, scope)

    def _choice(self, disjunction: Any, scope: Scope) -> None:
        """What every branch of an OR binds is bound: one of them is true, so its FROM is present too."""
        strange = list(self._proof.strange)
        branches = []
        for part in disjunction.clauses:
            branch = Scope()
            for conjunct in conjuncts(part):
                self._conjunct(conjunct, branch)
            branches.append(branch)
        self._proof.strange = strange
        for node in dict.fromkeys(node for node, _ in branches[0].bounds):
            bound = [
                tuple(one for of, one in branch.bounds if of is node and isinstance(one, Constraint))
                for branch in branches
            ]
            if all(bound):
                scope.bounds.append((node, Choice(tuple(bound), str(node))))

    def _key(self, element: Any) -> Node | None:
        return self._proof.find_key(element, self._rendered)

    def _bind(self, node: Node, value: Any, scope: Scope) -> None:
        if isinstance(value, BindParameter) and not value.expanding:
            self._constrain(node, value, value.type, scope, listed=False)

    def _in(self, left: Any, right: Any, scope: Scope) -> None:
        if not isinstance(right, BindParameter) or not right.expanding:
            return
        if isinstance(left, Tuple):
            for part, element in enumerate(left.clauses):
                node = self._key(ungrouped(element))
                types = getattr(right.type, "types", ())
                if node is not None and part < len(types):
                    self._constrain(node, right, types[part], scope, listed=True, part=part)
                elif part < len(types):
                    self._constrain_id(ungrouped(element), right, types[part], scope, listed=True, part=part)
        else:
            node = self._key(left)
            if node is not None:
                self._constrain(node, right, right.type, scope, listed=True)
            else:
                self._constrain_id(left, right, right.type, scope, listed=True)

    def _compare(self) -> None:
        """``key IN (SELECT key ...)``: whether that is true, rows of the block with other keys do not matter to.

        For NOT IN too, as keys are never NULL: so neither side may be one that an outer join can leave without a row.
        """
        compared, proof = self._proof.block.compared, self._proof
        if compared is None or proof.parent is None or compared.operator not in _COMPARISONS:
            return
        one = proof.parent.find_key(compared.left, self._rendered)
        select = proof.block.statement
        whole = not (chooses(select) or select._group_by_clauses or select._having_criteria)
        if one is None or len(proof.block.columns) != 1 or not whole:
            return
        other = proof.find_key(unlabelled(proof.block.columns[0]), self._rendered)
        if other is None or other.block is not proof or one.table.key_type != other.table.key_type:
            return
        if one.scope is one.block.root and other.scope is proof.root:
            proof.root.links.append((one, other))

    def _constrain(
        self,
        node: Node,
        bind: BindParameter[Any],
        type_: Any,
        scope: Scope,
        *,
        listed: bool,
        part: int | None = None,
    ) -> None:
        # The types must be of one family: a float equal to a bigint is equal to several, a char(n) to padded ones.
        if declare.key_family(type_) != node.table.key_type:
            self._proof.strange.append(node)
            return
        slot = self._compiled.slot(bind)
        if slot is not None:
            single = self._compiled.occurrences(bind) == 1
            scope.bounds.append(
                (node, Constraint(slot, node.table.key_type, listed, part, single, str(node)))
            )

    def _bind_id(self, element: Any, value: Any, scope: Scope) -> bool:
        if not isinstance(value, BindParameter) or value.expanding:
            return False
        return self._constrain_id(element, value, value.type, scope, listed=False)

    def _constrain_id(
        self,
        element: Any,
        bind: BindParameter[Any],
        type_: Any,
        scope: Scope,
        *,
        listed: bool,
        part: int | None = None,
    ) -> bool:
        """Whether an element is a column that carries slots; then its equality is noted."""
        if not isinstance(element, ColumnClause) or element.table is None or element.is_literal:
            return False
        node = self._proof.find(self._rendered(element.table))
        if node is not None and node.derived is not None:
            return False
        carrier = None if node is None else carrier_of(element, node.source)
        family = declare.key_family(type_)
        if node is None or carrier is None or family != ("uuid" if carrier.layout == "uuid" else "int"):
            return False
        slot = self._compiled.slot(bind)
        if slot is not None:
            name = f"{node.table}.{element.name}"
            scope.ids.append((node, IdConstraint(slot, carrier, family, listed, part, name)))
        return True
