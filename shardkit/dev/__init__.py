"""Development helpers: embedded PostgreSQL clusters and the demo."""

import sys

if sys.platform == "win32":
    raise ImportError(
        "shardkit.dev starts PostgreSQL on Linux and macOS; on Windows use WSL or your own servers"
    )

from shardkit.dev.binaries import Binaries, find_binaries
from shardkit.dev.cluster import Cluster, Clusters
from shardkit.dev.standby import Standby

__all__ = ["Binaries", "Cluster", "Clusters", "Standby", "find_binaries"]
