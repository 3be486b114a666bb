"""The standbys of a transfer's shards, and the waits for them.

If a server fails over to a standby that lacks the last commits, the shard goes back to what it owned before. Two
shards would own the same arcs, or rows would be gone with the only copy purged. So the decision waits until the
taker's standbys have every row, the opening until the giver's have the decision (`storage.change` sees to that), the
purge until the taker's have the opening. A standby that was there when this mover first looked and is gone is waited
for too; a mover that resumes takes the servers as they are then.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

from shardkit.core.errors import MoveWaiting
from shardkit.core.topology import Shard
from shardkit.storage import standbys
from shardkit.storage.connections import Connection

if TYPE_CHECKING:
    from .transfer import TransferRun

_POLL = 0.02
_POLL_WHILE_CLOSED = 0.001


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
        run, connection = self._run, self._run.probes.get(shard)
        if not (known := self.look(shard)):
            return
        position = standbys.flushed(connection)
        deadline = time.monotonic() + run.around.patience
        while missing := standbys.lacking(connection, position, known):
            reason = f"{what} waits for standbys of shard {shard.name}: {', '.join(missing)}"
            run.waits.tell(reason)
            if time.monotonic() > deadline:
                raise MoveWaiting(f"{reason[0].upper()}{reason[1:]}.", shard=shard.name)
            run.around.pause(_POLL)
        run.waits.tell(None)

    def have_all(self, shard: Shard, connection: Connection, seconds: float) -> list[str]:
        """While applications wait: the standbys which lack what is committed now, after so many seconds at most."""
        if not (known := self._known.get(shard.id)):
            return []
        position = standbys.flushed(connection)
        deadline = time.monotonic() + seconds
        while missing := standbys.lacking(connection, position, known):
            if time.monotonic() > deadline:
                return missing
            time.sleep(_POLL_WHILE_CLOSED)
        return []
