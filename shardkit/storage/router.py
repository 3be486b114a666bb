"""The router: the topology that this process believes in, and where it learns of a newer one.

Its belief may be old: the fences tell. It adopts what a shard holds or what the catalog has recorded, the highest
version it meets, and never goes back. Sessions drive it; it opens no guarded transaction.
"""

from __future__ import annotations

import threading

from shardkit.core.topology import Shard, Topology

from .engines import Engines


class Router:
    """Holds the topology of a process. Safe to share between threads, and between sync and async sessions."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._lock = threading.Lock()

    @property
    def topology(self) -> Topology:
        """The newest topology met so far."""
        return self._topology

    def adopt(self, topology: Topology | None) -> Topology:
        """Take a topology that a shard holds or the catalog has recorded, if it is newer; the newest."""
        with self._lock:
            if topology is not None and topology.version > self._topology.version:
                self._topology = topology
            return self._topology

    def newer_than(
        self, version: int, engines: Engines, copy: Topology | None = None, *, ask: bool = True
    ) -> Topology | None:
        """A topology above ``version``: the copy of the shard that refused, what another thread has learned, or, unless
        ``ask`` is False, the catalog's; None if there is none."""
        found = self.adopt(copy)
        if found.version <= version and ask:
            found = self.adopt(engines.read_current())
        return found if found.version > version else None

    def without(self, shard: Shard, version: int, engines: Engines) -> Topology | None:
        """A topology above ``version`` when ``shard`` does not answer: of the catalog, else of any other shard."""
        found = self.newer_than(version, engines)
        if found is not None:
            return found
        for other in self._topology.shards:
            if other.id != shard.id and (copy := engines.read_copy(other)) is not None:
                found = self.adopt(copy)
                break
        return found if found is not None and found.version > version else None
