"""Create and drop databases of a development server.

Driven by `Cluster` and the test fixtures. Dropping here is ruthless: it ends whatever keeps a database in use,
which is right for a database made to be thrown away and for no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from shardkit.core.errors import ServerFailed

_DROP_SECONDS = 15.0
_POLL_SECONDS = 0.002

_EXISTS = "SELECT 1 FROM pg_database WHERE datname = %s"
_HELD = """
    SELECT 1 FROM pg_subscription JOIN pg_database ON pg_database.oid = subdbid WHERE datname = %s
    UNION ALL SELECT 1 FROM pg_prepared_xacts WHERE database = %s
"""
_SUBSCRIPTIONS = """
    SELECT subname FROM pg_subscription JOIN pg_database ON pg_database.oid = subdbid
    WHERE datname = current_database()
"""
_PREPARED = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
_END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"

Conninfo = Callable[[str], str]
"""A server: from the name of a database to what libpq connects by."""


def create(conninfo: Conninfo, name: str, template: str) -> None:
    """Create the database `name` as a copy of `template`, which nobody may be connected to."""
    statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
    with psycopg.connect(conninfo("postgres"), autocommit=True) as connection:
        connection.execute(statement.format(sql.Identifier(name), sql.Identifier(template)))


def drop(databases: Sequence[tuple[Conninfo, str]]) -> None:
    """Drop the databases that exist of (server, name), and what belongs to them.

    First nobody subscribes any more, then each is dropped: a subscriber would come back and hold its source.
    """
    there = [(conninfo, name) for conninfo, name in databases if _asked(conninfo, _EXISTS, [name])]
    for conninfo, name in there:
        if _asked(conninfo, _HELD, [name, name]):
            _release(conninfo(name))
    for conninfo, name in there:
        _drop(conninfo, name)


def _asked(conninfo: Conninfo, query: LiteralString, parameters: Sequence[str]) -> bool:
    with psycopg.connect(conninfo("postgres"), autocommit=True) as connection:
        return connection.execute(query, parameters).fetchone() is not None


def _release(conninfo: str) -> None:
    """Drop the subscriptions and roll back the prepared transactions of one database: neither yields to FORCE.

    The slots of the subscriptions are on other servers and stay; they go with the databases they belong to.
    """
    with psycopg.connect(conninfo, autocommit=True) as connection:
        # Prepared transactions first: one may hold the lock that a change of a subscription waits for.
        for gid in _names(connection, _PREPARED):
            connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
        for subscription in _names(connection, _SUBSCRIPTIONS):
            name = sql.Identifier(subscription)
            connection.execute(sql.SQL("ALTER SUBSCRIPTION {} DISABLE").format(name))
            connection.execute(sql.SQL("ALTER SUBSCRIPTION {} SET (slot_name = NONE)").format(name))
            connection.execute(sql.SQL("DROP SUBSCRIPTION {}").format(name))


def _drop(conninfo: Conninfo, name: str) -> None:
    statement = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
    deadline = time.monotonic() + _DROP_SECONDS
    with psycopg.connect(conninfo("postgres"), autocommit=True) as connection:
        while True:
            # FORCE alone looks every 100 ms only, and does not end the walsenders of a slot.
            ended = connection.execute(_END_SESSIONS, [name]).fetchall()
            if not ended or time.monotonic() > deadline:
                try:
                    connection.execute(statement)
                    return
                except psycopg.errors.ObjectInUse as error:
                    if time.monotonic() > deadline:
                        raise ServerFailed(f"The database {name} cannot be dropped: {error}") from error
            time.sleep(_POLL_SECONDS)


def _names(connection: psycopg.Connection[Any], query: LiteralString) -> list[str]:
    return [row[0] for row in connection.execute(query)]
