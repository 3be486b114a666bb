"""Routing by ids: a slot-carrying id that equals a bound value leaves the shards of its slot.

Such an equality proves no position: a slot is a range of them. So a statement that only ids bind is a scatter, over
the owners of their slots instead of all shards. What may not be scattered is refused all the same, whether or not a
slot has one owner today. Driven by the proof, which finds the constraints, and by the scatter's route.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table
from sqlalchemy.sql.elements import ColumnClause

from shardkit.core.ids import Carrier, Layout
from shardkit.core.keyrange import ArcSet, slot_arc
from shardkit.core.topology import KeyType, Topology
from shardkit.orm import declare

from .carriers import carried, carriers
from .recorder import MISSING, Call, Slot

logger = logging.getLogger("shardkit.ids")

_told: set[str] = set()
_NEVER = Carrier(Layout.TIMED, floor=1 << 63)
"""That of a column whose values carry no slot."""


@dataclass(frozen=True, slots=True, eq=False)
class IdConstraint:
    """A slot-carrying column equals one bound value, or one of a bound list (``listed``); ``part`` is its place in a
    list of tuples. ``column`` names it for people."""

    slot: Slot
    carrier: Carrier
    family: KeyType
    listed: bool
    part: int | None
    column: str


def carrier_of(element: Any, source: Any) -> Carrier | None:
    """How the values of a bare column of a sharded FROM carry their slot, if they do. Of a primary key that servers
    number none does; it is taken for such a one so that the log can say so."""
    table = source if isinstance(source, Table) else getattr(source, "element", None)
    if not isinstance(element, ColumnClause) or not isinstance(table, Table):
        return None
    name = str(element.name)
    found = carriers(table).get(name)
    if found is None and declare.is_sharded(table):
        declared = declare.sharded_table(table)
        return _NEVER if declared is not None and name in declared.numbered else None
    return found


def possible_slots(
    constraints: Sequence[IdConstraint], call: Call, parameters: Mapping[str, Any]
) -> frozenset[int] | None:
    """The slots that the ids leave; None if any shard may have a row. An id that carries no slot says so in the log,
    once for each column."""
    left: frozenset[int] | None = None
    for constraint in constraints:
        slots = _slots(constraint, call, parameters)
        if slots is not None:
            left = slots if left is None else left & slots
    return left or None  # where no slot fits, no row does, which any shard may say


def _slots(constraint: IdConstraint, call: Call, parameters: Mapping[str, Any]) -> frozenset[int] | None:
    value = constraint.slot.value(call, parameters)
    values = value if constraint.listed else (value,)
    if not isinstance(values, list | tuple | set | frozenset):
        return None
    found: set[int] = set()
    for one in values:
        sent = constraint.slot.sent(one, constraint.part)
        if sent is None:
            continue  # NULL equals nothing
        slot = None if sent is MISSING else carried(constraint.carrier, sent)
        if slot is None:
            _tell(constraint)
            return None
        found.add(slot)
    return frozenset(found)


def _tell(constraint: IdConstraint) -> None:
    if constraint.column not in _told:
        _told.add(constraint.column)
        logger.warning(
            "%s is compared with an id that carries no slot, so every shard is asked. This is said once.",
            constraint.column,
        )


def owners(topology: Topology, slots: Iterable[int]) -> dict[int, bool]:
    """The shards that own positions of some slots, and whether rows of these slots are in transit there."""
    arcs = ArcSet(slot_arc(slot) for slot in slots)
    found: dict[int, None] = {}
    for arc in arcs:
        number = bisect_left(topology.tokens, arc.first)
        while True:
            found[topology.owners[number]] = None
            if topology.tokens[number] >= arc.last:
                break
            number += 1
    return {shard_id: bool(topology.by_id[shard_id].in_transit & arcs) for shard_id in sorted(found)}
