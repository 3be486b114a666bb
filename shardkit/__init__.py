"""shardkit: SQLAlchemy entities spread over PostgreSQL servers by a consistent-hash ring, moved online.

What an application needs is re-exported here; every other module is internal.
"""

__version__ = "0.1.0"
