"""What the guard and the session use of psycopg and SQLAlchemy without being promised it.

When one of these fails, a release has changed something under them: read what changed, see whether the guard still
stands in every way to the server, and only then correct the expectation here.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import _connection_base, _cursor_base, _pipeline, _server_cursor_base, transaction
from sqlalchemy import CursorResult
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg, PGDialectAsync_psycopg
from sqlalchemy.engine.base import Connection
from sqlalchemy.engine.default import DefaultDialect, DefaultExecutionContext
from sqlalchemy.orm import Session, SessionTransaction, bulk_persistence, persistence

SENDS = {"_exec_command", "send_query", "send_query_params", "send_query_prepared", "send_prepare"}
SENDERS: dict[Any, dict[str, set[str]]] = {
    _connection_base: {
        # Inside a transaction that is open, or to open one: each is guarded, refused, or ends what is open.
        "_exec_command": {"send_query", "send_query_params"},
        "_start_query": {"_exec_command"},
        "_commit_gen": {"_exec_command"},
        "_rollback_gen": {"_exec_command"},
        "_deallocate": {"_exec_command"},
        "_tpc_begin_gen": {"_exec_command"},
        "_tpc_prepare_gen": {"_exec_command"},
        "_tpc_finish_gen": {"_exec_command"},
    },
    _cursor_base: {
        "_execute_send": {"send_query", "send_query_params"},
        "_send_prepare": {"send_prepare"},
        "_send_query_prepared": {"send_query_prepared"},
    },
    _server_cursor_base: {
        "_close_gen": {"_exec_command"},
        "_fetch_gen": {"_exec_command"},
        "_scroll_gen": {"_exec_command"},
    },
    _pipeline: {},
    transaction: {
        "_enter_gen": {"_exec_command"},
        "_commit_gen": {"_exec_command"},
        "_rollback_gen": {"_exec_command"},
    },
}
"""Every function of psycopg that sends something to the server, by module."""


def _calls(module: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        called = {
            each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and each.attr in SENDS
        }
        if called:
            found[node.name] = called
    return found


@pytest.mark.parametrize("module", SENDERS, ids=lambda module: module.__name__)
def test_psycopg_sends_from_no_other_place(module: Any) -> None:
    assert _calls(module) == SENDERS[module]


def _statements(function: Callable[..., Any]) -> str:
    return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function))))


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        (_connection_base.BaseConnection._start_query,
         ["self._autocommit", "transaction_status != IDLE", "_get_tx_start_command"]),
        (_connection_base.BaseConnection._set_autocommit_gen, ["self._autocommit = bool(value)"]),
        (_connection_base.BaseConnection._commit_gen, ["transaction_status == IDLE", "return", "b'COMMIT'"]),
        (_cursor_base.BaseCursor._start_query, ["self._conn._start_query()"]),
        (_cursor_base.BaseCursor._execute_gen, ["self._start_query(query)", "self._convert_query(query, params)"]),
        (_cursor_base.BaseCursor._executemany_gen_pipeline,
         ["self._start_query(query)", "self._convert_query(query, params)"]),
        (_cursor_base.BaseCursor._executemany_gen_no_pipeline,
         ["self._start_query(query)", "self._convert_query(query, params)"]),
        (_cursor_base.BaseCursor._stream_send_gen,
         ["self._start_query(query)", "self._convert_query(query, params)"]),
        (_cursor_base.BaseCursor._start_copy_gen, ["self._start_query()", "self._convert_query(statement)"]),
        (_server_cursor_base.ServerCursorMixin._declare_gen,
         ["self._start_query(query)", "self._convert_query(query, params)"]),
        (psycopg.Connection.commit, ["self.lock", "self.wait(self._commit_gen())"]),
        (psycopg.AsyncConnection.commit, ["self.lock", "self.wait(self._commit_gen())"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)  # fmt: skip
def test_psycopg_starts_every_statement_in_one_place(function: Any, parts: list[str]) -> None:
    source = _statements(function)
    for part in parts:
        assert part in source


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (_connection_base.BaseConnection._start_query, ["self"]),
        (_connection_base.BaseConnection._get_tx_start_command, ["self"]),
        (_connection_base.BaseConnection._check_connection_ok, ["self"]),
        (_connection_base.BaseConnection._set_autocommit_gen, ["self", "value"]),
        (_connection_base.BaseConnection._tpc_begin_gen, ["self", "xid"]),
        (_connection_base.BaseConnection._tpc_finish_gen, ["self", "action", "xid"]),
        (_cursor_base.BaseCursor._convert_query, ["self", "query", "params"]),
        (psycopg.Connection.wait, ["self", "gen", "interval", "timeout"]),
        (psycopg.AsyncConnection.wait, ["self", "gen", "interval", "timeout"]),
        (DefaultDialect.do_begin, ["self", "dbapi_connection"]),
        (DefaultDialect.do_commit, ["self", "dbapi_connection"]),
        (DefaultDialect.do_rollback, ["self", "dbapi_connection"]),
        (PGDialect_psycopg.do_ping, ["self", "dbapi_connection"]),
        (PGDialect_psycopg.initialize, ["self", "connection"]),
        (DefaultExecutionContext.pre_exec, ["self"]),
        (Session._autoflush, ["self"]),
        (Session._connection_for_bind, ["self", "engine", "execution_options", "kw"]),
        (SessionTransaction.connection, ["self", "bindkey", "execution_options", "kwargs"]),
        (CursorResult._rewind, ["self", "rows"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize(
    ("function", "parts"),
    [
        # The dialect begins before the connection enters the session's transaction, with nothing to clean.
        (Connection._begin_impl, ["self.engine.dialect.do_begin(self.connection)"]),
        (Connection._execute_context, ["context.pre_exec()"]),
        (PGDialect_psycopg._do_isolation_level, ["connection.autocommit = autocommit"]),
        (PGDialectAsync_psycopg._do_isolation_level, ["connection.set_autocommit(autocommit)"]),
        # A statement gets its connection after autoflush and events, by the two calls that the session overrides.
        (Session._execute_internal, ["bind = self.get_bind(**bind_arguments)", "conn = self._connection_for_bind(bind)",
                                     "self._autoflush()", "conn.execute(statement", "conn.scalar(statement"]),
        # Bulk operations ask the transaction, and refuse a session that has a connection for each instance.
        (bulk_persistence._bulk_insert, ["session_transaction.connection(base_mapper)", "connection_callable"]),
        (bulk_persistence._bulk_update, ["session_transaction.connection(base_mapper)", "connection_callable"]),
        (persistence._connections_for_states, ["connection_callable(base_mapper, state.obj())"]),
        (inspect.unwrap(SessionTransaction.connection), ["self.session.get_bind(bindkey, **kwargs)"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)  # fmt: skip
def test_sqlalchemy_asks_where_the_session_answers(function: Any, parts: list[str]) -> None:
    source = _statements(function)
    for part in parts:
        assert part in source
