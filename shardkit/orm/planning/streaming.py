"""Streaming: rows of several shards, merged as they come, with a bounded number of them at hand.

Each shard keeps a cursor open and is asked for some rows at a time; if they are ordered, the next row is the first of
what is at hand of all shards. For ``yield_per`` and ``stream``, where rows need not be seen together: `arranging`
says when. Reading goes on in the caller's thread or task, so no connection is used by two.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import total_ordering
from itertools import islice
from typing import Any

from sqlalchemy import CursorResult

from .arranging import Arrangement, Key, check_exact, rank_of
from .merge import Finish
from .prepared import raw_stream


@dataclass(frozen=True, slots=True, eq=False)
class Streamed:
    """The merge of one call; ``at_hand`` is how many rows of each shard are fetched at a time."""

    arrangement: Arrangement
    limit: int | None
    offset: int | None
    at_hand: int
    as_text = False

    def merged(self, results: Mapping[int, CursorResult[Any]], finish: Finish) -> CursorResult[Any]:
        """One result, whose rows are fetched when they are asked for."""
        plan = self.arrangement
        description = next(iter(results.values())).cursor.description
        for key in plan.order:
            check_exact(description[key.place])
        streams = [raw_stream(result, self.at_hand) for result in results.values()]
        rows: Iterator[Any]
        if plan.order:
            place = _place(plan.order)
            rows = heapq.merge(*streams, key=place)
        else:
            rows = (row for stream in streams for row in stream)
        first = self.offset or 0
        rows = islice(rows, first, None if self.limit is None else first + self.limit)
        if len(description) > plan.width:
            rows = (row[: plan.width] for row in rows)

        def close() -> None:
            for result in results.values():
                result.close()

        return finish.answer(description[: plan.width], rows, close)


@total_ordering
class _Reversed:
    """A rank in descending order."""

    __slots__ = ("rank",)

    def __init__(self, rank: Any) -> None:
        self.rank = rank

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reversed) and bool(self.rank == other.rank)

    def __lt__(self, other: _Reversed) -> bool:
        return bool(other.rank < self.rank)


def _place(order: tuple[Key, ...]) -> Any:
    """Where a row stands in an order."""
    ranks = [(rank_of(key), bool(key.descending)) for key in order]
    return lambda row: tuple(
        [_Reversed(rank(row)) if descending else rank(row) for rank, descending in ranks]
    )
