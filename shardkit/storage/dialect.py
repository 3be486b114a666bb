"""SQLAlchemy's side of the guard: dialects whose BEGIN is guarded and whose COMMIT ends readers first.

The session names the fence by `behind`, for the time of one begin alone; SQLAlchemy calls `do_begin` before the
connection enters the session's transaction, so that a refusal leaves nothing to clean. Engines are made from URLs with
the driver name ``postgresql+shardkit``; `storage.engines` does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, cast
from uuid import UUID

import psycopg
from psycopg import errors
from sqlalchemy import BigInteger, Connection, Text, Uuid, func, literal, select, text
from sqlalchemy import cast as cast_in_sql
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import (
    PGDialectAsync_psycopg,
    PGExecutionContext_psycopg,
)
from sqlalchemy.util.concurrency import await_

from shardkit.core.errors import (
    CommitPending,
    CommitUnknown,
    IncompatibleServer,
    PartlyCommitted,
    ReplicaReadOnly,
    ShardkitError,
    ShardUnreachable,
    UnguardedStatement,
)
from shardkit.core.ring import position

from .answers import AnsweringDialect
from .guard import IDLE, INERROR, Guard, GuardedAsyncConnection, GuardedConnection
from .identity import ShardIdentity
from .scope import Scope
from .servers import VECTORS
from .twophase import Ending

DRIVER = "postgresql+shardkit"
READ_IDENTITY = "SELECT cluster_id, shard_id, name FROM shardkit.shard"
WRITES = "shardkit_writes"
"""Execution option: whether a statement that does not show it writes; text does unless this is False."""

_order: ContextVar[Guard | None] = ContextVar("shardkit_guard", default=None)
_unfenced: ContextVar[bool] = ContextVar("shardkit_unfenced", default=False)


class behind:
    """Transactions that this thread or task begins in the block begin behind ``guard``."""

    __slots__ = ("_guard", "_token")

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def __enter__(self) -> None:
        self._token = _order.set(self._guard)

    def __exit__(self, *_: object) -> None:
        _order.reset(self._token)


@contextmanager
def unfenced() -> Iterator[None]:
    """Transactions that this thread or task begins in the block have no fence: for shardkit's own tables alone."""
    token = _unfenced.set(True)
    try:
        yield
    finally:
        _unfenced.reset(token)


class _Context(PGExecutionContext_psycopg):
    """An execution that tells its connection's scope whether it writes, before it is sent."""

    def pre_exec(self) -> None:
        raw = cast(_GuardedDialect, self.dialect)._raw(self.root_connection.connection)
        if raw.source is not None:
            if self._is_dml():
                raise ReplicaReadOnly(
                    f"This statement writes, and would have been sent to the {raw.source} of shard "
                    f"{raw.shard_name}.",
                    shard=raw.shard_name,
                )
        elif raw.scope is not None and self._writes():
            raw.scope.admit_write(raw)
        super().pre_exec()  # type: ignore[no-untyped-call]

    def _writes(self) -> bool:
        if self.isinsert or self.isupdate or self.isdelete:
            return True
        marked = self.execution_options.get(WRITES)
        if marked is not None:
            return bool(marked)
        return self.compiled is None or self.is_text or self._is_dml()

    def _is_dml(self) -> bool:
        """Whether it shows that it writes; text and functions do not."""
        if self.isinsert or self.isupdate or self.isdelete:
            return True
        return any(cte.element.is_dml for cte in getattr(self.compiled, "ctes", None) or ())


