"""What a server has to spare for logical replication: slots and walsenders to send, workers and origins to receive.

All databases of a server share them, and whoever finds none is stopped in the middle: a copy that gets no slot is an
error, which disables its subscription. So they are counted before (`rebalance.preflight`), and shared out among
transfers that run side by side (`rebalance.room`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from .connections import Connection, value


class Resource(StrEnum):
    """What is limited; the value is its name for people."""

    SLOTS = "replication slots"
    SENDERS = "walsenders"
    WORKERS = "logical replication workers"
    ORIGINS = "replication origins"

    @property
    def setting(self) -> str:
        """The setting that limits it."""
        return _SETTINGS[self]


_SETTINGS = {
    Resource.SLOTS: "max_replication_slots",
    Resource.SENDERS: "max_wal_senders",
    Resource.WORKERS: "max_logical_replication_workers",
    Resource.ORIGINS: "max_active_replication_origins, or max_replication_slots before PostgreSQL 18",
}


@dataclass(frozen=True, slots=True)
class Use:
    """How much of a resource is in use: ``copies`` by the copies of single tables, and the rest by ``names``, which are
    those of subscriptions and of whatever else there is."""

    limit: int
    names: tuple[str, ...]
    copies: int

    @property
    def free(self) -> int:
        """How much is left."""
        return self.limit - len(self.names) - self.copies


@dataclass(frozen=True, slots=True)
class Need:
    """What one transfer may take beside what its subscription does: for the copies of tables, some at a time."""

    extra: Mapping[Resource, int]

    @classmethod
    def of(cls, target: Connection, tables: int) -> Self:
        """Of a transfer of so many tables to this target."""
        at_once = max(1, min(tables, int(value(target, "SHOW max_sync_workers_per_subscription"))))
        return cls(
            {
                Resource.SLOTS: at_once,
                Resource.SENDERS: at_once,
                # One copies alone where there are no more.
                Resource.WORKERS: 1,
                # The target forgets that of a table some time after the copy.
                Resource.ORIGINS: tables,
            }
        )

    def whole(self, resource: Resource) -> int:
        """With what the subscription itself takes."""
        return 1 + self.extra[resource]


SENDING = (Resource.SLOTS, Resource.SENDERS)
RECEIVING = (Resource.WORKERS, Resource.ORIGINS)

_COPY = re.compile(r"pg_\d+_sync_\d+_\d+")
"""What the workers that copy tables call their slots and connections."""

_SENDING = """
SELECT current_setting('max_replication_slots')::int, ARRAY(SELECT slot_name::text FROM pg_replication_slots),
       current_setting('max_wal_senders')::int,
       ARRAY(SELECT coalesce(application_name, '') FROM pg_stat_replication)
"""
# An origin that is tracked belongs to a subscription, to the copy of one of its tables, or to something else.
_RECEIVING = r"""
SELECT least(current_setting('max_logical_replication_workers')::int, current_setting('max_worker_processes')::int - 1),
       ARRAY(SELECT DISTINCT subname::text FROM pg_stat_subscription WHERE pid IS NOT NULL AND relid IS NULL),
       coalesce(current_setting('max_active_replication_origins', true),
                current_setting('max_replication_slots'))::int,
       ARRAY(SELECT coalesce(s.subname, o.external_id)::text FROM pg_replication_origin_status o
             LEFT JOIN pg_subscription s ON o.external_id = 'pg_' || s.oid
             WHERE o.external_id !~ '^pg_\d+_\d+$'),
       (SELECT count(*) FROM pg_replication_origin_status WHERE external_id ~ '^pg_\d+_\d+$')
"""


def sending(connection: Connection) -> dict[Resource, Use]:
    """What is in use of what a server sends by."""
    slots, slot_names, senders, sender_names = connection.execute(_SENDING).fetchone() or (0, [], 0, [])
    return {
        Resource.SLOTS: _use(slots, slot_names),
        Resource.SENDERS: _use(senders, sender_names),
    }


def _use(limit: int, names: list[str]) -> Use:
    others = tuple(name for name in names if not _COPY.fullmatch(name))
    return Use(limit, others, len(names) - len(others))


def receiving(connection: Connection) -> dict[Resource, Use]:
    """What is in use of what a server receives by."""
    row = connection.execute(_RECEIVING).fetchone() or (0, [], 0, [], 0)
    workers, worker_names, origins, origin_names, copied = row
    return {
        # One a subscription: those that copy, or help to apply, come and go, and who finds none free does without.
        Resource.WORKERS: Use(workers, tuple(worker_names), 0),
        Resource.ORIGINS: Use(origins, tuple(origin_names), copied),
    }


def short_of(use: Mapping[Resource, Use], need: Need) -> list[str]:
    """What there is too little of for one transfer, in words."""
    return [
        f"{max(0, each.free)} {resource} are free and {need.whole(resource)} are needed ({resource.setting})"
        for resource, each in use.items()
        if each.free < need.whole(resource)
    ]
