"""Answers: executing a statement without sending it, since its rows are known already.

Rows that several shards returned are merged as the driver gave them. To become a result of the application's own
statement (with its types, its entities, its options) that statement goes through SQLAlchemy's whole execution, and
where the cursor would send it the merged rows are put in place. Driven by `orm.dispatch`; the dialects of
`storage.dialect` have this in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy

ANSWER = "shardkit_answer"
"""Execution option: the `Answer` of a statement, which is then not sent."""


class Answer(NamedTuple):
    """Rows as the driver gives them, and what its cursor says of their columns."""

    description: Sequence[Any]
    rows: Iterable[Any]


class AnsweringDialect(PGDialect_psycopg):
    """A dialect whose cursors look for an answer before they send."""

    supports_statement_cache = True

    def do_execute(self, cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        answer: Answer | None = None if context is None else context.execution_options.get(ANSWER)
        if answer is None:
            super().do_execute(cursor, statement, parameters, context)  # type: ignore[no-untyped-call]
        else:
            context.cursor_fetch_strategy = FullyBufferedCursorFetchStrategy(
                cursor, alternate_description=answer.description, initial_buffer=answer.rows
            )
