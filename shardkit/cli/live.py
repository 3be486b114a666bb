"""How far an unfinished transfer is, asked of its servers: the mover at work may be any process on any machine."""

from __future__ import annotations

from typing import Any

import psycopg

from shardkit.core.errors import ShardUnreachable
from shardkit.core.move import Phase
from shardkit.core.topology import Topology
from shardkit.rebalance.opening import name_back, stream_name
from shardkit.storage import replication
from shardkit.storage.catalog import Catalog, TransferRow
from shardkit.storage.connections import ShardConnections

_FORTH = (Phase.COPYING, Phase.CATCHING_UP, Phase.VERIFYING, Phase.CUTTING_OVER)
_BACK = (Phase.KEPT, Phase.ROLLING_BACK, Phase.VERIFYING_BACK, Phase.CUTTING_BACK, Phase.STAYING)


def progress(
    catalog: Catalog, topology: Topology, row: TransferRow, shards: ShardConnections
) -> dict[str, Any] | None:
    """``tables_copied``, ``tables``, ``rows_copying`` (of the tables being copied now), ``enabled`` (false if the
    replication has stopped on an error), ``errors`` (their number), ``lag_bytes`` and ``wal_retained`` (null while not
    known); None outside the phases that replicate, and where a server does not answer."""
    if row.phase not in (*_FORTH, *_BACK):
        return None
    source, target = topology.by_id[row.source], topology.by_id[row.target]
    name = stream_name(catalog, row.id)
    if row.phase in _BACK:
        source, target, name = target, source, name_back(name)
    try:
        state = replication.copy_state(shards.get(target), name)
        sender = replication.sender(shards.get(source), name)
        retained = replication.retained(shards.get(source), name)
    except (ShardUnreachable, psycopg.Error):
        return None
    if state is None:
        return None
    return {
        "tables_copied": state.ready,
        "tables": state.tables,
        "rows_copying": sum(state.rows.values()),
        "enabled": state.enabled,
        "errors": state.errors,
        "lag_bytes": sender.lag_bytes if sender is not None else None,
        "wal_retained": retained,
    }
