"""One cursor result out of those of several shards, as the ORM expects it from one connection.

SQLAlchemy loads instances from a ``CursorResult`` with its context and column lookup; the gathered rows are put into
that of the first shard, whose statement is the same. What is private in SQLAlchemy's results is used here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import CursorResult
from sqlalchemy.engine import Result


def merged(
    results: Mapping[int, CursorResult[Any]],
    gather: Callable[[dict[int, Result[Any]], Any], Result[Any]],
    merge: Any,
) -> CursorResult[Any]:
    """The results of all shards as one; closes every one of them, also when they cannot be merged."""
    first = next(iter(results.values()))
    if any(result.context._has_rowcount for result in results.values()):
        first.context._rowcount = sum(result.context.rowcount for result in results.values())
    _add_returned_defaults(first, results)
    if not first.returns_rows:
        return first
    try:
        rows = [tuple(row) for row in gather(dict(results), merge)]
    finally:
        for result in results.values():
            if result is not first:
                result.close()
    return first._rewind(rows)


def _add_returned_defaults(first: CursorResult[Any], results: Mapping[int, CursorResult[Any]]) -> None:
    """What SQLAlchemy has returned to itself, to synchronize objects of the session, on all shards."""
    found = [row for result in results.values() for row in result.context.returned_default_rows or ()]
    if found:
        first.context.returned_default_rows = found
