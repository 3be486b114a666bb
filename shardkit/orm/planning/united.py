"""United: set operations whose rows are each made on one shard, so that they can be made shard by shard.

The rows of a branch that reads sharded tables are each made on the shard of its anchor; those of a branch that reads
none may be made on any one. So UNION ALL of such branches is made in parts. UNION, INTERSECT and EXCEPT compare rows:
they are made in parts where all branches return the shard key at the same place, since rows that are equal are then on
one shard. UNION at the root of a statement needs no key: rows of several shards are made distinct once more.

A FROM that is a set operation of this kind becomes a node of the proof like any other derived FROM (`united_node`), and
a statement that is one is planned as a SELECT of all rows of it (`as_select`). Driven by `proof` and `scatter`; pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Boolean, CompoundSelect, bindparam, select
from sqlalchemy.sql.elements import Null
from sqlalchemy.sql.selectable import CTE, Subquery, _CompoundSelectKeyword
from sqlalchemy.types import Float, Integer, NullType, Numeric, TypeDecorator

from .arranging import Term
from .closure import BlockProof, Branch, Node, Scope, holding, linked
from .elements import chooses, is_set, unlabelled
from .locality import Rendered, holds_key, is_grouped, keeps_keys_apart
from .ownership import owned_in
from .prepared import ONCE
from .recorder import Block, Compiled, Compound
from .refusals import Refusal
from .vetting import function_names
from .vocabulary import ALL_AGGREGATES


@dataclass(frozen=True, slots=True, eq=False)
class United:
    """A set operation and what is known of its branches."""

    element: CompoundSelect[Any]
    branches: tuple[BlockProof | United, ...]


def united(compound: Compound, known: Mapping[int, BlockProof]) -> United:
    """The proofs of the blocks of a set operation; ``known`` are those of all blocks by `id`."""
    return United(
        compound.element,
        tuple(
            united(branch, known) if isinstance(branch, Compound) else known[id(branch)]
            for branch in compound.branches
        ),
    )


def leaves(body: BlockProof | United) -> Iterator[BlockProof]:
    """The blocks that a body is made of."""
    if isinstance(body, BlockProof):
        yield body
    else:
        for branch in body.branches:
            yield from leaves(branch)


# --- what is made where --------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """How a set operation is made in parts: its blocks, and the places of the columns that are the shard key in all of
    them."""

    branches: tuple[Branch, ...]
    places: tuple[int, ...]


def parts(body: United, rendered: Rendered, *, root: bool) -> Parts | None:
    """How a set operation is made in parts, if it is. ``root`` says that its rows can be made distinct afterwards, and
    that its own ORDER BY, LIMIT and OFFSET are someone else's business."""
    if not root and chooses(body.element):
        return None
    places, inner = _keyed(body, rendered)
    if places:
        blocks = list(leaves(body))
        return Parts(tuple(map(Branch, blocks, inner)), places) if _plain(body) else None
    branches = _spread(body, rendered, repeats=root)
    if branches is None or all(branch.anchor is None for branch in branches):
        return None
    return Parts(tuple(branches), ())


def _plain(body: United) -> bool:
    """Whether no branch that is a set operation itself chooses among its rows."""
    return all(
        isinstance(branch, BlockProof) or (not chooses(branch.element) and _plain(branch))
        for branch in body.branches
    )


def _keyed(body: United, rendered: Rendered) -> tuple[tuple[int, ...], Sequence[Node]]:
    """The places where all blocks return the shard key of one of their FROMs, on whose shard their rows are made, and
    that FROM of each block."""
    blocks = list(leaves(body))
    keys = [_key_places(block, rendered) for block in blocks]
    common = [place for place in keys[0] if all(place in one for one in keys)]
    if not common:
        return (), ()
    inner = [one[common[0]] for one in keys]
    if len({node.table.key_type for node in inner}) > 1:
        return (), ()
    if not all(keeps_keys_apart(block, node, rendered) for block, node in zip(blocks, inner, strict=True)):
        return (), ()
    places = [
        place
        for place in common
        if all(_is_linked(one[place], node) for one, node in zip(keys, inner, strict=True))
    ]
    return tuple(places), inner


