"""Connections for administration: plain psycopg, autocommit, outside the guard.

The mover and the commands use them. Applications never do: their statements go through the guarded engines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from shardkit.core.errors import (
    CatalogAccessRefused,
    CatalogUnreachable,
    ShardAccessRefused,
    ShardUnreachable,
)
from shardkit.core.topology import Shard

from .failpoints import failpoint
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
# Settings of a role or a database are meant for applications: their patience, their isolation.
_SETTINGS = {
    # Every name is qualified here, and definitions read from the server must not depend on a role's search_path.
    "search_path": "pg_catalog",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    # A server that crashes and forgets a token, a version or a decision would give it twice.
    "synchronous_commit": "on",
    # What a killed mover left waiting must not go on for its successor to meet.
    "client_connection_check_interval": "1s",
    # The server's side of the same: a machine that vanished must not keep the lease for two hours.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
SHORT = (
    ("lock_timeout", "2s"),
    # A mover that hangs, or whose machine vanished, loses what it holds.
    ("idle_in_transaction_session_timeout", "2s"),
    ("tcp_user_timeout", "5s"),
)
"""Settings of every transaction in which a mover holds anything: its token, a fence, a lock on a table."""
_SET = """
SELECT set_config(name, setting, false) FROM unnest(%s::text[], %s::text[]) AS wanted (name, setting)
WHERE NOT (name = 'synchronous_commit' AND current_setting(name) = 'remote_apply')
  -- Refused where the system cannot tell.
  AND NOT (name = 'client_connection_check_interval' AND version() ~* 'mingw|windows|visual c')
"""

_REFUSALS = re.compile(
    r"FATAL:\s+(database .* does not exist|role .* (does not exist|is not permitted to log in)"
    r"|.*authentication failed|no pg_hba\.conf entry|pg_hba\.conf rejects|permission denied for database)"
)


def connect(
    url: str, *, application: str = "shardkit", options: str | None = None, seconds: int | None = None
) -> Connection:
    """An autocommit connection; ``psycopg.OperationalError`` if the server does not answer, within ``seconds``."""
    liveness = _LIVENESS if seconds is None else {**_LIVENESS, "connect_timeout": seconds}
    connection = psycopg.connect(
        conninfo(url, **{**liveness, "application_name": application, "options": options}), autocommit=True
    )
    connection.execute(_SET, (list(_SETTINGS), list(_SETTINGS.values())))
    return connection


def connect_shard(url: str, name: str, **extra: Any) -> Connection:
    """`connect`, with `ShardUnreachable` that names the shard; `ShardAccessRefused` if its server answered."""
    try:
        return connect(url, **extra)
    except psycopg.OperationalError as error:
        where = f"Shard {name} at {redacted(url)}"
        if _is_refusal(error):
            raise ShardAccessRefused(
                f"{where} does not let us in: {_first_line(error)}", shard=name
            ) from error
        raise ShardUnreachable(f"{where} does not answer: {_first_line(error)}", shard=name) from error


def connect_catalog(url: str, **extra: Any) -> Connection:
    """`connect`, with `CatalogUnreachable`; `CatalogAccessRefused` if its server answered."""
    try:
        return connect(url, **extra)
    except psycopg.OperationalError as error:
        where = f"The catalog at {redacted(url)}"
        if _is_refusal(error):
            raise CatalogAccessRefused(f"{where} does not let us in: {_first_line(error)}") from error
        raise CatalogUnreachable(f"{where} does not answer: {_first_line(error)}") from error


class ShardConnections:
    """One administrative connection a shard, opened when first asked for; a context manager that closes them.

    Not for several threads: each worker of a mover has its own. With ``at_most`` the connection that was asked for
    least recently is closed when one more is opened, unless it is in a transaction: for who looks at one shard after
    the other, and keeps none for later.
    """

    def __init__(self, application: str = "shardkit mover", *, at_most: int | None = None) -> None:
        self._application = application
        self._at_most = at_most
        self._open: dict[int, Connection] = {}

    def __enter__(self) -> ShardConnections:
        return self

    def __exit__(self, *exc: object) -> None:
        for connection in self._open.values():
            connection.close()

    @property
    def reached(self) -> frozenset[int]:
        """Numbers of the shards that answered and are connected."""
        return frozenset(number for number, connection in self._open.items() if not connection.closed)

    def get(self, shard: Shard) -> Connection:
        """The connection to a shard, opened again if it was lost; `ShardUnreachable`."""
        connection = self._open.pop(shard.id, None)
        if connection is None or connection.closed:
            self._make_room()
            connection = connect_shard(shard.url, shard.name, application=self._application)
        self._open[shard.id] = connection  # the last one: they are in the order of their use
        return connection

    def put(self, shard_id: int, connection: Connection) -> None:
        """Use this connection to a shard, and close it with the others: it is not where the topology says."""
        self._open[shard_id] = connection

    def _make_room(self) -> None:
        if self._at_most is None or len(self._open) < self._at_most:
            return
        idle = (
            number
            for number, connection in self._open.items()
            if connection.closed or connection.info.transaction_status is TransactionStatus.IDLE
        )
        if (number := next(idle, None)) is not None:
            self._open.pop(number).close()


def _is_refusal(error: psycopg.OperationalError) -> bool:
    """Whether a server answered and will answer the same tomorrow: no such database or role, a wrong password."""
    # libpq gives no SQLSTATE for a connection that was never made. Of a server that speaks another language only
    # the missing password is known, and the rest counts as unreachable.
    return (error.pgconn is not None and error.pgconn.needs_password) or _REFUSALS.search(
        str(error)
    ) is not None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def transaction(
    connection: Connection, *settings: tuple[str, str], step: str | None = None
) -> Iterator[Connection]:
    """A transaction with settings of its own (``SET LOCAL``), made in one round trip; ``step`` names its failpoints."""
    with connection.transaction():
        if settings:
            connection.execute(
                "SELECT set_config(name, setting, true) FROM unnest(%s::text[], %s::text[]) AS s (name, setting)",
                ([name for name, _ in settings], [setting for _, setting in settings]),
            )
        yield connection
        if step is not None:
            failpoint(f"{step}.commit")
    if step is not None:
        failpoint(f"{step}.committed")


@contextmanager
def at_once(*connections: Connection) -> Iterator[None]:
    """Statements in the block are sent as they come, and what they return is there when it has ended: several servers
    work side by side, and a statement more costs no round trip. Their errors are raised at the end as well.

    Not within a transaction that goes on afterwards: psycopg asks for a flush behind the end of a pipeline, with which
    the server forgets ``idle_in_transaction_session_timeout`` until the next statement, and what a process that hangs
    has locked would stay locked.
    """
    with ExitStack() as stack:
        for connection in connections if psycopg.Pipeline.is_supported() else ():
            stack.enter_context(connection.pipeline())
        yield


def value(connection: Connection, query: Any, parameters: Any = None) -> Any:
    """The first column of the first row, or None."""
    return only(connection.execute(query, parameters))


def only(answer: psycopg.Cursor[Any]) -> Any:
    """The first column of the first row of an answer, or None."""
    row = answer.fetchone()
    return row[0] if row else None
