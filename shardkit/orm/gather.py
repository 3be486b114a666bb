"""Gather: one result out of the results of several shards.

Driven by the session with the `Merge` that a `Route` names; knows results, never statements or connections. Results are
read whole. A merge that would not be exactly what one database returns raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any, Literal

from sqlalchemy.engine import Result

from shardkit.core.errors import IdentityConflict, UnroutableQuery

AggregateName = Literal["count", "sum", "min", "max"]

_BIGINTS = range(-(2**63), 2**63)
_EXACT = Context(prec=1000)
"""Far beyond the 131,072 digits of numeric only in theory: sums of bigints have 40 at most."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of all shards, one shard after the other; row counts are added. ``identities`` are the places of the
    columns of each primary key among the columns: rows of two shards never share one."""

    identities: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Interleaved:
    """One row for each row of the input, in the order of the input: ``order[shard id]`` are the numbers of the input
    rows that the shard was given, in the order it was given them."""

    order: dict[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Aggregates:
    """One row of which each column is merged by its own aggregate."""

    columns: tuple[AggregateName, ...]


Merge = Rows | Interleaved | Aggregates


def gather(results: dict[int, Result[Any]], merge: Merge) -> Result[Any]:
    """One result from the results by shard id (at least one), each unread.

    `IdentityConflict` if two shards returned rows of one primary key.
    """
    first, *others = results.values()
    if not getattr(first, "returns_rows", True):
        return first.merge(*others)
    frozen = {shard_id: result.freeze() for shard_id, result in results.items()}
    rows = {shard_id: _rows(one.data, one._source_supports_scalars) for shard_id, one in frozen.items()}
    if isinstance(merge, Aggregates):
        merged: list[Any] = [_aggregated(list(rows.values()), merge)]
    elif isinstance(merge, Interleaved):
        merged = _interleaved(rows, merge)
    else:
        _check_identities(rows, merge)
        merged = [row for of_shard in rows.values() for row in of_shard]
    return next(iter(frozen.values())).with_new_rows(merged)()


def _rows(data: Sequence[Any], scalars: bool) -> list[Any]:
    return [(value,) for value in data] if scalars else list(data)


def _check_identities(rows: dict[int, list[Any]], merge: Rows) -> None:
    for places in merge.identities:
        owner: dict[tuple[Any, ...], int] = {}
        for shard_id, of_shard in rows.items():
            for row in of_shard:
                identity = tuple(row[place] for place in places)
                if owner.setdefault(identity, shard_id) != shard_id:
                    raise IdentityConflict(
                        f"Shards {owner[identity]} and {shard_id} both returned a row with the primary key {identity}.",
                        identity=identity,
                        shards=[owner[identity], shard_id],
                    )


def _interleaved(rows: dict[int, list[Any]], merge: Interleaved) -> list[Any]:
    numbered: dict[int, Any] = {}
    for shard_id, of_shard in rows.items():
        numbers = merge.order[shard_id]
        if len(numbers) != len(of_shard):
            raise UnroutableQuery(
                f"Shard {shard_id} returned {len(of_shard)} rows for {len(numbers)} that it was given, so they cannot "
                "be put into the order of the input.",
                reason="returning-order",
            )
        numbered.update(zip(numbers, of_shard, strict=True))
    return [numbered[number] for number in sorted(numbered)]


# --- aggregates ----------------------------------------------------------------------------------------------------


def _aggregated(rows: list[list[Any]], merge: Aggregates) -> tuple[Any, ...]:
    merged: list[Any] = []
    for place, name in enumerate(merge.columns):
        values = [row[place] for of_shard in rows for row in of_shard]
        merged.append(_MERGERS[name](_integers(values, name)))
    return tuple(merged)


def _integers(values: list[Any], name: str) -> list[Any]:
    """The values but NULLs; each an int, or a Decimal as the server sends sums of bigints."""
    present = [value for value in values if value is not None]
    for value in present:
        if type(value) is not int and not (type(value) is Decimal and value.is_finite()):
            raise UnroutableQuery(
                f"{name.upper()} returned {value!r} on a shard, which is no integer.", reason="aggregate-type"
            )
    return present


def _sum(values: list[Any]) -> Any:
    if not values:
        return None
    total = values[0]
    for value in values[1:]:
        total = _EXACT.add(total, value) if isinstance(total, Decimal) else total + value
    if type(total) is int and total not in _BIGINTS:
        raise UnroutableQuery("The sum is out of the range of bigint.", reason="sum-overflow")
    return total


_MERGERS: dict[AggregateName, Callable[[list[Any]], Any]] = {
    "count": sum,
    "sum": _sum,
    "min": lambda values: min(values, default=None),
    "max": lambda values: max(values, default=None),
}
