"""The guard: connections of applications, whose every transaction begins behind its shard's fence.

In place of psycopg's BEGIN goes ``BEGIN; LOCK TABLE shardkit.<fence> IN ACCESS SHARE MODE``, one simple query, so that
there is no further round trip; psycopg then finds a transaction open and sends no BEGIN of its own. `storage.dialect`
drives this from SQLAlchemy's begin. Whatever would reach a shard in another way (a statement outside a transaction,
autocommit, ``connection.transaction()``, the driver's two-phase commit, COMMIT as text) is refused here. Where reads
may be old, on a replica, the fence is not locked but looked for in the transaction's snapshot (`snapshots`). What only
read is rolled back without waiting for the answer. What is private in psycopg is used in this module and in no other;
``tests/unit/test_guard_api.py`` fails when it changes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn, Self
from uuid import UUID

import psycopg
from psycopg import errors, generators, pq, sql
from psycopg._connection_base import BaseConnection

from shardkit.core.errors import TopologyChanged, TopologyUnsettled, UnguardedStatement
from shardkit.core.topology import Fence, Topology

from . import snapshots
from .identity import ShardIdentity
from .scope import Scope
from .snapshots import NoStandby, Source
from .sqltext import Control, control

IDLE = pq.TransactionStatus.IDLE
INTRANS = pq.TransactionStatus.INTRANS
INERROR = pq.TransactionStatus.INERROR

# The server has waited for its own lock_timeout or statement_timeout already; a very short one must not spin.
_RETRY_PAUSE = 0.005

_NO_FENCE = (errors.UndefinedTable, errors.InvalidSchemaName)
_IMPATIENT = (errors.LockNotAvailable, errors.QueryCanceled, errors.DeadlockDetected)
# A standby that has to go on with its replay cancels who is in its way.
_CANCELLED = (*_IMPATIENT, errors.SerializationFailure)


class StaleFence(Exception):  # a signal between guard and session, never seen by an application
    """The fence is not there, so the shard has another topology; ``copy`` is the one it holds, if it could be read.

    No subclass of psycopg.Error, so that SQLAlchemy passes it through as it is.
    """

    def __init__(
        self, shard_name: str, fence: Fence, copy: Topology | None, source: Source | None = None
    ) -> None:
        super().__init__(f"shard {shard_name} has no {fence.relation}")
        self.source = source
        self.shard_name = shard_name
        self.fence = fence
        self.copy = copy


@dataclass(frozen=True, slots=True)
class Guard:
    """What a transaction begins behind: the fence of a shard, for a scope, to be had until a deadline (monotonic).

    It is locked, or, where a ``source`` of old reads is given, looked for in the snapshot of a read-only transaction.
    """

    identity: ShardIdentity
    fence: Fence
    scope: Scope
    deadline: float
    source: Source | None = None

    @property
    def shard_name(self) -> str:
        """The shard's name."""
        return self.identity.name


@lru_cache(maxsize=1024)
def _lock(fence: Fence) -> bytes:
    relation = sql.Identifier("shardkit", fence.relation)
    return sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(relation).as_bytes(None)


# With whose shard it is: the database at the end of a URL may have become another one's.
_READ_COPY = (
    b"SELECT t.document, s.cluster_id, s.shard_id, s.name FROM shardkit.topology t CROSS JOIN shardkit.shard s "
    b"ORDER BY t.version DESC LIMIT 1"
)
_SAVE = b"SAVEPOINT shardkit_fence; "
_KEEP = b"; RELEASE SAVEPOINT shardkit_fence"
_UNDO = b"ROLLBACK TO SAVEPOINT shardkit_fence; RELEASE SAVEPOINT shardkit_fence"


def _refuse(what: str) -> NoReturn:
    raise UnguardedStatement(f"{what} would run on a shard outside a guarded transaction.")


