"""How far an unfinished transfer is, asked of its servers: the mover at work may be any process on any machine."""

from __future__ import annotations

from typing import Any

import psycopg

from shardkit.core.errors import ShardUnreachable
from shardkit.core.move import Phase
from shardkit.core.topology import Topology
from shardkit.storage import replication
from shardkit.storage.catalog import Catalog, TransferRow
from shardkit.storage.connections import ShardConnections


def progress(
    catalog: Catalog, topology: Topology, row: TransferRow, shards: ShardConnections
) -> dict[str, Any] | None:
    """``tables_copied``, ``tables``, ``rows_copying`` (of the tables being copied now), ``lag_bytes`` (null while not
    known); None outside the phases that replicate, and where a server does not answer."""
    if row.phase not in (Phase.COPYING, Phase.CATCHING_UP, Phase.VERIFYING, Phase.CUTTING_OVER):
        return None
    name = f"shardkit_{catalog.cluster_id().hex[:8]}_{row.id}"
    try:
        state = replication.copy_state(shards.get(topology.by_id[row.target]), name)
        sender = replication.sender(shards.get(topology.by_id[row.source]), name)
    except (ShardUnreachable, psycopg.Error):
        return None
    if state is None:
        return None
    return {
        "tables_copied": state.ready,
        "tables": state.tables,
        "rows_copying": sum(state.rows.values()),
        "lag_bytes": sender.lag_bytes if sender is not None else None,
    }
