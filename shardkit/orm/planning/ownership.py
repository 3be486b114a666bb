"""The ownership predicate: what keeps rows in transit out of a statement that is not bound to one position.

While arcs move, a shard holds rows that it does not own. A statement that runs on several shards, or with several keys,
asks there for owned rows only: as a condition on the position of its anchor's shard key, in SQLAlchemy's terms, so
that it goes into SELECT, UPDATE and DELETE alike. Driven by the planner's routes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ColumnElement, bindparam, func, literal_column, not_, or_
from sqlalchemy.dialects.postgresql import ARRAY

from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import KeyType
from shardkit.storage.predicate import BETWEEN_AT_MOST, HASH_FUNCTIONS

BOUNDS, ODD = "shardkit_bounds", "shardkit_odd"
"""The parameters of the predicate in SQL that is compiled before the arcs are known."""


def owned_only(
    column: ColumnElement[Any], family: KeyType, owned: ArcSet, in_transit: ArcSet
) -> ColumnElement[bool]:
    """A condition that is true of every owned row and of none in transit; of the two ways to say that, the shorter.
    Neither set is empty.

    Bounds are bound values, so that shapes are few: SQLAlchemy and the server cache them.
    """
    position = _position(column, family)
    if len(in_transit) < len(owned):
        return not_(_within(position, in_transit))
    return _within(position, owned)


def owned_in(column: ColumnElement[Any], family: KeyType) -> ColumnElement[bool]:
    """The same condition with its arcs in two parameters, whose values `owned_arcs` tells."""
    given = bindparam(BOUNDS, type_=ARRAY(BigInteger()))
    number: ColumnElement[int] = func.pg_catalog.width_bucket(
        _position(column, family), given, type_=BigInteger()
    )
    one: ColumnElement[int] = literal_column("1", BigInteger())
    return number.bitwise_and(one) == bindparam(ODD, type_=BigInteger())


def owned_arcs(owned: ArcSet, in_transit: ArcSet) -> dict[str, Any]:
    """The bounds of the arcs of which there are fewer, and whether it is inside of them that a row is owned."""
    if len(in_transit) < len(owned):
        return {BOUNDS: in_transit.bounds(), ODD: 0}
    return {BOUNDS: owned.bounds(), ODD: 1}


def _position(column: ColumnElement[Any], family: KeyType) -> ColumnElement[int]:
    # The seed is a constant in the text: an index on this expression would not be used with a parameter.
    function = getattr(func.pg_catalog, HASH_FUNCTIONS[family])
    hashed: ColumnElement[int] = function(column, literal_column("0"), type_=BigInteger())
    return hashed


def _within(position: ColumnElement[int], arcs: ArcSet) -> ColumnElement[bool]:
    if len(arcs) <= BETWEEN_AT_MOST:
        return or_(*(position.between(_bigint(arc.first), _bigint(arc.last)) for arc in arcs))
    bounds = bindparam(None, arcs.bounds(), type_=ARRAY(BigInteger()))
    number: ColumnElement[int] = func.pg_catalog.width_bucket(position, bounds, type_=BigInteger())
    return number.bitwise_and(1) == 1


def _bigint(value: int) -> ColumnElement[int]:
    return bindparam(None, value, type_=BigInteger())
