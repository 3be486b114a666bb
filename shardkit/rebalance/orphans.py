"""What moves left behind: things on the shards, and marks in the topology, for which no transfer is under way.

A transfer makes nothing before its row is in the catalog, and is at its end there only when everything is gone. So what
is on a shard both before and after the catalog says that nobody has it, nobody has. Asked by the audit and the repair.
"""

from __future__ import annotations

import time
from uuid import UUID

from shardkit.core.keyrange import ArcSet
from shardkit.core.move import FINAL
from shardkit.storage import leftovers, standing
from shardkit.storage.catalog import Catalog, TransferRow
from shardkit.storage.connections import Connection
from shardkit.storage.leftovers import Leftover
from shardkit.storage.standing import Believed

LOOKS = 50
PAUSE = 0.1


class NotSettled(Exception):
    """Jobs came and went at each look."""


def unfinished(believed: Believed) -> dict[int, TransferRow]:
    """The transfers that are under way, or stopped on it, by number."""
    return {row.id: row for row in believed.unfinished if row.phase not in FINAL}


def marks(believed: Believed, shard_id: int) -> ArcSet:
    """Arcs marked in transit on a shard for which no transfer is under way."""
    arcs = believed.current.by_id[shard_id].in_transit
    for row in unfinished(believed).values():
        if shard_id in (row.source, row.target):
            arcs -= row.arcs
    return arcs


def in_use(thing: Leftover, believed: Believed) -> bool:
    """Whether a thing of a move belongs to what is under way."""
    if thing.of_job:
        return believed.job is not None
    return not thing.foreign and thing.transfer in unfinished(believed)


def is_removable(thing: Leftover, finished: set[int]) -> bool:
    """Whether it is known whose a thing that is left was, so that it can be removed without a question."""
    return thing.of_job or (thing.transfer in finished and not thing.foreign)


def finished_transfers(catalog: Catalog, things: list[Leftover]) -> set[int]:
    """Those of the transfers that things are named after that the catalog knows to be at their end."""
    rows = catalog.connection.execute(
        "SELECT id FROM shardkit.transfers WHERE id = ANY(%s) AND phase = ANY(%s)",
        ([thing.transfer for thing in things], [phase.value for phase in FINAL]),
    )
    return {number for (number,) in rows}


def left_on(catalog: Catalog, connection: Connection, cluster: UUID) -> list[tuple[Leftover, bool]]:
    """What is left on a shard, each with whether it `is_removable`; `NotSettled`."""
    for _ in range(LOOKS):
        before = leftovers.things(connection, cluster)
        believed = standing.believed(catalog)
        assert believed is not None
        left = [thing for thing in before if not in_use(thing, believed)]
        if not left:
            return []
        still_there = {thing.remedy for thing in leftovers.things(connection, cluster)}
        after = standing.believed(catalog)
        if after is not None and after.jobs == believed.jobs:
            finished = finished_transfers(catalog, left)
            return [(thing, is_removable(thing, finished)) for thing in left if thing.remedy in still_there]
        time.sleep(PAUSE)
    raise NotSettled
