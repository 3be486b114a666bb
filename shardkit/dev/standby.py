"""Physical standbys of the development servers, for tests and trials of reads from replicas."""

from __future__ import annotations

import time
from collections.abc import Mapping

import psycopg

from shardkit.core.errors import ServerFailed

from .cluster import Cluster
from .settings import Setting

_POLL_SECONDS = 0.005


class Standby(Cluster):
    """A streaming standby of a running `Cluster` of this process, with the same databases under a URL of its own.

    Made by `pg_basebackup`; `settings` go over those of the primary. It ends as every cluster does, and holds neither
    the primary up nor its WAL back. Raises what `Cluster` raises.
    """

    def __init__(self, primary: Cluster, *, settings: Mapping[str, Setting] | None = None) -> None:
        self.primary = primary
        upstream: dict[str, Setting] = {"primary_conninfo": primary.conninfo(), "hot_standby": True}
        super().__init__(
            settings={**primary.settings, **upstream, **(settings or {})}, binaries=primary.binaries.folder
        )

    def _make_data_folder(self) -> None:
        self._workspace.make_standby_folder(self.binaries, self.data_dir, self.primary.conninfo())

    def pause(self) -> None:
        """Stop the replay, and return when it has stopped: what arrives is not shown from now on."""
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:
            connection.execute("SELECT pg_wal_replay_pause()")
            while connection.execute("SELECT pg_get_wal_replay_pause_state()").fetchone() != ("paused",):
                time.sleep(_POLL_SECONDS)

    def resume(self) -> None:
        """Go on with the replay."""
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:
            connection.execute("SELECT pg_wal_replay_resume()")

    def catch_up(self, timeout: float = 30.0) -> None:
        """Return when everything is replayed that the primary had committed; `ServerFailed` after `timeout` seconds."""
        with psycopg.connect(self.primary.conninfo(), autocommit=True) as connection:
            row = connection.execute("SELECT pg_current_wal_flush_lsn()::text").fetchone()
        deadline = time.monotonic() + timeout
        with psycopg.connect(self.conninfo(), autocommit=True) as connection:
            while True:
                done = connection.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", row).fetchone()
                if done == (True,):
                    return
                if time.monotonic() > deadline:
                    raise ServerFailed(f"{self!r} does not catch up:\n{self.log_tail()}")
                time.sleep(_POLL_SECONDS)
