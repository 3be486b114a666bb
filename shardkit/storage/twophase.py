"""The end of a transaction that wrote several shards, in two phases: all of it is committed or nothing.

One participant decides, the one with the lowest number. It writes a row that names the transaction into its own
shard's ``shardkit.decision``; then the others are prepared; then its COMMIT, which makes its data and the row true at
once, is the decision; then the prepared ones are committed, and the row goes. The row is written first, so that as
long as the transaction lives, whoever would give it up is blocked by that row (`storage.indoubt`).

Driven by `storage.dialect`, through guarded connections, sync and async alike: ``run`` finishes what a method of a
connection began. Readers have ended before. It never uses SQLAlchemy's or the driver's two-phase commit, which go
round the guard. Whatever is left by a crash is `storage.indoubt`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import uuid4

import psycopg
from psycopg import errors, pq, sql

from shardkit.core.errors import (
    CommitPending,
    CommitUnknown,
    IncompatibleServer,
    ShardUnreachable,
    TransactionGivenUp,
)

from .failpoints import failpoint
from .scope import Participant, Scope

Run = Callable[[Any], Any]

_NAME = re.compile(r"(?P<gid>shardkit_(?P<decider>\d+)_[0-9a-f]{32})_(?P<participant>\d+)")


class Name(NamedTuple):
    """The name of a prepared transaction, taken apart: whose part it is, and the number of the shard that decides."""

    gid: str
    decider: int
    participant: int


def new_gid(decider: int) -> str:
    """A name for a transaction over several shards."""
    return f"shardkit_{decider}_{uuid4().hex}"


def name_of(gid: str, participant: int) -> str:
    """The name of one participant's part: two shards may be databases of one server, where names are unique."""
    return f"{gid}_{participant}"


def parse(name: str) -> Name | None:
    """What the name of a prepared transaction says; None if it is not one of these."""
    found = _NAME.fullmatch(name)
    return None if found is None else Name(found["gid"], int(found["decider"]), int(found["participant"]))


# A decision that a crash of the server forgets, while others have committed by it, would be none.
_NOTE = sql.SQL(
    "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'; "
    "INSERT INTO shardkit.decision (gid, outcome, participants) VALUES ({}, 'commit', {})"
)
_PREPARE = sql.SQL("PREPARE TRANSACTION {}")
_COMMIT = sql.SQL("COMMIT PREPARED {}")
_ROLLBACK = sql.SQL("ROLLBACK PREPARED {}")
_LOOK = sql.SQL("SELECT FROM shardkit.decision WHERE gid = {} AND outcome = 'commit'")
# A row that comes back after a crash does no harm: it is found and removed by `indoubt.recover`.
_FORGET = sql.SQL(
    "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL synchronous_commit TO off; "
    "DELETE FROM shardkit.decision WHERE gid = {}; COMMIT"
)
_BUSY_PAUSE = b"SELECT pg_sleep(0.01)"
_BUSY_TRIES = 300


