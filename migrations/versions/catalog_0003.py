"""What a job was told, whether it is paused, the state of one whose arcs went back; what movers report."""

from alembic import op

revision = "catalog_0003"
down_revision = "catalog_0002"
branch_labels = None
depends_on = None

STATEMENTS = (
    "ALTER TABLE shardkit.jobs ADD COLUMN options jsonb NOT NULL DEFAULT '{}'",
    "ALTER TABLE shardkit.jobs ADD COLUMN paused boolean NOT NULL DEFAULT false",
    # The last report of the mover at work, for whoever looks from elsewhere; nothing depends on it.
    "ALTER TABLE shardkit.transfers ADD COLUMN progress jsonb",
    "ALTER TABLE shardkit.jobs DROP CONSTRAINT jobs_state_check",
    """
    ALTER TABLE shardkit.jobs ADD CONSTRAINT jobs_state_check
        CHECK (state IN ('running', 'done', 'aborted', 'rolled back'))
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("ALTER TABLE shardkit.transfers DROP COLUMN progress")
    op.execute("UPDATE shardkit.jobs SET state = 'aborted' WHERE state = 'rolled back'")
    op.execute("ALTER TABLE shardkit.jobs DROP CONSTRAINT jobs_state_check")
    op.execute(
        "ALTER TABLE shardkit.jobs ADD CONSTRAINT jobs_state_check CHECK (state IN ('running', 'done', 'aborted'))"
    )
    op.execute("ALTER TABLE shardkit.jobs DROP COLUMN paused, DROP COLUMN options")
