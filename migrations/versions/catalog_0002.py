"""The leases of ids: the lanes of timed ones, and the counter of counted ones."""

from alembic import op

revision = "catalog_0002"
down_revision = "catalog_0001"
branch_labels = None
depends_on = None

STATEMENTS = (
    # A lane belongs to the holder of its lease for the ticks (128 ms since 2025) before reserved_until.
    """
    CREATE TABLE shardkit.id_lanes (
        lane integer PRIMARY KEY CHECK (lane BETWEEN 0 AND 1023),
        lease uuid,
        holder text,
        reserved_until bigint NOT NULL DEFAULT 0
    )
    """,
    "INSERT INTO shardkit.id_lanes (lane) SELECT generate_series(0, 1023)",
    """
    CREATE TABLE shardkit.id_counter (
        singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
        next bigint NOT NULL
    )
    """,
    "INSERT INTO shardkit.id_counter (next) VALUES (0)",
    # Applications lease with their own role.
    "GRANT SELECT, UPDATE ON shardkit.id_lanes, shardkit.id_counter TO PUBLIC",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE shardkit.id_counter, shardkit.id_lanes")