class _Guarded(BaseConnection[Any]):
    """What both kinds of connection share: a `storage.scope.Participant` while a guarded transaction is open."""

    shard_id = -1
    shard_name = ""
    held: tuple[Fence, ...] = ()
    sent = False
    wrote = False
    ended = False
    """Whether COMMIT was sent before SQLAlchemy asked for it: readers end before the writer."""
    scope: Scope | None = None
    source: Source | None = None
    """Where its reads come from, if they may be old; then it writes nothing and holds no lock."""
    _shown: tuple[Fence, ...] = ()
    _from_standby = False
    """Whether the server was a standby when it was connected to. One that was none then stays so: it would have to be
    started again."""
    _doors = 0
    _only_read = False
    """Whether the guarded transaction that is open has sent nothing but reads."""
    _owed = False
    """Whether the answer to a ROLLBACK is still to be read."""

    @contextmanager
    def door(self) -> Iterator[None]:
        """Open to statements without a fence: for the dialect's own questions and the ping of the pool."""
        self._doors += 1
        try:
            yield
        finally:
            self._doors -= 1

    def check_text(self, query: bytes) -> None:
        """Refuse transaction commands as text; forget the fences that a rollback to a savepoint may release."""
        found = control(query)
        if found is Control.READ:
            return
        self._only_read = False
        if found is Control.NONE or self._doors:
            return
        if found is Control.END:
            _refuse("A transaction command as text")
        if self.source is None:  # a snapshot goes on to show what it showed
            self.held = self.held[:1]

    # --- psycopg's private side ------------------------------------------------------------------------------------

    def _roll_back_soon(self) -> bool:
        """Send ROLLBACK, whose answer the next user of the connection reads; False if that has to be waited for.

        What was only read is not taken back by it: it lets the fence go, as soon as the server has the message. And no
        statement made or dropped anything that would spoil those prepared, which the driver gives up on a ROLLBACK.
        """
        if self._owed:  # SQLAlchemy's pool rolls back what its session has
            return True
        if not self._only_read or self.wrote or self._pipeline:
            return False
        if self.pgconn.transaction_status != INTRANS:
            return False
        self.pgconn.send_query(b"ROLLBACK")
        self._owed = True
        return not self.pgconn.flush()

    def _answer_gen(self) -> Any:
        """Read the answer that is owed."""
        self._owed = False
        self.pgconn.consume_input()  # where it has arrived, there is nothing to poll for
        results = yield from generators.execute(self.pgconn)
        if self.pgconn.transaction_status == INERROR:  # somebody cancelled it: no business of who comes now
            yield from self._simple(b"ROLLBACK")
            return
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise errors.error_from_result(result, encoding=self.info.encoding)

    def _start_query(self) -> Any:
        if self.pgconn.transaction_status == IDLE and not self._doors:
            _refuse("This statement")
        self.sent = True
        return super()._start_query()

    def _set_autocommit_gen(self, value: bool) -> Any:
        if value and not self._doors:
            _refuse("Statements in autocommit")
        return super()._set_autocommit_gen(value)

    def _tpc_begin_gen(self, xid: Any) -> Any:
        _refuse("The driver's two-phase transaction")

    def _tpc_finish_gen(self, action: Any, xid: Any) -> Any:
        _refuse("The driver's two-phase transaction")

    def _simple(self, message: bytes) -> Any:
        """Send one simple query (a generator): its results, or the first error."""
        self._check_connection_ok()
        self.pgconn.send_query(message)
        results = yield from generators.execute(self.pgconn)
        for result in results:
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise errors.error_from_result(result, encoding=self.info.encoding)
        return results

    def _begin_gen(self, guard: Guard) -> Any:
        """BEGIN and LOCK in one message; after an error the connection is idle again."""
        if guard.source is not None:
            yield from self._begin_snapshot_gen(guard, guard.source)
            return
        if self._from_standby:
            yield from self._require_primary_gen()
        self._shown = (guard.fence,)
        try:
            yield from self._simple(self._get_tx_start_command() + b"; " + _lock(guard.fence))
        except _NO_FENCE as error:
            copy = yield from self._copy_gen(guard, first=b"ROLLBACK; ")
            raise StaleFence(guard.shard_name, guard.fence, copy) from error
        except _IMPATIENT:
            yield from self._simple(b"ROLLBACK")
            raise

    def _require_primary_gen(self) -> Any:
        """A standby lets the fence be locked that it has replayed, and shows old rows: the shard is elsewhere."""
        # It was one when it was connected to, or when the pooler between, which says the same to all, was.
        results = yield from self._simple(b"SELECT pg_catalog.pg_is_in_recovery()")
        if results[-1].get_value(0, 0) == b"t":
            self.pgconn.finish()  # the next connection may find the primary
            raise errors.CannotConnectNow("the server is a standby")
        self._from_standby = False

    def _begin_snapshot_gen(self, guard: Guard, source: Source) -> Any:
        """BEGIN and a look at the fences in one message; after an error the connection is idle again."""
        try:
            results = yield from self._simple(snapshots.BEGIN)
        except _CANCELLED:
            yield from self._simple(b"ROLLBACK")
            raise
        is_standby, self._shown = snapshots.seen(results[-1])
        if source.is_replica and not is_standby:
            yield from self._simple(b"ROLLBACK")
            raise NoStandby
        if not self._shown or guard.fence != max(self._shown):
            yield from self._simple(b"ROLLBACK")
            raise StaleFence(guard.shard_name, guard.fence, (yield from self._copy_gen(guard)), source)

    def _command_gen(self, message: bytes) -> Any:
        results = yield from self._simple(message)
        return [result.command_status for result in results]

    def _begin_unfenced_gen(self) -> Any:
        yield from self._simple(self._get_tx_start_command())

    def _rebegin_gen(self, guard: Guard) -> Any:
        yield from self._simple(b"ROLLBACK")
        yield from self._begin_gen(guard)

    def _lock_more_gen(self, guard: Guard) -> Any:
        """Lock one more fence in the open transaction; an error leaves the transaction as it was."""
        if self.pgconn.transaction_status == INERROR:
            raise TopologyChanged
        shown = yield from self._simple(b"SHOW transaction_isolation")
        if shown[0].get_value(0, 0) not in (b"read committed", b"read uncommitted"):
            raise TopologyChanged(
                f"Keys came to shard {guard.shard_name} while a transaction with an older snapshot was open there.",
                shard=guard.shard_name,
            )
        try:
            yield from self._simple(_SAVE + _lock(guard.fence) + _KEEP)
        except _NO_FENCE as error:
            yield from self._simple(_UNDO)
            raise StaleFence(guard.shard_name, guard.fence, (yield from self._copy_gen(guard))) from error
        except _IMPATIENT:
            yield from self._simple(_UNDO)
            raise

    def _copy_gen(self, guard: Guard, *, first: bytes = b"") -> Any:
        """The shard's copy of the topology; None where it cannot be read, so that others are asked. A command may come
        ``first`` in the same message.

        `IncompatibleServer` for the database of another shard: what it holds is no news of this one.
        """
        in_transaction = not first and self.pgconn.transaction_status != IDLE
        try:
            results = yield from self._simple((_SAVE if in_transaction else first) + _READ_COPY)
        except psycopg.DatabaseError:
            if self.pgconn.status != pq.ConnStatus.OK:
                raise
            if in_transaction:
                yield from self._simple(_UNDO)
            return None
        if in_transaction:
            yield from self._simple(_UNDO)
        found = results[-1]
        if not found.ntuples:
            return None
        document, cluster, shard_id, name = (
            found.get_value(0, column).decode(self.info.encoding) for column in range(4)
        )
        guard.identity.check(UUID(cluster), int(shard_id), name)
        return Topology.from_json(json.loads(document))

    # --- the state of a transaction --------------------------------------------------------------------------------

    def entered(self, guard: Guard) -> None:
        """A transaction is open behind the fence."""
        self.shard_id, self.shard_name = guard.identity.shard_id, guard.identity.name
        self.held = self._shown
        self.source = guard.source
        self.sent = self.wrote = self.ended = False
        self._only_read = True
        self.scope = guard.scope
        guard.scope.participants[self.shard_id] = self

    def wait_at_end(self) -> None:
        """The end of this transaction is waited for, whatever it did."""
        self._only_read = False

    def left(self) -> None:
        """No transaction is open."""
        self.scope = self.source = None
        self.held = ()
        self.sent = self.wrote = self.ended = self._only_read = False

    def locked(self, guard: Guard) -> None:
        """One more fence is held."""
        self.held = (*self.held, guard.fence)