class _GuardedDialect(AnsweringDialect):
    """What both dialects share; `_run` runs a method of the connection, or awaits its coroutine."""

    driver = "shardkit"
    supports_statement_cache = True
    execution_ctx_cls = _Context

    def __init__(self, shard: ShardIdentity | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.shard = shard
        self.rounds: str | None = None
        """Why values that are written as text here are not read as the same on another server, if they are not."""

    def _run(self, outcome: Any) -> Any:
        raise NotImplementedError

    def _raw(self, dbapi_connection: Any) -> Any:
        """The driver's connection behind the pool's proxy."""
        raise NotImplementedError

    # --- beginning -------------------------------------------------------------------------------------------------

    def do_begin(self, dbapi_connection: Any) -> None:
        raw = self._raw(dbapi_connection)
        guard = _order.get()
        if guard is not None:
            self._run(raw.begin(guard))
        elif _unfenced.get():
            self._run(raw.begin_unfenced())
        else:
            raise UnguardedStatement("A transaction was about to begin on a shard without its fence.")

    def do_begin_twophase(self, connection: Connection, xid: Any) -> None:
        raise UnguardedStatement("SQLAlchemy's two-phase transactions begin without a fence.")

    # --- ending ----------------------------------------------------------------------------------------------------

    def do_commit(self, dbapi_connection: Any) -> None:
        raw = self._raw(dbapi_connection)
        try:
            self._end(dbapi_connection, raw)
        except BaseException:
            # SQLAlchemy takes a COMMIT that failed for an end, and would give the pool what is still open.
            if not raw.closed and raw.pgconn.transaction_status != IDLE:
                with suppress(psycopg.Error):
                    self._run(raw.rollback())
                raw.left()
            raise

    def _end(self, dbapi_connection: Any, raw: Any) -> None:
        if raw.ended:
            raw.left()
        elif raw.source is not None:
            self._end_snapshot(dbapi_connection, raw)
        elif raw.scope is not None and raw.scope.failed:
            raise _failed()
        elif raw.scope is None:
            self._run(raw.commit())
            raw.left()
        elif not raw.wrote:
            self._end_reader(raw)
            raw.left()
        else:
            self._end_writer(dbapi_connection, raw, raw.scope)

    def _end_snapshot(self, dbapi_connection: Any, raw: Any) -> None:
        """COMMIT on a replica. It was read as of one moment, so losing it now takes nothing back, and must not make an
        error of a transaction whose writer is committed already."""
        with _lost_is_ended(dbapi_connection, raw):
            self._run(raw.commit())
        raw.left()

    def _end_reader(self, reader: Any) -> None:
        """COMMIT where nothing was written; `ShardUnreachable` if the shard was lost: what was read from it may not
        be what was there."""
        try:
            self._run(reader.commit())
        except psycopg.OperationalError as error:
            if not reader.closed:
                raise
            raise ShardUnreachable(
                f"Shard {reader.shard_name}, which this transaction has read, was lost before COMMIT; "
                "nothing was committed.",
                hint="Run the unit of work again.",
                shard=reader.shard_name,
            ) from error
        reader.ended = True

    def _end_writer(self, dbapi_connection: Any, raw: Any, scope: Scope) -> None:
        """Readers first: when one of them fails, nothing is committed. Then COMMIT."""
        writers = scope.writers()
        if any(cast(GuardedConnection, one).pgconn.transaction_status == INERROR for one in writers):
            # The server would answer COMMIT with ROLLBACK, and the driver would not tell; and what was written on
            # other shards belongs to the same transaction.
            raise _failed()
        try:
            for reader in list(scope.participants.values()):
                if not reader.wrote and not cast(GuardedConnection, reader).ended:
                    self._end_reader(reader)
            if scope.mode == "two_phase" and len(writers) > 1:
                Ending(scope, writers, self._run, self._commit_writer).run()
                raw.left()
                return
            self._commit_writer(raw)
        except (psycopg.Error, ShardkitError) as error:
            if raw.closed and (scope.committed or not isinstance(error, psycopg.Error)):
                # SQLAlchemy does so for the driver's errors alone.
                dbapi_connection.invalidate(error)
            if scope.committed and not isinstance(error, CommitPending):
                raise PartlyCommitted(
                    f"Committed on {', '.join(scope.committed)}, but not on {raw.shard_name}: {error}",
                    committed=list(scope.committed),
                    failed=raw.shard_name,
                ) from error
            raise
        scope.committed.append(raw.shard_name)
        raw.left()

    def _commit_writer(self, raw: Any) -> None:
        if raw.closed:
            raise psycopg.OperationalError("the connection was lost before COMMIT; nothing was committed")
        try:
            self._run(raw.commit())
        except errors.IdleInTransactionSessionTimeout:
            raise  # the server had ended the transaction before COMMIT was sent
        except psycopg.OperationalError as error:
            if not raw.closed:
                raise
            raise CommitUnknown(
                f"The connection to shard {raw.shard_name} was lost during COMMIT, so it is not known whether the "
                "transaction was committed.",
                shard=raw.shard_name,
            ) from error

    def do_rollback(self, dbapi_connection: Any) -> None:
        raw = self._raw(dbapi_connection)
        if raw.closed:
            # Nothing is left to roll back; the pool must not have it again.
            dbapi_connection.invalidate()
        elif raw.source is not None:
            # A replica ends connections that are in the way of its replay.
            with _lost_is_ended(dbapi_connection, raw):
                super().do_rollback(dbapi_connection)  # type: ignore[no-untyped-call]
        else:
            super().do_rollback(dbapi_connection)  # type: ignore[no-untyped-call]
        if raw.scope is not None:
            raw.left()

    # --- the dialect's own questions -------------------------------------------------------------------------------

    def do_ping(self, dbapi_connection: Any) -> bool:
        with self.get_driver_connection(dbapi_connection).door():
            return bool(super().do_ping(dbapi_connection))  # type: ignore[no-untyped-call]

    def initialize(self, connection: Connection) -> None:
        raw: Any = connection.connection.driver_connection
        with raw.door():
            super().initialize(connection)  # type: ignore[no-untyped-call]
            if self.shard is not None:
                _check_hash(connection, self.shard)
                _check_identity(connection, self.shard)
                self.rounds = _rounding(connection)


@contextmanager
def _lost_is_ended(dbapi_connection: Any, raw: Any) -> Iterator[None]:
    """A connection that is lost at the end of a transaction that wrote nothing is no error; the pool forgets it."""
    try:
        yield
    except psycopg.Error:
        if not raw.closed:
            raise
        dbapi_connection.invalidate()


def _failed() -> psycopg.Error:
    return errors.InFailedSqlTransaction("a statement failed in this transaction; nothing is committed")


def _rounding(connection: Connection) -> str | None:
    """The setting of a session by which its text means something else to others, or less."""
    names = ("DateStyle", "IntervalStyle", "extra_float_digits")
    dates, intervals, digits = connection.execute(
        select(*(func.current_setting(name) for name in names))
    ).one()
    if not dates.startswith("ISO"):
        return f"DateStyle is {dates!r} there, not ISO"
    if intervals != "postgres":
        return f"IntervalStyle is {intervals!r} there, not 'postgres'"
    return None if int(digits) >= 1 else f"extra_float_digits is {digits} there, so that floats are rounded"


_HASHES: dict[type, tuple[Any, Any]] = {
    int: (func.hashint8extended, BigInteger),
    str: (func.hashtextextended, Text),
    UUID: (func.uuid_hash_extended, Uuid),
}


def _check_hash(connection: Connection, shard: ShardIdentity) -> None:
    """`IncompatibleServer` for a server that hashes otherwise than the ring."""
    positions = []
    for key in VECTORS:
        hash_of, key_type = _HASHES[type(key)]
        # As text: a cursor that binds on the client would write -9223372036854775808::bigint, which is too large.
        positions.append(hash_of(cast_in_sql(literal(str(key), Text), key_type), 0))
    if tuple(connection.execute(select(*positions)).one()) != tuple(position(key) for key in VECTORS):
        raise IncompatibleServer(
            f"The server of shard {shard.name} hashes otherwise than the ring: keys would be sought on wrong shards.",
            hint="Shards must run on little-endian machines with PostgreSQL's own hash functions.",
            shard=shard.name,
        )


def _check_identity(connection: Connection, shard: ShardIdentity) -> None:
    """`IncompatibleServer` for a database that is another shard or none."""
    row = None
    if connection.execute(text("SELECT to_regclass('shardkit.shard')")).scalar() is not None:
        row = connection.execute(text(READ_IDENTITY)).one_or_none()
    if row is None:
        raise shard.refusal("no shard")
    shard.check(*row)


class GuardedDialect(_GuardedDialect):
    """For `create_engine`."""

    supports_statement_cache = True

    @classmethod
    def get_async_dialect_cls(cls, url: Any) -> type[GuardedAsyncDialect]:
        return GuardedAsyncDialect

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        return GuardedConnection.connect(*args, **kwargs)

    def _run(self, outcome: Any) -> Any:
        return outcome

    def _raw(self, dbapi_connection: Any) -> Any:
        return dbapi_connection.dbapi_connection


class GuardedAsyncDialect(_GuardedDialect, PGDialectAsync_psycopg):
    """For `create_async_engine`."""

    supports_statement_cache = True
    is_async = True

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        return super().connect(*args, async_creator_fn=GuardedAsyncConnection.connect, **kwargs)

    def _run(self, outcome: Any) -> Any:
        return await_(outcome)

    def _raw(self, dbapi_connection: Any) -> Any:
        return dbapi_connection.dbapi_connection._connection


registry.register("postgresql.shardkit", __name__, "GuardedDialect")
