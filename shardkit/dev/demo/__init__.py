"""The demo: three real servers, a workload of several processes, and a shard that is added while it runs."""

from shardkit.dev.demo.narration import Narrator
from shardkit.dev.demo.report import Report
from shardkit.dev.demo.run import KILL_POINTS, Demo, Options

__all__ = ["KILL_POINTS", "Demo", "Narrator", "Options", "Report"]
