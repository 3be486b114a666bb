"""The readmission of a shard that went back in time, under the lease of a mover.

What an earlier mover left pending is settled first, so nothing is under way while the shard is compared and brought
forward (`storage.readmission`). Driven by `shardkit shard readmit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shardkit.core.topology import Topology
from shardkit.storage import readmission
from shardkit.storage.connections import ShardConnections
from shardkit.storage.readmission import Lag

from .mover import Mover


@dataclass(frozen=True)
class Readmitted:
    """How far the shard was behind, and the topology that it has now."""

    lag: Lag
    topology: Topology


def readmit(
    catalog_url: str,
    name: str,
    *,
    accept_loss: bool = False,
    patience: float = 60.0,
    listener: Callable[[str], None] = lambda text: None,
) -> Readmitted:
    """Bring a shard forward; one that is not behind is left alone.

    `RowsGone` where rows of keys that it is to own are not there, unless the loss is accepted; `CatalogBehind` where
    the shard is the newer one; `MoveWaiting` where somebody holds its fences for longer than ``patience`` (seconds).
    """
    told: list[str] = []

    def report(reason: str | None) -> None:
        if reason is not None and told[-1:] != [reason]:
            told.append(reason)
            listener(reason)

    with Mover(catalog_url, patience=patience) as mover, ShardConnections("shardkit readmit") as shards:
        lag = readmission.look(mover.catalog, shards, name)
        if not lag.is_behind:
            return Readmitted(lag, lag.now)
        if not accept_loss:
            lag.require_rows()
        topology = readmission.bring_forward(mover.catalog, shards, lag, report=report, patience=patience)
        return Readmitted(lag, topology)