def _check_patience(guard: Guard, error: BaseException) -> None:
    """A role's own lock_timeout must not turn a cutover into an error of the application, up to the deadline."""
    if time.monotonic() > guard.deadline:
        raise TopologyUnsettled(
            f"The fence of shard {guard.shard_name} could not be had in time: {error}".strip(),
            hint="Somebody holds it: `shardkit status` shows a change at work. Try again.",
            shard=guard.shard_name,
        ) from error


_Step = Callable[[Guard], Any]


class _GuardedCursor:
    """A cursor that shows the connection what it is about to send, as it will be sent."""

    def _convert_query(self, query: Any, params: Any = None) -> Any:
        converted = super()._convert_query(query, params)  # type: ignore[misc]
        self._conn.check_text(converted.query)  # type: ignore[attr-defined]
        return converted


@lru_cache(maxsize=64)
def _guarded(cursor: type[Any]) -> type[Any]:
    """A class of cursors, guarded."""
    return type(cursor.__name__, (_GuardedCursor, cursor), {})


class GuardedConnection(_Guarded, psycopg.Connection[Any]):
    """A connection of the sync engines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._from_standby = self.pgconn.parameter_status(b"in_hot_standby") == b"on"
        self.cursor_factory = _guarded(psycopg.Cursor)
        self.server_cursor_factory = _guarded(psycopg.ServerCursor)

    @classmethod
    def connect(cls, *args: Any, cursor_factory: Any = None, **kwargs: Any) -> Self:
        """As psycopg's; a cursor class of the application's own is guarded as well."""
        return super().connect(*args, cursor_factory=cursor_factory and _guarded(cursor_factory), **kwargs)

    def transaction(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Refused: it sends a BEGIN without a fence, or unwinds savepoints that hold one."""
        if not self._doors:
            _refuse("A transaction of the driver")
        return super().transaction(*args, **kwargs)

    def _patiently(self, step: _Step, guard: Guard) -> None:
        while True:
            try:
                with self.lock:
                    self.wait(step(guard))
                return
            except _CANCELLED as error:
                _check_patience(guard, error)
            time.sleep(_RETRY_PAUSE)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's, after what is owed."""
        if self._owed:
            super().wait(self._answer_gen())
        return super().wait(*args, **kwargs)

    def rollback(self) -> None:
        """As psycopg's; where the transaction only read, the answer is not waited for."""
        with self.lock:
            if self._roll_back_soon():
                return
        super().rollback()

    def begin(self, guard: Guard) -> None:
        """Begin behind the fence; `StaleFence` with nothing left open."""
        self._patiently(self._begin_gen, guard)
        self.entered(guard)

    def command(self, message: bytes) -> list[bytes]:
        """Send commands of shardkit's own, as they are; what the server says of each (its command tag)."""
        with self.lock:
            tags: list[bytes] = self.wait(self._command_gen(message))
        return tags

    def begin_unfenced(self) -> None:
        """Begin without a fence: for shardkit's own tables alone."""
        with self.lock:
            self.wait(self._begin_unfenced_gen())

    def rebegin(self, guard: Guard) -> None:
        """Begin again behind another fence, on a connection on which nothing was sent."""
        assert not self.sent
        self.held = ()  # an error leaves no transaction open
        self._patiently(self._rebegin_gen, guard)
        self.entered(guard)

    def lock_more(self, guard: Guard) -> None:
        """Hold one more fence in the open transaction; `TopologyChanged` where its snapshot is older."""
        self._patiently(self._lock_more_gen, guard)
        self.locked(guard)


