"""The catalog: topologies, the lease of the mover, jobs with their transfers, the audit trail.

One `Catalog` is one connection. Reading needs nothing; every write belongs to the holder of the lease and fails with
`MoverSuperseded` once another has taken it. The lease is an advisory lock, so that it ends with its process, and a
token that only grows, so that a process which merely seemed dead can do no harm when it wakes: all it writes, here
and on the shards, names the token.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, LiteralString, Self
from uuid import UUID, uuid4

import psycopg
from psycopg.types.json import Jsonb

from shardkit.core.errors import JobRunning, LeaseHeld, MoverSuperseded, NotInitialised, no_shard_yet
from shardkit.core.keyrange import Arc, ArcSet
from shardkit.core.move import FINAL, STILL, Mode, Phase
from shardkit.core.placement import Placement
from shardkit.core.topology import Topology

from .connections import Connection, connect_catalog, transaction, value
from .topologies import read_current

LEASE_LOCK = 0x6C656173_65000001
_LETTING_GO = 1.0
"""Seconds in which the server of a mover that has just ended lets its lease go."""
KEPT_HINT = (
    "`shardkit rebalance finalize` deletes the moved rows from their sources, `shardkit rebalance rollback` brings the "
    "arcs back."
)
KEPT = 16
"""So many topologies are kept whole beside the current one."""
# A row stays for each version: no number comes twice, and a shard that took no part in a change since has a copy to be
# compared with it. What is not read any more is its document, of which a thousand shards would fill gigabytes; but for
# the last that names a shard which has left: by that its number is known as used.
_FORGET = """
UPDATE shardkit.topologies t SET document = '{}'
WHERE t.version >= %(version)s - %(window)s AND t.version < %(version)s - %(kept)s AND t.document <> '{}'
  AND (t.state = 'impossible' OR t.state = 'past' AND NOT EXISTS (
      SELECT FROM jsonb_array_elements(t.document -> 'shards') shard WHERE (shard ->> 'id')::int <> ALL (%(ids)s)
  ))
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One change of placement: its kind, goal, state (running, done, aborted, rolled back), and what it was told."""

    id: int
    kind: str
    state: str
    goal: Placement
    attempts: int
    last_error: str | None
    options: dict[str, Any] = field(default_factory=dict)
    paused: bool = False

    @property
    def keeps_source(self) -> bool:
        """Whether the sources keep the moved rows until the operator has said what becomes of them."""
        return bool(self.options.get("keep_source"))


@dataclass(frozen=True, slots=True)
class TransferRow:
    """A transfer as it is stored: ``record`` holds what its actions made or measured."""

    id: int
    job_id: int
    source: int
    target: int
    arcs: ArcSet
    phase: Phase
    record: dict[str, Any]
    attempts: int
    last_error: str | None
    waiting_for: str | None
    progress: dict[str, Any] | None = None
    """What the mover reported last."""


_TRANSFERS = """
SELECT id, job_id, source, target, arcs, phase, record, attempts, last_error, waiting_for, progress
FROM shardkit.transfers WHERE {} = %s ORDER BY id
"""
_JOBS = "SELECT id, kind, state, goal, attempts, last_error, options, paused FROM shardkit.jobs"
_RUNNING_JOB = f"{_JOBS} WHERE state = 'running'"
_JOB = f"{_JOBS} WHERE id = %s"
_LATEST_JOB = f"{_JOBS} ORDER BY id DESC LIMIT 1"


def _transfer(row: tuple[Any, ...]) -> TransferRow:
    arcs = ArcSet(Arc(first, last) for first, last in row[4])
    return TransferRow(row[0], row[1], row[2], row[3], arcs, Phase(row[5]), *row[6:])


def whoami() -> str:
    """The actor of the audit trail: user, host and process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()} pid {os.getpid()}"


