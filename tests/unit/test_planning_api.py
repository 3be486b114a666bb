"""What planning and answering use of SQLAlchemy without being promised it.

When one of these fails, a release has changed something under them: read what changed, see whether what is sent is
still what was planned, and only then correct the expectation here.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from sqlalchemy import BigInteger, Select, bindparam, column, select
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine.base import Connection
from sqlalchemy.engine.cursor import CursorFetchStrategy, CursorResult
from sqlalchemy.engine.default import DefaultDialect, DefaultExecutionContext
from sqlalchemy.sql.base import Generative
from sqlalchemy.sql.cache_key import CacheKey, HasCacheKey
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import BindParameter, ClauseElement


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (ClauseElement._compile_w_cache,
         ["self", "dialect", "compiled_cache", "column_keys", "for_executemany", "schema_translate_map", "kw"]),
        (Connection._execute_clauseelement, ["self", "elem", "distilled_parameters", "execution_options"]),
        (HasCacheKey._gen_cache_key, ["self", "am", "bindparams"]),
        (BindParameter._clone, ["self", "maintain_key", "kw"]),
        (Generative._generate, ["self"]),
        (CursorFetchStrategy.yield_per, ["self", "result", "dbapi_cursor", "num"]),
        (CursorFetchStrategy.soft_close, ["self", "result", "dbapi_cursor"]),
        (CursorFetchStrategy.hard_close, ["self", "result", "dbapi_cursor"]),
        (CursorFetchStrategy.fetchone, ["self", "result", "dbapi_cursor", "hard_close"]),
        (CursorFetchStrategy.fetchmany, ["self", "result", "dbapi_cursor", "size"]),
        (CursorFetchStrategy.fetchall, ["self", "result", "dbapi_cursor"]),
        (DefaultDialect.do_execute, ["self", "cursor", "statement", "parameters", "context"]),
        (SQLCompiler.visit_function, ["self", "func", "add_to_result_map", "kwargs"]),
        (SQLCompiler.update_tables_clause, ["self", "update_stmt", "from_table", "extra_froms", "kw"]),
        (SQLCompiler.delete_table_clause, ["self", "delete_stmt", "from_table", "extra_froms", "kw"]),
        (SQLCompiler._setup_select_stack,
         ["self", "select", "compile_state", "entry", "asfrom", "lateral", "compound_index"]),
        (CursorResult._rewind, ["self", "rows"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)  # fmt: skip
def test_signatures(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


def test_a_cache_key_holds_the_parameters() -> None:
    """In the order in which they stand, each with its callable; and the values of ``params()``."""
    assert CacheKey._fields == ("key", "bindparams", "params")
    bound = bindparam("k", callable_=lambda: 3, type_=BigInteger())
    key = select(column("x")).where(column("x") == bound)._generate_cache_key()
    assert key is not None
    (found,) = key.bindparams
    assert found.callable is not None
    assert found.effective_value == 3


def test_what_was_compiled_is_kept_by_dialect_and_takes_values_from_the_cache_key() -> None:
    source = inspect.getsource(ClauseElement._compile_w_cache)
    for part in ("key = (\n                dialect,", "self._generate_cache_key()", "extracted_params"):
        assert part in source
    source = inspect.getsource(SQLCompiler.construct_params)
    for part in ("bindparam.key in params", "value_param.effective_value", "resolved_extracted"):
        assert part in source
    assert "dialect = self.dialect" in inspect.getsource(Connection._execute_clauseelement)


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (DefaultExecutionContext, ["cursor_fetch_strategy", "compiled_parameters", "_init_compiled"]),
        (SQLCompiler, ["_collected_params", "_truncated_identifier", "_global_attributes", "_bind_processors",
                       "_cache_key_bind_match", "_within_exec_param_key_getter", "bind_names", "prefetch"]),
        (Select, ["_where_criteria", "_limit_clause", "_offset_clause", "_for_update_arg", "_distinct_on",
                  "_fetch_clause", "_prefixes", "_suffixes", "_memoized_keys"]),
        (PGDialect_psycopg, ["statement_compiler", "CACHING_DISABLED", "supports_statement_cache"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_attributes(owner: Any, names: list[str]) -> None:
    known = set(dir(owner)) | {name for class_ in owner.__mro__ for name in getattr(class_, "__annotations__", {})}
    assert [name for name in names if name not in known] == []
