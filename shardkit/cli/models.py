"""The application's models, named on a command line as MODULE:ATTR, and their tables on servers.

Tables are made in transactions that are committed only when everything was found right, so that a refusal leaves no
table behind. Driven by ``schema declare --create`` and ``shard add --models``.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import ExitStack
from typing import Any, Self

import psycopg
from sqlalchemy import MetaData, RootTransaction, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from shardkit.core.errors import Refused, UsageError
from shardkit.orm.declare import declared_table, tables_of_shard
from shardkit.storage.connections import Connection
from shardkit.storage.urls import redacted, sqlalchemy_url

METAVAR = "MODULE:ATTR"


def load(name: str) -> MetaData:
    """The MetaData that MODULE:ATTR names, itself or as ``.metadata`` of a declarative base; `UsageError`."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise UsageError(f"Not a name of models: {name!r}.", hint="It looks like app.models:Base.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"Module {module_name} cannot be imported: {type(error).__name__}: {error}",
            hint="It is looked for in the current folder and among the installed packages.",
        ) from error
    for part in path.split("."):
        found = getattr(found, part, None)
    metadata = getattr(found, "metadata", found)
    if not isinstance(metadata, MetaData):
        raise UsageError(
            f"{path} of module {module_name} is no declarative base and no MetaData.",
            hint="Name what your models inherit from, as in app.models:Base.",
        )
    return metadata


class Provisional:
    """Declared tables of a MetaData, made where they are missing, in open transactions.

    A context manager: what `commit` has not made last is rolled back at the end.
    """

    def __init__(self, metadata: MetaData) -> None:
        self._metadata = metadata
        self._tables = {
            table: found for table in metadata.sorted_tables if (found := declared_table(table)) is not None
        }
        self._ends = ExitStack()
        self._transactions: list[RootTransaction] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ends.close()

    def create(self, url: str, shard: str) -> Connection:
        """Make the missing tables of a shard in its database; a connection that sees them."""
        engine = create_engine(
            sqlalchemy_url(url),
            poolclass=NullPool,
            connect_args={"application_name": "shardkit create", "connect_timeout": 10},
        )
        connection = self._ends.enter_context(engine.connect())
        self._transactions.append(connection.begin())
        # An application's transactions must not queue long behind a foreign key to a table of theirs.
        connection.execute(text("SET LOCAL lock_timeout = '2s'"))
        try:
            self._metadata.create_all(connection, tables=tables_of_shard(self._tables, shard))
        except DBAPIError as error:
            if isinstance(error.orig, psycopg.OperationalError):
                raise  # a lock, or the connection: nothing about the tables
            raise Refused(
                f"The tables cannot be created in {redacted(url)}: {_first_line(error.orig)}",
                hint="Create them there with the migrations or the role that made the others, or correct the models.",
            ) from error
        # As the other administrative connections have it: definitions are compared as text.
        connection.execute(text("SET LOCAL search_path = pg_catalog"))
        raw = connection.connection.driver_connection
        assert raw is not None
        seen: Connection = raw
        return seen

    def commit(self) -> None:
        """Keep the tables."""
        for transaction in self._transactions:
            transaction.commit()


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
