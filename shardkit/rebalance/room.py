"""Room for transfers that replicate side by side, on servers that they share.

Shards may be databases of one server, which has so many replication slots, walsenders, workers and origins for all of
them. A transfer enters before it makes anything there, with what it may come to take, and leaves when it has dropped
it; where there is no room beside those that are inside, it waits for one of them to leave. So none finds a server full
in the middle of its copy, and two never wait for each other: whoever is inside has all that it needs.

One `Room` a mover, for all its threads. It knows nothing of phases.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from shardkit.core.topology import Shard
from shardkit.storage import servers, spare
from shardkit.storage.connections import Connection
from shardkit.storage.spare import RECEIVING, SENDING, Need, Resource, Use


@dataclass(frozen=True, slots=True)
class Full:
    """Why there is no room, and whether transfers that are inside take part of it, so that to wait helps."""

    reason: str
    will_end: bool


@dataclass(frozen=True, slots=True)
class _Inside:
    """A transfer inside: the name of its subscription, the servers, and what it may take."""

    name: str
    servers: Mapping[Resource, str]
    need: Need


class Room:
    """What the transfers of one mover may take on servers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside: dict[int, _Inside] = {}

    def enter(
        self,
        transfer: int,
        name: str,
        source: tuple[Shard, Connection],
        target: tuple[Shard, Connection],
        tables: int,
    ) -> Full | None:
        """Go inside, if there is room; else what there is too little of. Who is inside stays."""
        if self._is_inside(transfer):
            return None
        # Asked without the lock, as a server that hangs is one transfer's business: of those inside that does not count
        # which they have yet, so an answer that is a little old is as good.
        entering = _entering(name, source[1], target[1], tables)
        sides = ((source[0], spare.sending(source[1])), (target[0], spare.receiving(target[1])))
        with self._lock:
            for shard, uses in sides:
                full = self._full(entering, shard, uses)
                if full is not None:
                    return full
            self._inside[transfer] = entering
            return None

    def stay(self, transfer: int, name: str, source: Connection, target: Connection, tables: int) -> None:
        """Be inside without asking: what an earlier mover made for the transfer is there already."""
        if not self._is_inside(transfer):
            entering = _entering(name, source, target, tables)
            with self._lock:
                self._inside[transfer] = entering

    def _is_inside(self, transfer: int) -> bool:
        with self._lock:
            return transfer in self._inside

    def leave(self, transfer: int) -> None:
        """Nothing of the transfer is on the servers any more, or nobody works on it."""
        with self._lock:
            self._inside.pop(transfer, None)

    def _full(self, entering: _Inside, shard: Shard, uses: Mapping[Resource, Use]) -> Full | None:
        for resource, use in uses.items():
            here = [
                each for each in self._inside.values() if each.servers[resource] == entering.servers[resource]
            ]
            names = {each.name for each in here}
            others = sum(name not in names for name in use.names)
            # Of those inside, all that they may take counts, whether they have it yet or not.
            copies = max(use.copies, sum(each.need.extra[resource] for each in here))
            taken = others + len(here) + copies
            if taken + entering.need.whole(resource) > use.limit:
                return Full(
                    f"{resource} on the server of shard {shard.name}: {entering.need.whole(resource)} are needed, and "
                    f"those that run take {taken} of {use.limit} ({resource.setting})",
                    bool(here),
                )
        return None


def _entering(name: str, source: Connection, target: Connection, tables: int) -> _Inside:
    sender, receiver = servers.identity(source).system, servers.identity(target).system
    return _Inside(
        name,
        {**dict.fromkeys(SENDING, sender), **dict.fromkeys(RECEIVING, receiver)},
        Need.of(target, tables),
    )
