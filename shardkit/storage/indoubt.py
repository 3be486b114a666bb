"""Transactions in doubt: what crashes left of transactions that wrote several shards, and their end.

A part that is prepared names the shard that decides (`storage.twophase`). Whether that shard's ``shardkit.decision``
has the transaction's row says how it ended. Where there is none, this module writes that it was given up, and
only then rolls it back: a transaction that lives has its own row uncommitted there, so the attempt waits for it and
leaves it alone. A row goes when no part of its transaction is prepared any more on any shard.

Driven by the mover and the commands, over administrative connections, of a role that may end what others prepared.
Can be interrupted anywhere and run by several at once.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import psycopg
from psycopg import errors, sql

from shardkit.core.errors import ShardUnreachable
from shardkit.core.topology import Shard, Topology

from .connections import Connection, ShardConnections, transaction, value
from .topologies import read_copy
from .twophase import Name, parse

LIVE_SECONDS = 1.0
"""A part that is prepared for less is nobody's business yet: it most likely lives."""

_BLOCKED = (("lock_timeout", "250ms"), ("synchronous_commit", "on"))
_BUSY_SECONDS = 3.0


class State(StrEnum):
    """What is known of a transaction."""

    COMMITTED = "committed"
    GIVEN_UP = "rolled back"
    LIVE = "live"
    UNDECIDED = "undecided"
    """Live, or left by a crash; only `recover` can tell."""
    UNKNOWN = "unknown"
    """The shard that decides, or a part, could not be asked or ended."""


class Part(NamedTuple):
    """A prepared part of a transaction, on one shard."""

    name: str
    parsed: Name
    shard: Shard
    owner: str
    age_seconds: float


@dataclass
class Doubt:
    """A transaction over several shards with prepared parts, or with a row of its decision."""

    gid: str
    decider: int
    parts: list[Part]
    state: State = State.UNDECIDED
    reason: str = ""

    @property
    def age_seconds(self) -> float:
        """Of the oldest part that is prepared."""
        return max((part.age_seconds for part in self.parts), default=0.0)

    @property
    def ended(self) -> bool:
        """Whether all that is known of it has come to its end."""
        return self.state in (State.COMMITTED, State.GIVEN_UP)


_PREPARED = """
SELECT gid, owner, extract(epoch FROM clock_timestamp() - prepared)::float8
FROM pg_prepared_xacts WHERE database = current_database() ORDER BY prepared
"""


def find(topology: Topology, shards: ShardConnections, only: Collection[int] | None = None) -> list[Doubt]:
    """The transactions with a prepared part on a shard that answers, or on ``only`` some; undecided so far."""
    found: dict[str, Doubt] = {}
    for shard in topology.shards:
        if only is not None and shard.id not in only:
            continue
        with suppress(ShardUnreachable, psycopg.OperationalError):
            for part in parts(shards.get(shard), shard):
                gid, decider, _ = part.parsed
                found.setdefault(gid, Doubt(gid, decider, [])).parts.append(part)
    return list(found.values())


def look(topology: Topology, shards: ShardConnections) -> list[Doubt]:
    """`find`, with what the deciding shards have written; changes nothing."""
    doubts = find(topology, shards)
    for doubt in doubts:
        with _told(doubt):
            if _decider_left(topology, shards, doubt):
                doubt.state = State.GIVEN_UP
            elif (connection := _decider(topology, shards, doubt)) is not None:
                doubt.state = _state(_outcome(connection, doubt.gid))
    return doubts


def recover(topology: Topology, shards: ShardConnections, only: Collection[int] | None = None) -> list[Doubt]:
    """End every transaction that a crash left, on ``only`` some shards if so told; what became of each.

    Never touches one that lives. What cannot be asked is left, with the reason. Raises nothing but bugs.
    """
    doubts = find(topology, shards, only)
    for doubt in doubts:
        with _told(doubt):
            if _decider_left(topology, shards, doubt):
                doubt.state = State.GIVEN_UP
            elif (connection := _decider(topology, shards, doubt)) is not None:
                doubt.state = _decide(connection, doubt)
            if doubt.ended:
                for part in doubt.parts:
                    _end(shards.get(part.shard), part, commit=doubt.state is State.COMMITTED)
    if only is None:
        _forget(topology, shards)
    return doubts


def is_prepared_part(name: str | None) -> bool:
    """Whether a prepared transaction of this name is one that `recover` can end."""
    return name is not None and parse(name) is not None


