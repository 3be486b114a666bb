"""Many traps at once: the preflight names all of them, in one refusal, before anything is touched."""

from __future__ import annotations

from typing import LiteralString
from uuid import uuid4

import pytest
from psycopg import sql

from shardkit.core.errors import JobRunning, PreflightFailed
from shardkit.core.move import Phase
from shardkit.core.topology import HomeTable, ReferenceTable, ShardedTable
from shardkit.rebalance import preflight
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.storage import inspection, membership, predicate
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections, connect, value
from tests.fix_shards import MakeShards, Shards

NAMES = (
    "Accounts 1", "children", "copies", "deferred", "drifted", "events", "free", "gone", "held", "kept", "linked",
    "made", "numbered", "secret",
)  # fmt: skip
TABLES = tuple(ShardedTable("My App", name, "Owner", "int") for name in NAMES)
PLAIN = '"Owner" int NOT NULL, id int NOT NULL, body text DEFAULT \'x\', PRIMARY KEY ("Owner", id)'
EVENTS = f"""
CREATE TABLE "My App".events ({PLAIN}) PARTITION BY RANGE (id);
CREATE TABLE "My App"."events 1" PARTITION OF "My App".events FOR VALUES FROM (0) TO (100);
"""
SCHEMA = 'CREATE SCHEMA "My App";' + "".join(
    EVENTS if name == "events" else f'CREATE TABLE "My App"."{name}" ({PLAIN});' for name in NAMES
)
ACT = """CREATE FUNCTION "My App".act() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"""


@pytest.fixture
def shards(make_shards: MakeShards) -> Shards:
    return make_shards(2, tables=TABLES, schema=SCHEMA)


def both(shards: Shards, statement: str) -> None:
    for name in ("s1", "s2"):
        shards.on(name).execute(statement.encode())


