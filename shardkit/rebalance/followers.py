"""The standbys of a transfer's shards, and the waits for them.

If a server fails over to a standby that lacks the last commits, the shard goes back to what it owned before. Two
shards would own the same arcs, or rows would be gone with the only copy purged. So the decision waits until the
taker's standbys have every row, the opening until the giver's have the decision (`storage.change` sees to that), the
purge until the taker's have the opening. A standby that was there when this mover first looked and is gone is waited
for too; a mover that resumes takes the servers as they are then.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from shardkit.core.errors import MoveWaiting
from shardkit.core.topology import Shard
from shardkit.storage import standbys
from shardkit.storage.connections import Connection

if TYPE_CHECKING:
    from .transfer import TransferRun

WHILE_CLOSED = 0.2
"""Seconds that standbys may take while applications wait."""


class Followers:
    """What one transfer knows of standbys, by shard."""

    def __init__(self, run: TransferRun) -> None:
        self._run = run
        self._known: dict[int, Counter[str]] = {}

    def look(self, shard: Shard) -> standbys.Known:
        """Who is there, and who was."""
        there = Counter(standbys.connected(self._run.probes.get(shard)))
        self._known[shard.id] = self._known.get(shard.id, Counter()) | there
        return self._known[shard.id]

    def wait(self, shard: Shard, what: str) -> None:
        """Until every standby of a shard has what is committed there now; tells that ``what`` waits, and gives up with
        `MoveWaiting` when patience ends."""
        run = self._run
        waiting = f"{what} waits for standbys of shard {shard.name}"

        def tell(names: str) -> None:
            run.around.pause(0)
            run.waits.tell(f"{waiting}: {names}")

        if not (known := self.look(shard)):
            return
        if names := standbys.wait(run.probes.get(shard), known, run.around.patience, tell):
            raise MoveWaiting(f"{waiting[0].upper()}{waiting[1:]}: {names}.", shard=shard.name)
        run.waits.tell(None)

    def lacking(self, shard: Shard, connection: Connection) -> str:
        """While applications wait: the standbys that lack what is committed on a shard now, after `WHILE_CLOSED`."""
        return standbys.wait(connection, self._known.get(shard.id, {}), WHILE_CLOSED)
