"""shardkit: SQLAlchemy entities spread over PostgreSQL servers by a consistent-hash ring, moved online.

What an application needs is re-exported here; every other module is internal.
"""

from shardkit.core import errors
from shardkit.core.errors import ShardkitError
from shardkit.core.ring import HashRing, Ring, position
from shardkit.orm.cluster import ShardCluster, connect
from shardkit.orm.declare import sharded
from shardkit.orm.explaining import Explanation, explain
from shardkit.orm.ids import lease_ids, slot_id
from shardkit.orm.partial import MissingShards, PartialResultWarning
from shardkit.orm.places import home, reference
from shardkit.orm.retrying import retrying
from shardkit.orm.scatterpolicy import ScatterWarning
from shardkit.orm.session import ShardAsyncSession, ShardSession

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "HashRing",
    "MissingShards",
    "PartialResultWarning",
    "Ring",
    "ScatterWarning",
    "ShardAsyncSession",
    "ShardCluster",
    "ShardSession",
    "ShardkitError",
    "connect",
    "errors",
    "explain",
    "home",
    "lease_ids",
    "position",
    "reference",
    "retrying",
    "sharded",
    "slot_id",
]
