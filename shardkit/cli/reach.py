"""Administrative connections as the commands need them: many at once, and with one that is lent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

from shardkit.core.errors import ShardUnreachable
from shardkit.core.topology import Shard
from shardkit.storage.connections import Connection, ShardConnections, connect_shard

AT_ONCE = 16


class Lent(ShardConnections):
    """Shard connections of which some belong to the caller, who closes them."""

    def __init__(self, application: str) -> None:
        super().__init__(application)
        self._lent: dict[int, Connection] = {}

    def __enter__(self) -> Self:
        return self

    def lend(self, shard_id: int, connection: Connection) -> None:
        """From now on this is the connection to that shard."""
        self._lent[shard_id] = connection

    def get(self, shard: Shard) -> Connection:
        """The connection to a shard; `ShardUnreachable`."""
        return self._lent.get(shard.id) or super().get(shard)


@contextmanager
def reach(shards: Iterable[Shard], application: str) -> Iterator[Mapping[int, Connection | ShardUnreachable]]:
    """A connection to each shard, or why there is none, by shard id; asked for side by side."""

    def attempt(shard: Shard) -> Connection | ShardUnreachable:
        try:
            return connect_shard(shard.url, shard.name, application=application)
        except ShardUnreachable as error:
            return error

    listed = list(shards)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip((shard.id for shard in listed), pool.map(attempt, listed), strict=True))
    try:
        yield found
    finally:
        for connection in found.values():
            if not isinstance(connection, ShardUnreachable):
                connection.close()
