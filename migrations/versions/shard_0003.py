"""Where in its own WAL a shard opened for the arcs of a transfer that keeps its source."""

from alembic import op

revision = "shard_0003"
down_revision = "shard_0002"
branch_labels = None
depends_on = None

# The replication back to the source begins here: what lies before came from there. Written by the opening itself.
OPENED = "CREATE TABLE shardkit.opened (transfer_id bigint PRIMARY KEY, lsn pg_lsn NOT NULL)"


def upgrade() -> None:
    op.execute(OPENED)


def downgrade() -> None:
    op.execute("DROP TABLE shardkit.opened")
