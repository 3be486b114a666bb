"""The catalog: topologies, the movers' lease, jobs with their transfers, and the audit trail."""

from alembic import op

revision = "catalog_0001"
down_revision = None
branch_labels = ("catalog",)
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE shardkit.cluster (
        singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
        id uuid NOT NULL,
        created_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    # Versions are never used twice: a proposal that was proved impossible keeps its row.
    """
    CREATE TABLE shardkit.topologies (
        version bigint PRIMARY KEY,
        state text NOT NULL CHECK (state IN ('proposed', 'current', 'past', 'impossible')),
        digest text NOT NULL,
        document jsonb NOT NULL,
        recorded_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE UNIQUE INDEX topologies_one_current ON shardkit.topologies (state) WHERE state = 'current'",
    "CREATE UNIQUE INDEX topologies_one_proposed ON shardkit.topologies (state) WHERE state = 'proposed'",
    """
    CREATE TABLE shardkit.lease (
        singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
        token bigint NOT NULL,
        holder text NOT NULL,
        taken_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "INSERT INTO shardkit.lease (token, holder) VALUES (0, 'nobody')",
    """
    CREATE TABLE shardkit.jobs (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        kind text NOT NULL,
        state text NOT NULL CHECK (state IN ('running', 'done', 'aborted')),
        goal jsonb NOT NULL,
        attempts integer NOT NULL DEFAULT 0,
        last_error text,
        created_at timestamptz NOT NULL DEFAULT now(),
        finished_at timestamptz
    )
    """,
    "CREATE UNIQUE INDEX jobs_one_running ON shardkit.jobs (state) WHERE state = 'running'",
    """
    CREATE TABLE shardkit.transfers (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        job_id bigint NOT NULL REFERENCES shardkit.jobs (id),
        source integer NOT NULL,
        target integer NOT NULL,
        arcs jsonb NOT NULL,
        phase text NOT NULL,
        record jsonb NOT NULL DEFAULT '{}',
        attempts integer NOT NULL DEFAULT 0,
        last_error text,
        waiting_for text,
        updated_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "CREATE INDEX transfers_of_job ON shardkit.transfers (job_id)",
    """
    CREATE TABLE shardkit.events (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at timestamptz NOT NULL DEFAULT now(),
        actor text NOT NULL,
        job_id bigint,
        transfer_id bigint,
        event text NOT NULL,
        detail jsonb NOT NULL DEFAULT '{}'
    )
    """,
    # Routers read the topology with the application's role; nothing else here is theirs.
    "GRANT USAGE ON SCHEMA shardkit TO PUBLIC",
    "GRANT SELECT ON shardkit.cluster, shardkit.topologies TO PUBLIC",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    for table in ("events", "transfers", "jobs", "lease", "topologies", "cluster"):
        op.execute(f"DROP TABLE shardkit.{table}")