def test_all_reasons_in_one_refusal(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = shards.on("s1"), shards.on("s2")
    both(shards, ACT)
    both(
        shards,
        "CREATE TABLE public.plain (id int PRIMARY KEY); CREATE TABLE public.main (id int PRIMARY KEY)",
    )
    with shards.writer() as (catalog, connections):
        membership.declare(catalog, connections, [HomeTable("public", "main", "s1")])
    both(shards, 'CREATE TABLE "My App".child (extra int) INHERITS ("My App".children)')
    both(shards, 'ALTER TABLE "My App".copies SET UNLOGGED')
    both(
        shards,
        """
        ALTER TABLE "My App".deferred DROP CONSTRAINT deferred_pkey, ADD PRIMARY KEY ("Owner", id) DEFERRABLE
        """,
    )
    two.execute("ALTER TABLE \"My App\".drifted ALTER body SET DEFAULT 'y', ADD CHECK (id > 0)")
    one.execute(
        'CREATE TABLE "My App"."events 2" PARTITION OF "My App".events FOR VALUES FROM (100) TO (200)'
    )
    both(shards, 'ALTER TABLE "My App".free DROP CONSTRAINT free_pkey')
    both(shards, 'ALTER TABLE "My App".free ADD doc json, ADD twice int GENERATED ALWAYS AS (id * 2) STORED')
    two.execute('DROP TABLE "My App".gone')
    both(shards, 'ALTER TABLE "My App".kept ADD picture oid')
    both(shards, 'ALTER TABLE "My App".linked ADD FOREIGN KEY (id) REFERENCES public.plain')
    both(shards, 'ALTER TABLE "My App".linked ADD CONSTRAINT at_home FOREIGN KEY (id) REFERENCES public.main')
    both(shards, 'CREATE UNIQUE INDEX one ON "My App"."Accounts 1" (id)')
    both(
        shards,
        'ALTER TABLE "My App".linked ADD CONSTRAINT apart FOREIGN KEY (id) REFERENCES "My App"."Accounts 1" (id)',
    )
    both(
        shards, 'CREATE TABLE public.log (o int, i int, FOREIGN KEY (o, i) REFERENCES "My App"."Accounts 1")'
    )
    both(
        shards,
        'CREATE TRIGGER "Act" BEFORE INSERT ON "My App".made FOR EACH ROW EXECUTE FUNCTION "My App".act()',
    )
    two.execute('ALTER TABLE "My App".made ENABLE ALWAYS TRIGGER "Act"')
    two.execute('CREATE RULE keep AS ON INSERT TO "My App".made DO INSTEAD NOTHING')
    two.execute('ALTER TABLE "My App".made ENABLE REPLICA RULE keep')
    both(shards, 'ALTER TABLE "My App".numbered ALTER id ADD GENERATED ALWAYS AS IDENTITY (MAXVALUE 10)')
    one.execute("SELECT setval(pg_get_serial_sequence('\"My App\".numbered', 'id'), 10)")
    gids = []
    for connection in (one, two):
        gids.append(f"doubt {uuid4().hex}")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO public.plain VALUES (1)")
        connection.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(gids[-1])))
    try:
        monkeypatch.setattr(preflight, "DDL_SECONDS", 0.0)
        with connect(shards.topology().named("s2").url, application="migration") as ddl:
            ddl.execute("BEGIN")
            ddl.execute('ALTER TABLE "My App".held ADD later int')
            with pytest.raises(PreflightFailed) as caught:
                shards.move()
            ddl.execute("ROLLBACK")
    finally:
        for connection, gid in zip((one, two), gids, strict=True):
            connection.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
    found = list(caught.value.fields["reasons"])
    expected = [
        f"shard s1: prepared transaction {gids[0]!r} is in doubt",
        f"shard s2: prepared transaction {gids[1]!r} is in doubt",
        "public.log, which is not declared, refers to My App.Accounts 1 by log_o_i_fkey: its rows would stay",
        "table My App.children has inheritance children",
        '"My App".copies of table My App.copies on s1 is unlogged',
        '"My App".copies of table My App.copies on s2 is unlogged',
        "the primary key of My App.deferred is DEFERRABLE",
        "column My App.drifted.body differs: text DEFAULT 'x'::text on the source, text DEFAULT 'y'::text on the",
        "constraint of My App.drifted is missing on the source: CHECK ((id > 0))",
        "table My App.events has no partition FOR VALUES FROM (100) TO (200) on the target",
        "table My App.free has generated columns and no primary key",
        "table My App.free has no primary key, and doc is json, which has no equality",
        "table My App.free has no index that begins with Owner",
        "table My App.gone is missing on the target",
        "table My App.held on s2 is being altered by pid ",
        "column My App.kept.picture is oid",
        "foreign key apart of My App.linked refers to My App.Accounts 1 without the shard keys",
        "foreign key at_home of My App.linked refers to public.main, whose rows are on shard s1 alone",
        "foreign key linked_id_fkey of My App.linked refers to public.plain, which is not declared",
        "trigger Act of My App.made on s2 fires for replicated rows",
        "rule keep of My App.made on s2 fires for replicated rows",
        "no number left beyond 10",
    ]
    missing = [text for text in expected if not any(text in reason for reason in found)]
    assert missing == []
    surplus = [reason for reason in found if not any(text in reason for text in expected)]
    assert surplus == []
    assert not shards.topology().by_id[1].in_transit
    with Mover(shards.catalog_url) as mover:
        mover.abort()
    two.execute(SCHEMA[SCHEMA.index('CREATE TABLE "My App"."gone"') :].split(";")[0].encode())
    shards.assert_clean()