def _key_places(block: BlockProof, rendered: Rendered) -> dict[int, Node]:
    found: dict[int, Node] = {}
    for place, column in enumerate(block.block.columns):
        node = block.find_key(unlabelled(column), rendered)
        if node is not None and node.block is block and node.scope is block.root:
            found[place] = node
    return found


def _is_linked(one: Node, other: Node) -> bool:
    return any(node is other for node in linked(one, holding(one.block.root, one.block)))


def _spread(body: BlockProof | United, rendered: Rendered, *, repeats: bool) -> list[Branch] | None:
    """The blocks of a body of which each row is made on one shard, where keys are not compared; with ``repeats`` rows
    that are equal may be on several shards. None if there is another row in it."""
    if isinstance(body, BlockProof):
        return _spread_block(body, rendered)
    keyword = body.element.keyword
    all_rows = keyword is _CompoundSelectKeyword.UNION_ALL
    if not all_rows and not (repeats and keyword is _CompoundSelectKeyword.UNION):
        places, inner = _keyed(body, rendered)
        if not places or not _plain(body):
            return None
        return list(map(Branch, leaves(body), inner))
    found: list[Branch] = []
    for branch in body.branches:
        if isinstance(branch, United) and chooses(branch.element):
            return None
        # Below UNION it does not matter how often a row is there, below UNION ALL it does.
        of_branch = _spread(branch, rendered, repeats=repeats and not all_rows)
        if of_branch is None:
            return None
        found += of_branch
    return found


def _spread_block(block: BlockProof, rendered: Rendered) -> list[Branch] | None:
    if not block.nodes:
        return [Branch(block, None)] if not block.homes else None
    candidates = [node for node in block.nodes if node.scope is block.root]
    if not candidates or any(node.branches and not node.keys for node in block.nodes):
        return None
    anchor = next((node for node in candidates if node.derived is None), candidates[0])
    core = block.block.statement
    if not keeps_keys_apart(block, anchor, rendered):
        return None
    local = [node for node in candidates if _is_linked(node, anchor)]
    if core._distinct and not holds_key(block.block.columns, local, rendered):
        return None
    return [Branch(block, anchor)]


# --- as a FROM -----------------------------------------------------------------------------------------------------


def united_node(
    compiled: Compiled, proof: BlockProof, scope: Scope, from_: Any, body: United, *, root: bool = False
) -> Node | None:
    """A FROM that is a set operation, as a node of the block that it is in; None if its rows are not each made on one
    shard."""
    if not isinstance(from_, Subquery | CTE) or getattr(from_, "recursive", False):
        return None
    blocks, columns = list(leaves(body)), list(from_.c)
    if any(block.parent is not None or len(block.block.columns) != len(columns) for block in blocks):
        return None
    found = parts(body, compiled.rendered_name, root=root)
    if found is None:
        return None
    inner = next(branch.anchor for branch in found.branches if branch.anchor is not None)
    keys = frozenset(str(columns[place].name) for place in found.places)
    node = Node(
        compiled.rendered_name(from_), inner.table, from_, proof, scope, keys, inner, branches=found.branches
    )
    for branch in found.branches:
        if branch.anchor is not None:
            branch.anchor.deriving.append(node)
    return node


def as_compiled(compiled: Compiled) -> dict[int, Any]:
    """The branches of all set operations of a statement, by `id`, as they were compiled. (Compiled once more they would
    have other parameters.)"""
    found: dict[int, Any] = {}
    for compound in compiled.recording.compounds:
        for branch in compound.branches:
            if isinstance(branch, Block):
                found[id(branch.given)] = core = branch.statement._generate()
                core._propagate_attrs = core._propagate_attrs.__class__()
    return found


def statements(compiled: Compiled, node: Node, *, owned: bool) -> dict[int, Any]:
    """What runs on each shard in the place of the branches of set operations: those of a FROM without rows in transit
    where there are some (``owned``), and their rows once if any shard can make them."""
    found = as_compiled(compiled)
    for block, anchor in node.branches:
        core = found[id(block.block.given)]
        if anchor is None:
            once = bindparam(ONCE, type_=Boolean())
            core = core.having(once) if is_grouped(core, block.block.columns) else core.where(once)
        elif owned:
            core = core.where(owned_in(anchor.key, anchor.table.key_type))
        found[id(block.block.given)] = core
    return found


