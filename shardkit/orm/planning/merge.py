"""Merging: what a route says is to be done with the results of its shards.

Two kinds know results alone (`gather`: rows that writing statements return); the others may run a further statement
on one shard of the route, and answer the application's statement with the rows they have put together. Only names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import CursorResult, Executable

from .clock import Times


class Finish(Protocol):
    """What a merge may do beside reading results; it is bound to one shard of the route."""

    def run(self, statement: Executable, parameters: Mapping[str, Any]) -> CursorResult[Any]:
        """Run a statement of the merge's own on that shard."""
        ...

    def answer(
        self, description: Sequence[Any], rows: Iterable[Any], close: Callable[[], None] | None = None
    ) -> CursorResult[Any]:
        """The result of the application's statement, of rows as the driver gives them; ``close`` is called when no
        more of them are wanted."""
        ...

    def times(self) -> Times:
        """What time it is on that shard, and so for all shards of the statement."""
        ...

    def instead(self, statement: Executable) -> CursorResult[Any]:
        """Run the application's statement in another form, with its own parameters and options, on that shard."""
        ...


class Merge(Protocol):
    """One result out of those of several shards, each unread."""

    @property
    def as_text(self) -> bool:
        """Whether values go from one server to another as text."""
        ...

    def merged(self, results: Mapping[int, CursorResult[Any]], finish: Finish) -> CursorResult[Any]:
        """The result; all others are closed, also when they cannot be merged."""
        ...
