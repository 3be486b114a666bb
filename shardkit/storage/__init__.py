"""PostgreSQL: connections, guard, fence, catalog, replication, digests. Knows nothing of the ORM."""
