"""The anchor: whether each row of a statement is made on one shard, and which FROM says on which.

A block may scatter if one sharded FROM, its anchor, is on the preserved side of every outer join, and if every other
sharded FROM of it and of all blocks inside it has the anchor's shard key for every row that it contributes. Then a
shard that has all rows of a key makes all rows of the answer that have this key, and no others. Driven by
`scatter`; pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Table

from .closure import BlockProof, Node, holding, linked
from .elements import chooses
from .refusals import Refusal


def anchored(proofs: list[BlockProof]) -> Node:
    """The anchor of the first block, to which all nodes of all blocks are bound; `Refusal` if there is none."""
    top = proofs[0]
    if top.aggregated_from_inside:
        raise Refusal("aggregate", "an aggregate in a subquery is one of the rows around it")
    candidates = [node for node in top.nodes if node.scope is top.root]
    if not candidates:
        if top.nodes:
            raise Refusal("outer-join", "no sharded table of it is on the preserved side of every outer join")
        raise Refusal("derived", "no sharded table is in its own FROM, but in subqueries")
    anchor = next((node for node in candidates if isinstance(node.source, Table)), candidates[0])
    for proof in proofs:
        if proof.references and not proof.nodes:
            _vet_choice(proof)
        for node in proof.nodes:
            if node is not anchor and all(other is not anchor for other in equal_keys(node)):
                raise _not_co_located(node, anchor)
    return anchor


def _vet_choice(proof: BlockProof) -> None:
    """`Refusal` if a block over reference tables alone may choose other rows of them on each shard."""
    if chooses(proof.block.statement):
        raise Refusal("reference-limit", "LIMIT in a subquery may choose other reference rows on each shard")


def equal_keys(node: Node) -> Iterator[Node]:
    """The nodes of its block and of those around it whose shard keys equal that of a node, for each row it
    contributes; itself included."""
    seen: set[int] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        todo += linked(one, holding(one.scope, one.block))
        # Each row that is derived from it has its key; they are FROMs of their own, each of which has to be bound.
        todo += one.deriving


def local_nodes(proof: BlockProof, anchor: Node) -> list[Node]:
    """The FROMs of a block whose shard key, in each row of it, is that of the anchor."""
    return [
        node
        for node in proof.nodes
        if node.scope is proof.root and any(other is anchor for other in equal_keys(node))
    ]


def _not_co_located(node: Node, anchor: Node) -> Refusal:
    where = "joined" if node.block is anchor.block else "correlated"
    return Refusal(
        "not-co-located",
        f"{node} and {anchor} are not {where} by their shard keys",
        hint=f"{'Join' if where == 'joined' else 'Correlate'} on {node} = {anchor}, or bind both to one value.",
    )