class GuardedAsyncConnection(_Guarded, psycopg.AsyncConnection[Any]):
    """A connection of the async engines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._from_standby = self.pgconn.parameter_status(b"in_hot_standby") == b"on"
        self.cursor_factory = _guarded(psycopg.AsyncCursor)
        self.server_cursor_factory = _guarded(psycopg.AsyncServerCursor)

    @classmethod
    async def connect(cls, *args: Any, cursor_factory: Any = None, **kwargs: Any) -> Self:
        """As on the sync connection."""
        guarded = cursor_factory and _guarded(cursor_factory)
        return await super().connect(*args, cursor_factory=guarded, **kwargs)

    def transaction(self, *args: Any, **kwargs: Any) -> AbstractAsyncContextManager[Any]:  # type: ignore[override]
        """Refused, as on the sync connection."""
        if not self._doors:
            _refuse("A transaction of the driver")
        return super().transaction(*args, **kwargs)

    async def _patiently(self, step: _Step, guard: Guard) -> None:
        while True:
            try:
                async with self.lock:
                    await self.wait(step(guard))
                return
            except _CANCELLED as error:
                _check_patience(guard, error)
            await asyncio.sleep(_RETRY_PAUSE)

    async def wait(self, *args: Any, **kwargs: Any) -> Any:
        """As on the sync connection."""
        if self._owed:
            await super().wait(self._answer_gen())
        return await super().wait(*args, **kwargs)

    async def rollback(self) -> None:
        """As on the sync connection."""
        async with self.lock:
            if self._roll_back_soon():
                return
        await super().rollback()

    async def begin(self, guard: Guard) -> None:
        """As on the sync connection."""
        await self._patiently(self._begin_gen, guard)
        self.entered(guard)

    async def command(self, message: bytes) -> list[bytes]:
        """As on the sync connection."""
        async with self.lock:
            tags: list[bytes] = await self.wait(self._command_gen(message))
        return tags

    async def begin_unfenced(self) -> None:
        """As on the sync connection."""
        async with self.lock:
            await self.wait(self._begin_unfenced_gen())

    async def rebegin(self, guard: Guard) -> None:
        """As on the sync connection."""
        assert not self.sent
        self.held = ()
        await self._patiently(self._rebegin_gen, guard)
        self.entered(guard)

    async def lock_more(self, guard: Guard) -> None:
        """As on the sync connection."""
        await self._patiently(self._lock_more_gen, guard)
        self.locked(guard)
