"""The streams of a job that is under way, when their publisher is at another URL.

A subscription has the address of its publisher written down on its own server. A mover at work writes the present one
whenever it enables a stream again (`Stream.state`); the way back of a kept source goes on with no mover beside it.
"""

from __future__ import annotations

from shardkit.storage import change, replication
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections, transaction

from .opening import name_back, stream_name


def redirect(catalog: Catalog, shards: ShardConnections, shard_id: int) -> None:
    """Have every stream of the unfinished job that comes from this shard look for it where it is now; the caller holds
    the lease. `ShardUnreachable`."""
    job, topology = catalog.running_job(), catalog.current()
    if job is None or topology is None:
        return
    conninfo = replication.peer_conninfo(shards.get(topology.by_id[shard_id]))
    for row in catalog.transfers(job.id):
        name = stream_name(catalog, row.id)
        for publisher, subscriber, stream in (
            (row.source, row.target, name),
            (row.target, row.source, name_back(name)),
        ):
            if publisher == shard_id and subscriber in topology.by_id:
                connection = shards.get(topology.by_id[subscriber])
                with transaction(connection, *change.OPENING):
                    change.claim(connection, catalog.token or 0)
                    replication.set_source(connection, stream, conninfo)
