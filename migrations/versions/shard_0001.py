"""A shard's own tables: whose shard it is, its copy of the topology, the movers' token, the guards of a move."""

from alembic import op

revision = "shard_0001"
down_revision = None
branch_labels = ("shard",)
depends_on = None

OWNED = """
CREATE FUNCTION shardkit.owned(key {type}) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
AS 'SELECT width_bucket({hash}(key, 0), bounds) & 1 = 1 FROM shardkit.ownership'
"""

STATEMENTS = (
    """
    CREATE TABLE shardkit.shard (
        singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
        cluster_id uuid NOT NULL,
        shard_id integer NOT NULL,
        name text NOT NULL
    )
    """,
    # Copies of the topologies this shard took; the highest version counts.
    """
    CREATE TABLE shardkit.topology (
        version bigint PRIMARY KEY,
        digest text NOT NULL,
        document jsonb NOT NULL,
        taken_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    # Written with the copy: the bounds of the arcs owned here, for shardkit.owned().
    """
    CREATE TABLE shardkit.ownership (
        singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
        bounds bigint[] NOT NULL
    )
    """,
    "INSERT INTO shardkit.ownership (bounds) VALUES ('{}')",
    """
    CREATE TABLE shardkit.mover (
        singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
        token bigint NOT NULL
    )
    """,
    "INSERT INTO shardkit.mover (token) VALUES (0)",
    # A row stands here from the decision of a transfer to the end of its purge.
    "CREATE TABLE shardkit.moved (transfer_id bigint PRIMARY KEY, target text NOT NULL)",
    # Which moving rows were written since they were last compared; written by the triggers of a transfer.
    """
    CREATE TABLE shardkit.changed (
        transfer_id bigint NOT NULL,
        relation integer NOT NULL,
        key text NOT NULL
    )
    """,
    # Tables on which a transfer changed the replica identity, to be set back when the last one is done.
    """
    CREATE TABLE shardkit.replica_identity (
        relation text PRIMARY KEY,
        kind "char" NOT NULL,
        index_name text
    )
    """,
    OWNED.format(type="bigint", hash="hashint8extended"),
    OWNED.format(type="text", hash="hashtextextended"),
    OWNED.format(type="uuid", hash="uuid_hash_extended"),
    """
    CREATE FUNCTION shardkit.refuse_rekey() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'shardkit: the shard key of a row of %.% cannot change while its arcs move',
            TG_TABLE_SCHEMA, TG_TABLE_NAME
            USING ERRCODE = 'SK002', HINT = 'Delete the row and insert it under the new key, or wait for the move.';
    END $$
    """,
    """
    CREATE FUNCTION shardkit.refuse_truncate() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'shardkit: %.% cannot be truncated while its arcs move', TG_TABLE_SCHEMA, TG_TABLE_NAME
            USING ERRCODE = 'SK003', HINT = 'Use DELETE, or wait for the move.';
    END $$
    """,
    "GRANT USAGE ON SCHEMA shardkit TO PUBLIC",
    "GRANT SELECT ON shardkit.shard, shardkit.topology, shardkit.ownership, shardkit.moved TO PUBLIC",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    for function in ("refuse_truncate()", "refuse_rekey()"):
        op.execute(f"DROP FUNCTION shardkit.{function} CASCADE")
    for key in ("bigint", "text", "uuid"):
        op.execute(f"DROP FUNCTION shardkit.owned({key})")
    for table in ("replica_identity", "changed", "moved", "mover", "ownership", "topology", "shard"):
        op.execute(f"DROP TABLE shardkit.{table}")