class Catalog:
    """The catalog through one connection; a context manager that closes it."""

    def __init__(self, connection: Connection, url: str) -> None:
        self.connection = connection
        self.url = url
        self.token: int | None = None

    @classmethod
    def open(cls, url: str, *, application: str = "shardkit") -> Self:
        """Connect; `CatalogUnreachable`, or `NotInitialised` where there is no catalog."""
        connection = connect_catalog(url, application=application)
        catalog = cls(connection, url)
        if not catalog.is_initialised():
            connection.close()
            raise NotInitialised
        return catalog

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.token is not None and not self.connection.closed:
            # A server notices a closed connection after a while; whoever comes next need not wait for it.
            with suppress(psycopg.Error):
                self.connection.execute("SELECT pg_advisory_unlock_all()")
        self.connection.close()

    def is_initialised(self) -> bool:
        """Whether this database holds a catalog."""
        if value(self.connection, "SELECT to_regclass('shardkit.cluster')") is None:
            return False
        return value(self.connection, "SELECT 1 FROM shardkit.cluster") is not None

    def initialise(self) -> bool:
        """Give a new catalog its identity; False if it has one. Of several at once, one gives it."""
        given = self.connection.execute(
            "INSERT INTO shardkit.cluster (id) VALUES (%s) ON CONFLICT DO NOTHING", (uuid4(),)
        )
        return given.rowcount == 1

    def cluster_id(self) -> UUID:
        """The identity that every shard of this catalog carries."""
        found = value(self.connection, "SELECT id FROM shardkit.cluster")
        assert isinstance(found, UUID)
        return found

    # --- the lease -------------------------------------------------------------------------------------------------

    def take_lease(self) -> int:
        """Become the mover: a new token, and `LeaseHeld` naming the process that is at work."""
        deadline = time.monotonic() + _LETTING_GO
        while not value(self.connection, "SELECT pg_try_advisory_lock(%s)", (LEASE_LOCK,)):
            if time.monotonic() > deadline:
                holder = value(self.connection, "SELECT holder FROM shardkit.lease")
                raise LeaseHeld(f"Another mover is at work: {holder}.", holder=holder)
            time.sleep(0.02)
        self.token = value(
            self.connection,
            "UPDATE shardkit.lease SET token = token + 1, holder = %s, taken_at = now() RETURNING token",
            (whoami(),),
        )
        assert self.token is not None
        return self.token

    def lease_holder(self) -> str | None:
        """Who is at work now, as `whoami` named it; None if nobody is."""
        found = value(
            self.connection,
            """
            SELECT holder FROM shardkit.lease
            WHERE EXISTS (
                SELECT FROM pg_locks
                WHERE locktype = 'advisory' AND granted AND objsubid = 1
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND classid::bigint << 32 | objid::bigint = %s
            )
            """,
            (LEASE_LOCK,),
        )
        return None if found is None else str(found)

    def use_lease(self, token: int) -> Self:
        """Write under a lease that another connection of this process holds."""
        self.token = token
        return self

    @contextmanager
    def writing(self, step: str) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        """A transaction that belongs to the lease; `MoverSuperseded` if it was taken by another. ``step`` names its
        failpoints."""
        with transaction(self.connection, step=step), self.connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM shardkit.lease WHERE token = %s FOR SHARE", (self.token,))
            if cursor.fetchone() is None:
                raise MoverSuperseded
            yield cursor

    def event(self, cursor: psycopg.Cursor[Any], event: str, *, job: int | None = None, transfer: int | None = None,
              **detail: Any) -> None:  # fmt: skip
        """Add to the audit trail, in the transaction of what it tells."""
        cursor.execute(
            "INSERT INTO shardkit.events (actor, job_id, transfer_id, event, detail) VALUES (%s, %s, %s, %s, %s)",
            (whoami(), job, transfer, event, Jsonb(detail)),
        )

    # --- topologies ------------------------------------------------------------------------------------------------

    def current(self) -> Topology | None:
        """The topology in force; None before the first shard."""
        return read_current(self.connection)

    def require_current(self) -> Topology:
        """The topology in force; `NotInitialised` before the first shard."""
        current = self.current()
        if current is None:
            raise no_shard_yet()
        return current

    def proposed(self) -> Topology | None:
        """The one change that is pending, if there is one."""
        row = self.connection.execute(
            "SELECT document FROM shardkit.topologies WHERE state = 'proposed'"
        ).fetchone()
        return Topology.from_json(row[0]) if row else None

    def next_version(self) -> int:
        """A version that was never used, not by an abandoned proposal either."""
        return int(value(self.connection, "SELECT coalesce(max(version), 0) + 1 FROM shardkit.topologies"))

    def next_shard_id(self) -> int:
        """A number that no shard ever had, those that left among them: names of prepared transactions and routers that
        slept may name them still. One that was proposed in vain was never known to anybody."""
        return int(
            value(
                self.connection,
                "SELECT coalesce(max((shard ->> 'id')::int), -1) + 1 "
                "FROM shardkit.topologies, jsonb_array_elements(document -> 'shards') shard "
                "WHERE state <> 'impossible'",
            )
        )

    def shards_ever(self) -> dict[int, str]:
        """The names of all shards that there are or were, by number."""
        return dict(
            self.connection.execute(
                "SELECT DISTINCT (shard ->> 'id')::int, shard ->> 'name' "
                "FROM shardkit.topologies, jsonb_array_elements(document -> 'shards') shard "
                "WHERE state IN ('current', 'past')"
            ).fetchall()
        )

    def propose(self, topology: Topology) -> None:
        """Store a change before any shard sees it; fails if another is pending."""
        with self.writing("catalog.propose") as cursor:
            cursor.execute(
                "INSERT INTO shardkit.topologies (version, state, digest, document) VALUES (%s, 'proposed', %s, %s)",
                (topology.version, topology.digest, Jsonb(topology.to_json())),
            )

    def record(self, topology: Topology) -> None:
        """The proposed topology is in force on every shard it changes."""
        with self.writing("catalog.record") as cursor:
            cursor.execute("UPDATE shardkit.topologies SET state = 'past' WHERE state = 'current'")
            cursor.execute(
                "UPDATE shardkit.topologies SET state = 'current', recorded_at = now() "
                "WHERE version = %s AND state = 'proposed'",
                (topology.version,),
            )
            if cursor.rowcount != 1:
                raise MoverSuperseded
            ids = [shard.id for shard in topology.shards]
            bounds = {"version": topology.version, "kept": KEPT, "window": 4 * KEPT}
            cursor.execute(_FORGET, {**bounds, "ids": ids})
            self.event(cursor, "topology", version=topology.version, digest=topology.digest)

    def discard(self, topology: Topology) -> None:
        """The proposed topology cannot come into force any more; its number stays used."""
        with self.writing("catalog.discard") as cursor:
            cursor.execute(
                "UPDATE shardkit.topologies SET state = 'impossible' WHERE version = %s AND state = 'proposed'",
                (topology.version,),
            )

    # --- jobs and transfers ----------------------------------------------------------------------------------------

    def require_no_job(self) -> None:
        """`JobRunning`, with what ends it, if a job is unfinished."""
        job = self.running_job()
        if job is None:
            return
        if self.is_kept(job):
            raise JobRunning(
                f"The sources of job {job.id} still keep the moved rows, and topology changes are made one at a time.",
                hint=KEPT_HINT,
            )
        raise JobRunning

    def is_kept(self, job: Job) -> bool:
        """Whether nothing of a job is left to do before the operator finalises it or rolls it back."""
        phases = {row.phase for row in self.transfers(job.id)}
        return job.state == "running" and phases <= STILL and not phases <= FINAL

    def create_job(self, kind: str, goal: Placement, mode: Mode = Mode.AUTO, **options: Any) -> int:
        """Store a job and its transfers, all planned, to be carried by ``mode``; `JobRunning` if one is unfinished.
        ``options`` that are None are left out."""
        self.require_no_job()
        told = {name: option for name, option in options.items() if option is not None}
        with self.writing("catalog.create_job") as cursor:
            cursor.execute(
                "INSERT INTO shardkit.jobs (kind, state, goal, options) VALUES (%s, 'running', %s, %s) RETURNING id",
                (kind, Jsonb(goal.to_json()), Jsonb(told)),
            )
            (job_id,) = cursor.fetchone() or (0,)
            cursor.executemany(
                "INSERT INTO shardkit.transfers (job_id, source, target, arcs, phase, record) "
                "VALUES (%s, %s, %s, %s, %s, %s)",
                [
                    (
                        job_id,
                        transfer.source,
                        transfer.target,
                        Jsonb([list(arc) for arc in transfer.arcs]),
                        "planned",
                        Jsonb({"mode": mode}),
                    )
                    for transfer in goal.transfers
                ],
            )
            self.event(cursor, "job", job=job_id, kind=kind, transfers=len(goal.transfers), **told)
        return int(job_id)

    def _job(self, query: LiteralString, *parameters: Any) -> Job | None:
        row = self.connection.execute(query, parameters).fetchone()
        if row is None:
            return None
        number, kind, state, goal, *rest = row
        return Job(number, kind, state, Placement.from_json(goal), *rest)

    def job(self, job_id: int) -> Job:
        """One job."""
        found = self._job(_JOB, job_id)
        assert found is not None
        return found

    def running_job(self) -> Job | None:
        """The unfinished job, if there is one."""
        return self._job(_RUNNING_JOB)

    def latest_job(self) -> Job | None:
        """The job made last, finished or not."""
        return self._job(_LATEST_JOB)

    def finish_job(self, job_id: int, state: str) -> None:
        """End a job as ``done``, ``aborted`` or ``rolled back``; its goal keeps no tokens."""
        with self.writing("catalog.finish_job") as cursor:
            cursor.execute(
                "UPDATE shardkit.jobs SET state = %s, finished_at = now(), last_error = NULL, "
                """goal = goal || '{"tokens": [], "owners": []}' WHERE id = %s""",
                (state, job_id),
            )
            self.event(cursor, f"job {state}", job=job_id)

    def pause(self, job_id: int) -> None:
        """Ask whoever works on a job to stop. A wish, so it needs no lease; the mover reads it."""
        with self.connection.transaction(), self.connection.cursor() as cursor:
            cursor.execute("UPDATE shardkit.jobs SET paused = true WHERE id = %s AND NOT paused", (job_id,))
            if cursor.rowcount:
                self.event(cursor, "job paused", job=job_id)

    def is_paused(self, job_id: int) -> bool:
        """Whether somebody asked for it since the job was last begun."""
        return bool(value(self.connection, "SELECT paused FROM shardkit.jobs WHERE id = %s", (job_id,)))

    def begin_job(self, job_id: int, **options: Any) -> None:
        """A mover begins, or goes on: the job is not paused. ``options`` that are not None hold from now on."""
        told = {name: option for name, option in options.items() if option is not None}
        with self.writing("catalog.begin_job") as cursor:
            cursor.execute(
                "UPDATE shardkit.jobs SET paused = false, options = options || %s WHERE id = %s",
                (Jsonb(told), job_id),
            )

    def transfers(self, job_id: int) -> list[TransferRow]:
        """The transfers of a job, in the order they were planned."""
        rows = self.connection.execute(_TRANSFERS.format("job_id"), (job_id,))
        return [_transfer(row) for row in rows]

    def transfer(self, transfer_id: int) -> TransferRow:
        """One transfer, which is there."""
        found = self.find_transfer(transfer_id)
        assert found is not None
        return found

    def find_transfer(self, transfer_id: int) -> TransferRow | None:
        """One transfer; None if there is none of this number."""
        row = self.connection.execute(_TRANSFERS.format("id"), (transfer_id,)).fetchone()
        return _transfer(row) if row is not None else None

    def enter(self, transfer: TransferRow, phase: Phase, sentence: str) -> None:
        """Persist the next phase of a transfer."""
        self.enter_all([transfer], phase, sentence)

    def enter_all(self, transfers: Iterable[TransferRow], phase: Phase, sentence: str) -> None:
        """Persist the next phase of several transfers, of all or of none."""
        with self.writing("catalog.enter") as cursor:
            for transfer in transfers:
                self._enter(cursor, transfer, phase, sentence)

    def _enter(self, cursor: psycopg.Cursor[Any], transfer: TransferRow, phase: Phase, sentence: str) -> None:
        cursor.execute(
            "UPDATE shardkit.transfers SET phase = %s, last_error = NULL, waiting_for = NULL, updated_at = now() "
            "WHERE id = %s AND phase = %s",
            (phase.value, transfer.id, transfer.phase.value),
        )
        if cursor.rowcount != 1:
            raise MoverSuperseded
        self.event(
            cursor,
            "phase",
            job=transfer.job_id,
            transfer=transfer.id,
            phase=phase.value,
            sentence=sentence,
        )

    def note(self, transfer_id: int, **facts: Any) -> None:
        """Add facts to a transfer's record."""
        with self.writing("catalog.note") as cursor:
            cursor.execute(
                "UPDATE shardkit.transfers SET record = record || %s, updated_at = now() WHERE id = %s",
                (Jsonb(facts), transfer_id),
            )

    def forget(self, transfer_id: int, fact: str) -> None:
        """Take a fact out of a transfer's record."""
        with self.writing("catalog.forget") as cursor:
            cursor.execute(
                "UPDATE shardkit.transfers SET record = record - %s::text WHERE id = %s", (fact, transfer_id)
            )

    def waiting(self, transfer_id: int, reason: str | None) -> None:
        """Say what a transfer waits for; None when it goes on."""
        with self.writing("catalog.waiting") as cursor:
            cursor.execute(
                "UPDATE shardkit.transfers SET waiting_for = %s, updated_at = now() WHERE id = %s",
                (reason, transfer_id),
            )

    def report(self, transfer_id: int, progress: Mapping[str, Any]) -> None:
        """Let others see how far a transfer is."""
        with self.writing("catalog.report") as cursor:
            cursor.execute(
                "UPDATE shardkit.transfers SET progress = %s WHERE id = %s", (Jsonb(progress), transfer_id)
            )

    def failed(self, transfer: TransferRow, error: str) -> None:
        """Store a failure beside the phase, which stays."""
        with self.writing("catalog.failed") as cursor:
            cursor.execute(
                "UPDATE shardkit.transfers SET attempts = attempts + 1, last_error = %s, updated_at = now() "
                "WHERE id = %s",
                (error, transfer.id),
            )
            cursor.execute(
                "UPDATE shardkit.jobs SET attempts = attempts + 1, last_error = %s WHERE id = %s",
                (error, transfer.job_id),
            )
            self.event(cursor, "failed", job=transfer.job_id, transfer=transfer.id, error=error)
