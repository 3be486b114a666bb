"""Backups of the databases of shards, restored in their place: an older state of a shard, as it is found in earnest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from shardkit.dev import Clusters
from shardkit.storage.connections import connect
from tests.fix_shards import Shards


class Backup:
    """A copy of the database of a shard, to be restored in its place."""

    def __init__(self, servers: Clusters, shards: Shards, name: str) -> None:
        connection = shards.on(name)
        self._shards, self._name = shards, name
        self._database = connection.info.dbname
        self._server = next(s for s in servers if str(s.socket_dir) == connection.info.host)
        connection.close()
        self._end_sessions()
        self._copy = f"{self._database}_backup"
        self._server.create_database(self._copy, self._database)

    def _end_sessions(self) -> None:
        with connect(self._server.url()) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s",
                (self._database,),
            )

    def restore(self) -> None:
        """Put the copy in the place of the database, whoever is connected there."""
        self._server.drop_database(self._database)
        self._server.create_database(self._database, self._copy)

    def drop(self) -> None:
        self._server.drop_database(self._copy)


BackUp = Callable[[Shards, str], Backup]


@pytest.fixture
def back_up(servers: Clusters) -> Iterator[BackUp]:
    """`back_up(shards, "s2")`: a copy of the shard as it is."""
    made: list[Backup] = []

    def make(shards: Shards, name: str) -> Backup:
        made.append(Backup(servers, shards, name))
        return made[-1]

    yield make
    for backup in made:
        backup.drop()
