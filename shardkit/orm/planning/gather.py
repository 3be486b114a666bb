"""Gather: one result out of the rows that writing statements return on several shards.

Driven by the session with the merge that a `Route` names; knows results, never statements or connections. Results are
read whole. A merge that would not be exactly what one database returns raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CursorResult
from sqlalchemy.engine import Result

from shardkit.core.errors import ReferenceDiffers, UnroutableQuery

from .merge import Finish
from .merged import merged


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of all shards, one shard after the other; row counts are added."""

    as_text = False

    def merged(self, results: Mapping[int, CursorResult[Any]], finish: Finish) -> CursorResult[Any]:
        """As `merge.Merge` has it."""
        return merged(results, gather, self)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """One row for each row of the input, in the order of the input: ``order[shard id]`` are the numbers of the input
    rows that the shard was given, in the order it was given them."""

    as_text = False

    order: dict[int, tuple[int, ...]]

    def merged(self, results: Mapping[int, CursorResult[Any]], finish: Finish) -> CursorResult[Any]:
        """As `merge.Merge` has it."""
        return merged(results, gather, self)


@dataclass(frozen=True, slots=True)
class Same:
    """Every shard did the same (`orm.replicated`): the result of the first."""

    as_text = False

    def merged(self, results: Mapping[int, CursorResult[Any]], finish: Finish) -> CursorResult[Any]:
        """As `merge.Merge` has it."""
        return merged(results, gather, self)


def gather(results: dict[int, Result[Any]], merge: Rows | Interleaved | Same) -> Result[Any]:
    """One result from the results by shard id (at least one), each unread."""
    first, *others = results.values()
    if not getattr(first, "returns_rows", True):
        return first.merge(*others)
    frozen = {shard_id: result.freeze() for shard_id, result in results.items()}
    rows = {shard_id: _rows(one.data, one._source_supports_scalars) for shard_id, one in frozen.items()}
    if isinstance(merge, Interleaved):
        put_together = _interleaved(rows, merge)
    elif isinstance(merge, Same):
        put_together = _same(rows)
    else:
        put_together = [row for of_shard in rows.values() for row in of_shard]
    return next(iter(frozen.values())).with_new_rows(put_together)()


def _rows(data: Sequence[Any], scalars: bool) -> list[Any]:
    return [(value,) for value in data] if scalars else list(data)


def _same(rows: dict[int, list[Any]]) -> list[Any]:
    numbers = {shard_id: len(of_shard) for shard_id, of_shard in rows.items()}
    if len(set(numbers.values())) > 1:
        raise ReferenceDiffers(f"Shards returned different numbers of rows: {numbers}.", rows=numbers)
    return next(iter(rows.values()))


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
