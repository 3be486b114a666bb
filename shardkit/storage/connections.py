"""Connections for administration: plain psycopg, autocommit, outside the guard.

The mover and the commands use them. Applications never do: their statements go through the guarded engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from ..core.errors import CatalogUnreachable, ShardUnreachable
from .urls import conninfo, redacted

Connection = psycopg.Connection[tuple[Any, ...]]

# A dead network must not hold a mover for the two hours of the kernel's default.
_LIVENESS: dict[str, int] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def connect(url: str, *, application: str = "shardkit", options: str | None = None) -> Connection:
    """An autocommit connection; ``psycopg.OperationalError`` if the server does not answer."""
    return psycopg.connect(
        conninfo(url, **{**_LIVENESS, "application_name": application, "options": options}), autocommit=True
    )


def connect_shard(url: str, name: str, **extra: Any) -> Connection:
    """`connect`, with `ShardUnreachable` that names the shard."""
    try:
        return connect(url, **extra)
    except psycopg.OperationalError as error:
        raise ShardUnreachable(
            f"Shard {name} at {redacted(url)} does not answer: {_first_line(error)}", shard=name
        ) from error


def connect_catalog(url: str, **extra: Any) -> Connection:
    """`connect`, with `CatalogUnreachable`."""
    try:
        return connect(url, **extra)
    except psycopg.OperationalError as error:
        raise CatalogUnreachable(f"The catalog at {redacted(url)} does not answer: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def transaction(connection: Connection, *settings: tuple[str, str]) -> Iterator[Connection]:
    """A transaction with settings of its own (``SET LOCAL``)."""
    with connection.transaction():
        for name, value in settings:
            connection.execute("SELECT set_config(%s, %s, true)", (name, value))
        yield connection


def value(connection: Connection, query: Any, parameters: Any = None) -> Any:
    """The first column of the first row, or None."""
    row = connection.execute(query, parameters).fetchone()
    return row[0] if row else None
