"""What a table must not have if its rows are to move: refused by name, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from psycopg import sql

from shardkit.core.errors import PreflightFailed, ShardUnreachable
from shardkit.core.topology import ShardedTable
from shardkit.rebalance import preflight
from shardkit.storage import membership, replication
from shardkit.storage.connections import Connection, ShardConnections
from tests.fix_shards import MakeShards, Shards

THINGS = ShardedTable("public", "things", "owner", "int")
PLAIN = (
    "CREATE TABLE public.things (owner int NOT NULL, id int NOT NULL, body text, PRIMARY KEY (owner, id));"
)
TRIGGER = """
CREATE FUNCTION public.act() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER "Audit" AFTER DELETE ON public.things FOR EACH ROW EXECUTE FUNCTION public.act();
"""


def reasons(shards: Shards) -> list[str]:
    """What the preflight of a move from s1 to s2 finds."""
    topology = shards.topology()
    with ShardConnections() as connections:
        try:
            preflight.check(topology, topology.named("s1"), topology.named("s2"), connections)
        except PreflightFailed as error:
            return list(error.fields["reasons"])
    return []


@pytest.fixture
def shards(make_shards: MakeShards) -> Iterator[Shards]:
    made = make_shards(2, tables=(THINGS,), schema=PLAIN + TRIGGER)
    assert reasons(made) == []
    yield made
    assert not made.topology().by_id[1].in_transit


def on_both(shards: Shards, statement: str) -> Connection:
    for name in ("s1", "s2"):
        shards.on(name).execute(statement)
    return shards.on("s1")


@pytest.mark.parametrize("name", ["s1", "s2"])
@pytest.mark.parametrize("how", ["ALWAYS", "REPLICA"])
def test_triggers_that_fire_for_copied_or_purged_rows(shards: Shards, name: str, how: str) -> None:
    shards.on(name).execute(f'ALTER TABLE public.things ENABLE {how} TRIGGER "Audit"')
    (reason,) = reasons(shards)
    assert f"trigger Audit of public.things on {name} fires" in reason


def test_rules_that_act_on_purged_rows(shards: Shards) -> None:
    shards.on("s1").execute("CREATE RULE keep AS ON DELETE TO public.things DO INSTEAD NOTHING")
    assert reasons(shards) == []
    shards.on("s1").execute("ALTER TABLE public.things ENABLE ALWAYS RULE keep")
    (reason,) = reasons(shards)
    assert "rule keep of public.things on s1 fires" in reason


@pytest.mark.parametrize(
    ("type_", "refused"),
    [
        ("oid", True),
        ("oid[]", True),
        ("public.lo", True),
        ("public.holder", True),
        ("regclass", True),
        ("bytea", False),
        ("public.fine", False),
    ],
)
def test_columns_that_name_what_only_this_server_has(shards: Shards, type_: str, refused: bool) -> None:
    on_both(
        shards,
        "CREATE DOMAIN public.lo AS oid; CREATE TYPE public.holder AS (a int, files public.lo[]);"
        "CREATE DOMAIN public.fine AS int CHECK (VALUE > 0);",
    )
    on_both(shards, f'ALTER TABLE public.things ADD COLUMN "The File" {type_}')
    found = reasons(shards)
    assert [
        text for text in found if "column public.things.The File is" in text and "large objects" in text
    ] == (found if refused else [])
    assert bool(found) is refused


DEFERRABLE = "ALTER TABLE public.things DROP CONSTRAINT things_pkey, ADD PRIMARY KEY (owner, id) DEFERRABLE;"


def test_a_deferrable_primary_key_identifies_no_row(shards: Shards) -> None:
    on_both(shards, DEFERRABLE)
    (reason,) = reasons(shards)
    assert "primary key of public.things is DEFERRABLE" in reason
    on_both(shards, "CREATE UNIQUE INDEX chosen ON public.things (owner, id)")
    on_both(shards, "ALTER TABLE public.things REPLICA IDENTITY USING INDEX chosen")
    assert reasons(shards) == []
    shards.on("s1").execute("INSERT INTO public.things SELECT g, g, 'x' FROM generate_series(1, 100) g")
    shards.move()
    shards.assert_clean()


def test_a_deferrable_primary_key_is_not_declared(make_shards: MakeShards) -> None:
    shards = make_shards(1, tables=(), schema=PLAIN + DEFERRABLE)
    with shards.writer() as (catalog, connections), pytest.raises(PreflightFailed, match="DEFERRABLE"):
        membership.declare(catalog, connections, [THINGS])


def test_a_partition_that_is_unlogged(make_shards: MakeShards) -> None:
    schema = """
    CREATE TABLE public.things (owner int NOT NULL, id int NOT NULL, PRIMARY KEY (owner, id)) PARTITION BY RANGE (id);
    CREATE UNLOGGED TABLE public."Part 1" PARTITION OF public.things DEFAULT;
    """
    made = make_shards(2, tables=(THINGS,), schema=schema)
    found = reasons(made)
    assert [text.split(" is unlogged")[0] for text in found] == [
        f'public."Part 1" of table public.things on {name}' for name in ("s1", "s2")
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "last", "reason"),
    [
        ("MAXVALUE 32767", "MAXVALUE 32767", 32767, "no number left beyond 32767"),
        ("", "MAXVALUE 100", 100, "no number left beyond 100"),
        ("INCREMENT -1 MINVALUE -50", "INCREMENT -1 MINVALUE -50", -50, "no number left beyond -50"),
        ("INCREMENT -1", "", -5, "counts up on one side and down on the other"),
        ("MAXVALUE 32767", "MAXVALUE 32767", 32760, None),
        ("MAXVALUE 10 CYCLE", "MAXVALUE 10 CYCLE", 10, None),
    ],
)
def test_sequences_that_cannot_go_on_on_the_target(
    shards: Shards, ours: str, theirs: str, last: int, reason: str | None
) -> None:
    for name, options in (("s1", ours), ("s2", theirs)):
        shards.on(name).execute(sql.SQL("CREATE SEQUENCE public.numbers {}").format(sql.SQL(options)))
    on_both(shards, "ALTER TABLE public.things ALTER COLUMN id SET DEFAULT nextval('public.numbers')")
    shards.on("s1").execute("SELECT setval('public.numbers', %s)", (last,))
    found = reasons(shards)
    assert [text for text in found if "public.numbers" in text and reason and reason in text] == found
    assert bool(found) is bool(reason)


def test_a_server_that_cannot_reach_the_other(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody begins such a move; one that is under way waits."""
    monkeypatch.setattr(replication, "peer_conninfo", lambda _: "host=/nowhere")
    assert [reason for reason in reasons(shards) if "the server of s2 cannot connect to s1" in reason]
    topology = shards.topology()
    with ShardConnections() as connections:
        source, target = topology.named("s1"), topology.named("s2")
        with pytest.raises(ShardUnreachable, match="The server of s2 cannot connect to s1"):
            preflight.check(topology, source, target, connections, in_force=True)
        monkeypatch.setattr(replication, "peer_conninfo", lambda _: "nonsense=1")
        with pytest.raises(PreflightFailed, match="nonsense"):  # what the server refuses does not pass by itself
            preflight.check(topology, source, target, connections, in_force=True)
        monkeypatch.setattr(replication, "peer_conninfo", lambda _: "host=/nowhere")
        # With such a reason it is one more.
        shards.on("s2").execute("ALTER TABLE public.things ADD COLUMN extra int")
        with pytest.raises(PreflightFailed, match="cannot connect to s1"):
            preflight.check(topology, source, target, connections, in_force=True)
