"""The decisions of transactions that wrote several shards, beside the data of the shard that decides."""

from alembic import op

revision = "shard_0002"
down_revision = "shard_0001"
branch_labels = None
depends_on = None

STATEMENTS = (
    # Written by the transaction that commits, or by whoever gives a dead one up. A row goes when every participant
    # is known to have ended as it says.
    """
    CREATE TABLE shardkit.decision (
        gid text PRIMARY KEY,
        outcome text NOT NULL CHECK (outcome IN ('commit', 'abort')),
        participants integer[] NOT NULL,
        decided_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    # An application's own role decides.
    "GRANT SELECT, INSERT, DELETE ON shardkit.decision TO PUBLIC",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE shardkit.decision")
