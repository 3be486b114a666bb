"""Binding: what the values of one call make of a proof.

A constraint of the proof becomes the set of positions that a shard key can have; the constraints of a node together
leave one position, several, none (then no row of it is in the answer, on any shard), or are not understood (a value
that is no key). Driven by the planner for each call; sees values, no topology.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from shardkit.orm.keys import exact_position

from .closure import BlockProof, Bound, Choice, Constraint
from .recorder import MISSING, Call

Keys = dict[int, list[Any]]
"""Position to the values, as they were given, whose position it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What binds the nodes of one block: for each different set of constraints, those and whether the block is empty
    where they fit no value."""

    classes: tuple[tuple[tuple[Bound, ...], bool], ...]


def terms(proof: BlockProof) -> Terms:
    """The terms of a proved block."""
    classes: dict[tuple[tuple[int, ...], bool], tuple[Bound, ...]] = {}
    for node in proof.nodes:
        if node.derived is not None:
            continue  # its rows are made of those of its body
        classes[tuple(sorted(map(id, node.constraints))), node.present] = node.constraints
    return Terms(tuple((constraints, present) for (_, present), constraints in classes.items()))


class Unbound(Enum):
    """What the rows of a statement have in the place of one position."""

    NO_ROW = "there is none"
    SEVERAL = "several, or unknown ones"


def one_position(blocks: Sequence[Terms], call: Call, parameters: Mapping[str, Any]) -> int | Unbound:
    """The position of all rows of a statement."""
    found: int | None = None
    for block in blocks:
        agreed = [
            (possible(constraints, call, parameters), present) for constraints, present in block.classes
        ]
        if any(present and positions is not None and not positions for positions, present in agreed):
            continue  # the block has no row, whatever its other FROMs hold
        for positions, _ in agreed:
            if positions is None or len(positions) > 1:
                return Unbound.SEVERAL
            for position in positions:
                if found is not None and found != position:
                    return Unbound.SEVERAL
                found = position
    return Unbound.NO_ROW if found is None else found


def only_position(constraint: Constraint, call: Call, parameters: Mapping[str, Any]) -> int | Unbound:
    """The same where one equality is all there is, as it mostly is."""
    slot = constraint.slot
    value = slot.value(call, parameters)
    if slot.processor is not None and value is not MISSING:
        value = constraint.slot.sent(value, constraint.part)
    if value is None:
        return Unbound.NO_ROW
    found = exact_position(value, constraint.family)
    return Unbound.SEVERAL if found is None else found


def possible(
    constraints: Sequence[Bound], call: Call, parameters: Mapping[str, Any]
) -> Mapping[int, Any] | None:
    """The positions that all of the constraints leave; None if none of them is understood."""
    left: dict[int, Any] | None = None
    for constraint in constraints:
        keys = known(constraint, call, parameters)
        if keys is not None:
            left = keys if left is None else {position: None for position in left if position in keys}
    return left


def known(constraint: Bound, call: Call, parameters: Mapping[str, Any]) -> Keys | None:
    """The keys that a constraint allows, by position; None if a value is not of the key's type. NULL equals nothing."""
    if isinstance(constraint, Choice):
        allowed: Keys = {}
        for branch in constraint.branches:
            keys = possible(branch, call, parameters)
            if keys is None:
                return None
            allowed.update({position: [] for position in keys})
        return allowed
    value = constraint.slot.value(call, parameters)
    if not constraint.listed:
        return _keys(constraint, (value,))
    if not isinstance(value, list | tuple | set | frozenset):
        return None
    return _keys(constraint, value)


def _keys(constraint: Constraint, values: Any) -> Keys | None:
    keys: Keys = {}
    for value in values:
        sent = constraint.slot.sent(value, constraint.part)
        if sent is None:
            continue
        position = exact_position(sent, constraint.family)
        if position is None:
            return None
        keys.setdefault(position, []).append(value)
    return keys