def test_what_is_carried_is_carried(shards: Shards) -> None:
    """Other schemas, quoted names, partitions, identity and generated columns, row security, foreign keys between
    moved tables and to reference tables, exclusion constraints, triggers; each replica identity is set back."""
    one = shards.on("s1")
    both(
        shards, "CREATE TABLE public.country (code text PRIMARY KEY); INSERT INTO public.country VALUES ('x')"
    )
    with shards.writer() as (catalog, connections):
        membership.declare(catalog, connections, [ReferenceTable("public", "country")])
    both(shards, ACT)
    both(
        shards,
        """
        ALTER TABLE "My App".linked ADD FOREIGN KEY ("Owner", id) REFERENCES "My App"."Accounts 1" ON DELETE CASCADE,
            ADD country text DEFAULT 'x' REFERENCES public.country;
        ALTER TABLE "My App".numbered ALTER id ADD GENERATED ALWAYS AS IDENTITY;
        ALTER TABLE "My App".made ADD twice int GENERATED ALWAYS AS (id * 2) STORED,
            ADD EXCLUDE USING btree (id WITH =);
        CREATE TRIGGER act BEFORE INSERT OR DELETE ON "My App".made FOR EACH ROW EXECUTE FUNCTION "My App".act();
        ALTER TABLE "My App".secret ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
        CREATE POLICY none ON "My App".secret USING (false);
        ALTER TABLE "My App".held REPLICA IDENTITY FULL;
        ALTER TABLE "My App".kept REPLICA IDENTITY NOTHING;
        ALTER TABLE "My App".drifted DROP CONSTRAINT drifted_pkey, ADD PRIMARY KEY (id);
        CREATE UNIQUE INDEX chosen ON "My App".drifted ("Owner", id);
        ALTER TABLE "My App".drifted REPLICA IDENTITY USING INDEX chosen;
        ALTER TABLE "My App".free DROP CONSTRAINT free_pkey, ADD PRIMARY KEY (id);
        CREATE INDEX ON "My App".free ("Owner");
        """,
    )
    for table in sorted(TABLES, key=lambda table: table.name == "linked"):
        columns: LiteralString = '"Owner"' if table.name == "numbered" else '"Owner", id'
        values: LiteralString = "g" if table.name == "numbered" else "g, g % 100" if table.name == "events" else "g, g"
        one.execute(
            sql.SQL("INSERT INTO {} ({}) SELECT {} FROM generate_series(1, 99) g").format(
                predicate.relation(table), sql.SQL(columns), sql.SQL(values)
            )
        )
    identities = (
        "SELECT relname, relreplident::text FROM pg_class WHERE relkind IN ('r', 'p') AND relname = ANY (%s)"
    )
    before: dict[str, str] = dict(one.execute(identities, (list(NAMES),)).fetchall())
    assert {before[name] for name in ("held", "kept", "drifted", "free")} == {"f", "n", "i", "d"}
    during: list[dict[str, str]] = []

    def look(progress: Progress) -> None:
        if progress.phase is Phase.CATCHING_UP and not during:
            during.append(dict(one.execute(identities, (list(NAMES),)).fetchall()))
            one.execute(
                "UPDATE \"My App\".free SET body = 'written'; UPDATE \"My App\".kept SET body = 'written'"
            )

    shards.move(listener=look)
    assert (during[0]["kept"], during[0]["free"]) == ("i", "i")
    assert dict(one.execute(identities, (list(NAMES),)).fetchall()) == before
    shards.assert_clean()
    for table in TABLES:
        held = shards.rows(table)
        assert [len(held["s1"]) > 0, len(held["s2"]) > 0, sum(map(len, held.values()))] == [True, True, 99], (
            table
        )
    assert value(shards.on("s2"), "SELECT count(*) FROM \"My App\".free WHERE body <> 'written'") == 0
    (note,) = [text for text in inspection.unique_without_key(one, TABLES[11]) if "excludes" in text]
    assert "made_id_excl (id) of My App.made excludes rows on each shard alone" in note


def test_a_table_that_a_migration_adds_in_mid_move_is_declared_after_it(shards: Shards) -> None:
    """Declared now, its rows would not be carried; so it is refused until the job is over."""
    late = ShardedTable("My App", "late", "Owner", "int")
    refused: list[object] = []

    def migrate(progress: Progress) -> None:
        if progress.phase is Phase.CATCHING_UP and not refused:
            both(shards, f'CREATE TABLE "My App".late ({PLAIN})')
            with Catalog.open(shards.catalog_url) as catalog, ShardConnections() as connections:
                with pytest.raises(JobRunning):
                    membership.declare(catalog, connections, [late])
            refused.append(True)

    shards.move(listener=migrate)
    assert refused
    with shards.writer() as (catalog, connections):
        membership.declare(catalog, connections, [late])
    shards.assert_clean()
