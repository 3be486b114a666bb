"""Secondary indexes of an empty target that are dropped while rows are copied there, to be built after it."""

from alembic import op

revision = "shard_0004"
down_revision = "shard_0003"
branch_labels = None
depends_on = None

# Written by the transaction that drops the index; a row goes when the index is there again. ``tablespace`` is empty
# for the database's own; ``statements`` give it back what its definition does not say.
SET_ASIDE = """
CREATE TABLE shardkit.set_aside (
    schema text NOT NULL,
    name text NOT NULL,
    relation text NOT NULL,
    definition text NOT NULL,
    tablespace text NOT NULL,
    statements text[] NOT NULL,
    PRIMARY KEY (schema, name)
)
"""


def upgrade() -> None:
    op.execute(SET_ASIDE)
    # Like the system's catalogs: whoever compares tables counts these indexes.
    op.execute("GRANT SELECT ON shardkit.set_aside TO PUBLIC")


def downgrade() -> None:
    op.execute("DROP TABLE shardkit.set_aside")