# --- as a statement ------------------------------------------------------------------------------------------------

_CLAUSES = ("_fetch_clause", "_for_update_arg", "_group_by_clauses", "_independent_ctes")


def as_select(compiled: Compiled, proofs: Sequence[BlockProof]) -> tuple[BlockProof, bool]:
    """A statement that is a set operation as a SELECT of all rows of it, with its ORDER BY, LIMIT and OFFSET; and
    whether rows of two shards can be equal of which one is wanted. `Refusal` if it is not made in parts."""
    compound = compiled.recording.compounds[0]
    known = {id(proof.block): proof for proof in proofs}
    body, element = united(compound, known), compound.element
    if any(is_set(getattr(element, clause, None)) for clause in _CLAUSES):
        raise Refusal("set-operation", "a clause of its set operation is not merged over shards")
    rows = element.order_by(None).limit(None).offset(None).subquery("shardkit_rows")
    columns = tuple(rows.c)
    wrapped: Any = select(*columns).limit(element._limit_clause).offset(element._offset_clause)
    wrapped = wrapped.order_by(*(_ordered(one, body, columns) for one in element._order_by_clauses))
    proof = BlockProof(Block(wrapped, (rows,), None, columns), None)
    proof.aggregated_from_inside = any(one.aggregated_from_inside for one in proofs)
    node = united_node(compiled, proof, proof.root, rows, body, root=True)
    if node is None:
        raise Refusal("set-operation", "the rows of its set operation are not each made on one shard")
    proof.nodes.append(node)
    proof.names[node.name] = node
    return proof, not node.keys and element.keyword is _CompoundSelectKeyword.UNION


def _ordered(clause: Any, body: United, columns: Sequence[Any]) -> Any:
    """One element of ORDER BY of a set operation, as one of the SELECT of its rows: it names one column of the first
    block, by itself or by its name."""
    term = Term.of(clause, names=True)
    made = next(leaves(body)).block.columns
    names = [str(getattr(column, "name", "")) for column in made]
    if isinstance(term.expression, str):
        places = [place for place, column in enumerate(columns) if column.key == term.expression]
    else:
        wanted = hash(unlabelled(term.expression))
        places = [place for place, column in enumerate(made) if hash(unlabelled(column)) == wanted]
    if len(places) != 1 or names.count(names[places[0]]) != 1:
        raise Refusal(
            "order-by", "ORDER BY of a set operation by something else than a column of it is not merged"
        )
    place = places[0]
    directed = columns[place].desc() if term.descending else columns[place].asc()
    return directed.nulls_first() if term.nulls_first else directed.nulls_last()


# --- types ---------------------------------------------------------------------------------------------------------


def vet_types(compiled: Compiled, known: Sequence[BlockProof]) -> None:
    """`Refusal` where a column of a set operation is of several kinds in its branches: what it is then only the server
    knows, and which aggregates are made of parts depends on it (but for counts)."""
    if not any(name in ALL_AGGREGATES and name != "count" for name in function_names(compiled)):
        return
    proofs = {id(proof.block): proof for proof in known}
    for compound in compiled.recording.compounds:
        blocks = list(leaves(united(compound, proofs)))
        for column in zip(*(block.block.columns for block in blocks), strict=False):
            kinds = {_kind(one) for one in column if not isinstance(unlabelled(one), Null)}
            if len(kinds) > 1 or (len(column) > 1 and NullType in kinds):
                raise Refusal(
                    "types", "a column of its set operation is of several types in the branches of it"
                )


def _kind(column: Any) -> Any:
    type_ = column.type
    while isinstance(type_, TypeDecorator):
        type_ = type_.impl_instance
    if isinstance(type_, Integer | Numeric) and not isinstance(type_, Float):
        return Numeric
    return type_._type_affinity