def parts(connection: Connection, shard: Shard) -> Iterator[Part]:
    """The prepared parts of transactions over several shards on one of them, oldest first."""
    for name, owner, age in connection.execute(_PREPARED):
        parsed = parse(name)
        if parsed is not None:
            yield Part(name, parsed, shard, owner, age)


# --- one transaction -----------------------------------------------------------------------------------------------


class _told:
    """What goes wrong with a transaction in the block is noted on it."""

    def __init__(self, doubt: Doubt) -> None:
        self._doubt = doubt

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, ShardUnreachable | psycopg.Error):
            return False
        self._doubt.state = State.UNKNOWN
        self._doubt.reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return True


def _decider_left(topology: Topology, shards: ShardConnections, doubt: Doubt) -> bool:
    """Whether the shard that decides has left. It did so without a decision that was not followed everywhere, and
    nobody decides there any more (`storage.leaving`); so what is prepared still was never decided.

    A catalog that was restored from before that shard came does not know it either. Then the shards know better: every
    coming and leaving is in their copies."""
    if doubt.decider in topology.by_id:
        return False
    copies = [read_copy(shards.get(part.shard)) for part in doubt.parts]
    return all(
        copy is not None and copy.version <= topology.version and doubt.decider not in copy.by_id
        for copy in copies
    )


def _decider(topology: Topology, shards: ShardConnections, doubt: Doubt) -> Connection | None:
    shard = topology.by_id.get(doubt.decider)
    if shard is None:
        doubt.state = State.UNKNOWN
        doubt.reason = f"the shard that decides, number {doubt.decider}, is no shard of the cluster"
        return None
    return shards.get(shard)


def _outcome(connection: Connection, gid: str) -> str | None:
    found = value(connection, "SELECT outcome FROM shardkit.decision WHERE gid = %s", (gid,))
    return None if found is None else str(found)


def _state(outcome: str | None) -> State:
    return {None: State.UNDECIDED, "commit": State.COMMITTED}.get(outcome, State.GIVEN_UP)


def _decide(connection: Connection, doubt: Doubt) -> State:
    """What was decided; given up now if nothing was and nobody is about to."""
    participants = [part.parsed.participant for part in doubt.parts]
    try:
        with transaction(connection, *_BLOCKED):
            connection.execute(
                "INSERT INTO shardkit.decision (gid, outcome, participants) VALUES (%s, 'abort', %s) "
                "ON CONFLICT DO NOTHING",
                (doubt.gid, participants),
            )
            return _state(_outcome(connection, doubt.gid))
    except errors.LockNotAvailable:
        return State.LIVE


def _end(connection: Connection, part: Part, *, commit: bool) -> None:
    command = sql.SQL("COMMIT PREPARED {}" if commit else "ROLLBACK PREPARED {}")
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            # By the name that the server has stored.
            connection.execute(command.format(sql.Literal(part.name)))
        except errors.UndefinedObject:
            return  # its owner, or another who recovers, was faster, and can only have done the same
        except errors.ObjectNotInPrerequisiteState:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)  # another is at it
        else:
            return


# --- rows that are of no use any more --------------------------------------------------------------------------------


def _forget(topology: Topology, shards: ShardConnections) -> None:
    """Delete the rows whose transactions have no prepared part left. They are read first: whatever is prepared when a
    row of a commit is there was prepared before it."""
    rows: dict[int, list[tuple[str, list[int]]]] = {}
    for shard in topology.shards:
        with suppress(ShardUnreachable, psycopg.Error):
            rows[shard.id] = [
                (gid, participants)
                for gid, participants in shards.get(shard).execute(
                    "SELECT gid, participants FROM shardkit.decision"
                )
            ]
    if not any(rows.values()):
        return
    prepared: dict[int, set[str]] = {}
    for shard in topology.shards:
        with suppress(ShardUnreachable, psycopg.Error):
            prepared[shard.id] = {part.parsed.gid for part in parts(shards.get(shard), shard)}
    left = set[str]().union(*prepared.values())
    for shard_id, listed in rows.items():
        # A shard that has left the cluster had to be closed before, and nothing is prepared on a closed shard.
        useless = [
            gid
            for gid, participants in listed
            if gid not in left and all(one in prepared or one not in topology.by_id for one in participants)
        ]
        if useless:
            with suppress(ShardUnreachable, psycopg.Error):
                shards.get(topology.by_id[shard_id]).execute(
                    "DELETE FROM shardkit.decision WHERE gid = ANY(%s)", (useless,)
                )
