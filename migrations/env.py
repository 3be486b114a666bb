"""Alembic environment of shardkit's own tables.

Two branches: ``catalog`` (the catalog database) and ``shard`` (every shard); one database may be both. Driven by
`shardkit.storage.migrate`, which hands over an open connection; an application's own migrations are none of its
business. Every object lives in schema ``shardkit``, the version table included.
"""

from alembic import context
from sqlalchemy import text

SCHEMA = "shardkit"
# Two `shardkit init` at once must not both create the schema; any constant does.
ADVISORY_LOCK = 0x5348_4152


def run() -> None:
    connection = context.config.attributes["connection"]
    context.configure(
        connection=connection,
        target_metadata=None,
        version_table_schema=SCHEMA,
        version_table="alembic_version",
        transaction_per_migration=False,
    )
    with context.begin_transaction():
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
        context.run_migrations()


run()
