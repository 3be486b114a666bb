"""Snapshots: how a transaction proves its topology where it must not lock, on a replica.

A lock on a standby would hold its replay up, and be cancelled for it. So the transaction is read-only and keeps one
snapshot, and the names of the fences are read in that very snapshot: they are rows of pg_class, and a standby shows the
commits of its primary in their order, so whoever sees the name of a topology sees the rows that were there when it came
into force. It is the newest name that counts: ``shardkit.owned`` on the replica goes by that one. What is read is as
old as the snapshot. Pure: `storage.guard` sends the message and asks what was seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardkit.core.topology import Fence

from .urls import redacted

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

BEGIN = rb"""BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SELECT pg_catalog.pg_is_in_recovery(), c.relname
FROM (VALUES (1)) AS one (row) LEFT JOIN (
    pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'shardkit'
) ON c.relname ~ '^fence_\d+_[0-9a-f]{8}$'"""

_NAME = re.compile(r"fence_(\d+)_([0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class Source:
    """Where reads that may be old come from: a replica of a shard, or in place of one the shard itself."""

    url: str
    is_replica: bool

    def __str__(self) -> str:
        return f"{'replica' if self.is_replica else 'primary'} {redacted(self.url)}"


class NoStandby(Exception):  # a signal between guard and session, never seen by an application
    """The server of a replica is in recovery no more: it was promoted, and nothing arrives there."""


def seen(result: PGresult) -> tuple[bool, tuple[Fence, ...]]:
    """Whether the server is a standby, and the fences that the snapshot shows."""
    is_standby = result.get_value(0, 0) == b"t"
    names = (result.get_value(row, 1) for row in range(result.ntuples))
    matches = (_NAME.fullmatch(name.decode()) for name in names if name is not None)
    return is_standby, tuple(Fence(int(match[1]), match[2]) for match in matches if match is not None)
