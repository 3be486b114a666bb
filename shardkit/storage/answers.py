"""Answers: executing a statement without sending it, since its rows are known already.

Rows that several shards returned are merged as the driver gave them. To become a result of the application's own
statement (with its types, its entities, its options) that statement goes through SQLAlchemy's whole execution, and
where the cursor would send it the merged rows are put in place. Driven by `orm.dispatch`; the dialects of
`storage.dialect` have this in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.cursor import CursorFetchStrategy

ANSWER = "shardkit_answer"
"""Execution option: the `Answer` of a statement, which is then not sent."""


class Answer(NamedTuple):
    """Rows as the driver gives them, and what its cursor says of their columns.

    The rows may still be on their way; ``close`` is called when no more of them are wanted.
    """

    description: Sequence[Any]
    rows: Iterable[Any]
    close: Callable[[], None] | None = None


class _Answered(CursorFetchStrategy):
    """Fetches the rows of an answer."""

    __slots__ = ("_close", "_rows", "alternate_cursor_description")

    def __init__(self, answer: Answer) -> None:
        self.alternate_cursor_description = answer.description
        self._rows: Iterator[Any] = iter(answer.rows)
        self._close = answer.close

    def yield_per(self, result: Any, dbapi_cursor: Any, num: int) -> None:
        pass  # whoever made the answer knows how many rows to have at hand

    def _end(self) -> None:
        self._rows = iter(())
        close, self._close = self._close, None
        if close is not None:
            close()

    def soft_close(self, result: Any, dbapi_cursor: Any) -> None:
        self._end()
        super().soft_close(result, dbapi_cursor)

    def hard_close(self, result: Any, dbapi_cursor: Any) -> None:
        self._end()
        super().hard_close(result, dbapi_cursor)

    def fetchone(self, result: Any, dbapi_cursor: Any, hard_close: bool = False) -> Any:
        for row in self._rows:
            return row
        result._soft_close(hard=hard_close)
        return None

    def fetchmany(self, result: Any, dbapi_cursor: Any, size: int | None = None) -> Any:
        rows = list(self._rows if size is None else islice(self._rows, size))
        if not rows:
            result._soft_close()
        return rows

    def fetchall(self, result: Any, dbapi_cursor: Any) -> Any:
        rows = list(self._rows)
        result._soft_close()
        return rows


class AnsweringDialect(PGDialect_psycopg):
    """A dialect whose cursors look for an answer before they send."""

    supports_statement_cache = True

    def do_execute(self, cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        answer: Answer | None = None if context is None else context.execution_options.get(ANSWER)
        if answer is None:
            super().do_execute(cursor, statement, parameters, context)  # type: ignore[no-untyped-call]
        else:
            context.cursor_fetch_strategy = _Answered(answer)