class Ending:
    """The end of one transaction; ``commit`` commits the participant that decides, with `CommitUnknown`."""

    def __init__(
        self, scope: Scope, writers: Sequence[Participant], run: Run, commit: Callable[[Any], None]
    ) -> None:
        self._scope = scope
        self._run = run
        self._commit = commit
        self._decider: Any = writers[0]
        self._others: list[Any] = list(writers[1:])
        self._tried: list[Any] = []
        self._gid = new_gid(writers[0].shard_id)

    def run(self) -> None:
        """Commit on all shards, or on none and raise; `CommitPending` if one has not heard of it."""
        try:
            self._note()
            for other in self._others:
                self._prepare(other)
            failpoint("two_phase.deciding")
        except BaseException:
            self._abandon()
            raise
        self._decide()
        try:
            failpoint("two_phase.decided")
        finally:
            self._finish()

    # --- before the decision ---------------------------------------------------------------------------------------

    def _note(self) -> None:
        decider = self._decider
        if decider.pgconn.transaction_status == pq.TransactionStatus.INERROR:
            raise errors.InFailedSqlTransaction(
                f"a statement failed on shard {decider.shard_name} in this transaction; nothing is committed"
            )
        participants = [other.shard_id for other in self._others]
        try:
            self._command(decider, _NOTE.format(sql.Literal(self._gid), sql.Literal(participants)))
        except errors.UniqueViolation as error:
            raise TransactionGivenUp(shard=decider.shard_name) from error
        except errors.UndefinedTable as error:
            raise IncompatibleServer(
                f"Shard {decider.shard_name} has no table for the decisions of transactions over several shards; "
                "nothing was committed.",
                hint="Its schema is of an older shardkit: run `shardkit init`, which brings every shard up to date.",
                shard=decider.shard_name,
            ) from error
        failpoint("two_phase.noted")

    def _prepare(self, other: Any) -> None:
        failpoint("two_phase.preparing")
        self._tried.append(other)
        try:
            tags = self._command(other, _PREPARE.format(self._name(other)))
        except errors.ObjectNotInPrerequisiteState as error:
            raise IncompatibleServer(
                f"Shard {other.shard_name} takes no part in a transaction over several shards: {_said(error)}; "
                "nothing was committed.",
                hint='Set max_prepared_transactions on every shard\'s server to its max_connections for "two_phase".',
                shard=other.shard_name,
            ) from error
        except psycopg.OperationalError as error:
            if not other.closed:
                raise
            raise ShardUnreachable(
                f"Shard {other.shard_name} was lost before the transaction was committed; nothing was committed.",
                hint="Run the unit of work again.",
                shard=other.shard_name,
            ) from error
        if tags != [b"PREPARE TRANSACTION"]:
            # The server turned it into ROLLBACK because a statement had failed, and no error tells.
            raise errors.InFailedSqlTransaction(
                f"a statement failed on shard {other.shard_name} in this transaction; nothing is committed"
            )
        failpoint("two_phase.prepared")

    def _abandon(self) -> None:
        """Roll back what is prepared or may be. What cannot be reached is left to `storage.indoubt`."""
        self._scope.failed = True
        for other in self._tried:
            if not other.closed:
                with suppress(psycopg.Error):  # one that was not prepared is not there
                    self._command(other, _ROLLBACK.format(self._name(other)))
        if not self._decider.closed:
            with suppress(psycopg.Error):
                self._run(self._decider.rollback())

    # --- the decision ----------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        try:
            self._commit(self._decider)
        except CommitUnknown as error:
            self._scope.failed = True
            error.hint = "`shardkit transactions recover` finds out and ends it, and so does the next move."
            raise
        except psycopg.Error:
            self._abandon()
            raise
        except BaseException:
            # Interrupted: the server may have committed before it heard of that.
            decided = self._decided()
            if decided:
                self._finish()
            elif decided is False:
                self._abandon()
            raise

    def _decided(self) -> bool | None:
        """Whether the decision is there; None if nobody can be asked."""
        try:
            if self._decider.pgconn.transaction_status != pq.TransactionStatus.IDLE:
                self._run(self._decider.rollback())
            return self._command(self._decider, _LOOK.format(sql.Literal(self._gid))) == [b"SELECT 1"]
        except psycopg.Error:
            return None

    # --- after it --------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Commit what is prepared. The transaction is committed, so an interruption waits until all have been told."""
        interrupted: BaseException | None = None
        pending: list[str] = []
        cause: BaseException | None = None
        self._scope.committed = [self._decider.shard_name]
        self._decider.ended = True
        for other in self._others:
            other.ended = True
            for _ in range(2):
                try:
                    failpoint("two_phase.finishing")
                    if other.shard_name not in self._scope.committed:
                        self._commit_prepared(other)
                        self._scope.committed.append(other.shard_name)
                    failpoint("two_phase.finished")
                except psycopg.Error as error:
                    cause = error
                except BaseException as error:
                    interrupted = error
                    continue  # once more: it may have been done or not
                break
            if other.shard_name not in self._scope.committed:
                pending.append(other.shard_name)
        if not pending:
            self._forget()
        if interrupted is not None:
            raise interrupted
        if pending:
            raise CommitPending(
                f"The transaction is committed, but not to be seen yet on shard {', '.join(pending)}: {_said(cause)}",
                committed=list(self._scope.committed),
                pending=pending,
            ) from cause

    def _commit_prepared(self, other: Any) -> None:
        for _ in range(_BUSY_TRIES):
            try:
                self._command(other, _COMMIT.format(self._name(other)))
            except errors.UndefinedObject:
                return  # another has ended it, and none can but as it was decided
            except errors.ObjectNotInPrerequisiteState:
                self._run(other.command(_BUSY_PAUSE))  # another is at it
            else:
                return
        raise errors.ObjectNotInPrerequisiteState("another session keeps the prepared transaction busy")

    def _forget(self) -> None:
        try:
            self._command(self._decider, _FORGET.format(sql.Literal(self._gid)))
            failpoint("two_phase.forgotten")
        except psycopg.Error:  # found and removed by the next recovery
            if not self._decider.closed:
                with suppress(psycopg.Error):
                    self._run(self._decider.rollback())

    def _name(self, other: Any) -> sql.Literal:
        return sql.Literal(name_of(self._gid, other.shard_id))

    def _command(self, raw: Any, command: sql.Composed) -> Iterable[bytes]:
        tags: list[bytes] = self._run(raw.command(command.as_bytes(None)))
        return tags


def _said(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
