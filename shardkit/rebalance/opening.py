"""What is done on a shard in the transaction in which it opens for arcs, whoever opens it.

The mover that decided a cutover opens right after; where it was killed, or lost a connection, the next that settles
the pending change does. Both do the same here: stop the replication that brought the rows, and make ready for the way
back, or end it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from shardkit.core.move import Phase
from shardkit.core.topology import Topology
from shardkit.storage import change, indoubt, openings, replication, sourceguard
from shardkit.storage.catalog import Catalog, Job, TransferRow
from shardkit.storage.connections import Connection, ShardConnections, value

_FORTH = (Phase.CUTTING_OVER, Phase.ABORTING)
_BACK = (Phase.CUTTING_BACK, Phase.STAYING)


def stream_name(catalog: Catalog, transfer_id: int) -> str:
    """Of everything that carries a transfer's rows from source to target; known before any of it is made."""
    return f"shardkit_{catalog.cluster_id().hex[:8]}_{transfer_id}"


def name_back(name: str) -> str:
    """Of everything that carries its rows back."""
    return f"{name}_back"


@dataclass(frozen=True, slots=True)
class Opening:
    """The opening of one transfer, on its target or, back, on its source."""

    transfer: int
    name: str
    keeps_source: bool
    back: bool = False

    @property
    def can_stand_ready(self) -> bool:
        """Whether it can be made before the decision: the way back begins behind the last row that came, no sooner."""
        return self.back or not self.keeps_source

    def on_open(self, connection: Connection) -> None:
        """Nothing may be applied any more, the purge's deletes least of all. Can be run twice."""
        if self.back:
            replication.set_enabled(connection, name_back(self.name), False)
            sourceguard.set_back(connection, self.transfer)
            return
        replication.set_enabled(connection, self.name, False)
        if self.keeps_source:
            openings.write(connection, self.transfer)


class Openings:
    """The openings that a pending topology makes: a hook for `change.settle`."""

    def __init__(self, by_shard: Iterable[tuple[int, Opening]]) -> None:
        self._by_shard = list(by_shard)

    @classmethod
    def pending(cls, catalog: Catalog) -> Self:
        """Those of the change that the catalog holds as proposed."""
        proposal, job = catalog.proposed(), catalog.running_job()
        if proposal is None or job is None:
            return cls(())
        return cls(
            _decided(catalog, job, proposal, row)
            for row in catalog.transfers(job.id)
            if _turns(proposal, row)
        )

    def on_open(self, connection: Connection) -> None:
        """On whichever shard opens."""
        if not self._by_shard:
            return
        shard = value(connection, "SELECT shard_id FROM shardkit.shard")
        for number, opening in self._by_shard:
            if number == shard:
                opening.on_open(connection)


def settle(catalog: Catalog, shards: ShardConnections) -> None:
    """End the transactions that crashes left in doubt, as they hold fences. Then `change.settle`, with what the opening
    of a transfer has to do."""
    current = catalog.current()
    if current is not None:
        indoubt.recover(current, shards)
    change.settle(catalog, shards, on_open=Openings.pending(catalog).on_open)


def _turns(proposal: Topology, row: TransferRow) -> bool:
    taker = row.target if row.phase in _FORTH else row.source
    return row.phase in (*_FORTH, *_BACK) and proposal.owned(taker).issuperset(row.arcs)


def _decided(catalog: Catalog, job: Job, proposal: Topology, row: TransferRow) -> tuple[int, Opening]:
    back = row.phase in _BACK
    opening = Opening(row.id, stream_name(catalog, row.id), job.keeps_source, back)
    return row.source if back else row.target, opening
