"""Every bad input that a command can meet: a clear error, the next step, an exit code, and nothing half done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from psycopg import sql

from shardkit.dev import Clusters
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage import membership, servers
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections, connect, value
from tests.acceptance.conftest import Program, contents
from tests.fix_postgres import FreshDatabase, NewCluster
from tests.fix_shards import SCHEMA, TABLES, MakeShards, Shards, fill

NOBODY = "postgresql://postgres@127.0.0.1:1/nothing"


@pytest.fixture
def one(make_shards: MakeShards, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """A catalog, which is in the environment, with one shard that holds rows."""
    shards = make_shards(1)
    fill(shards.on("s1"), 50)
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    return shards


@pytest.fixture
def newcomer(fresh_database: FreshDatabase) -> str:
    """A database with the tables of the shards, empty."""
    url = fresh_database(1)
    with connect(url) as connection:
        connection.execute(SCHEMA)
    return url


@contextmanager
def untouched(*urls: str) -> Iterator[None]:
    """Nothing in these databases may change."""
    before = [contents(url) for url in urls]
    yield
    assert [contents(url) for url in urls] == before


def change(url: str, statement: str) -> None:
    with connect(url) as connection:
        connection.execute(statement)


# --- a shard that cannot be added -----------------------------------------------------------------------------------

DRIFT: dict[str, tuple[str, str]] = {
    "a missing table": ("DROP TABLE public.posts", "table public.posts is missing on the target"),
    "another type": (
        "ALTER TABLE public.posts ALTER body TYPE varchar(5)",
        "column public.posts.body differs: text on the source, character varying(5) on the target",
    ),
    "a missing column": (
        "ALTER TABLE public.users DROP name",
        "column public.users.name is missing on the target",
    ),
    "another index": (
        "CREATE INDEX ON public.users (name)",
        "index of public.users is missing on the source",
    ),
    "another constraint": (
        "ALTER TABLE public.users ADD CHECK (n >= 0)",
        "constraint of public.users is missing",
    ),
}


@pytest.mark.parametrize("case", DRIFT)
def test_a_schema_that_differs(one: Shards, newcomer: str, call: Program, case: str) -> None:
    statement, reason = DRIFT[case]
    change(newcomer, statement)
    with untouched(one.catalog_url, newcomer):
        call("shard", "add", "s2", newcomer, "--yes").failed(3, reason, "Create the same tables there first")


def test_rows_in_its_tables(one: Shards, newcomer: str, call: Program) -> None:
    change(newcomer, "INSERT INTO public.users VALUES (7, 'seven')")
    with untouched(one.catalog_url, newcomer):
        refused = call("shard", "add", "s2", newcomer, "--yes", "--json")
        refused.failed(3, "Table public.users on the new shard s2 has rows already")
    assert refused.document == {
        "error": "shard-not-empty",
        "message": "Table public.users on the new shard s2 has rows already.",
        "hint": refused.document["hint"],
        "retryable": False,
        "exit_code": 3,
        "table": "public.users",
    }


def test_a_name_used_twice(one: Shards, newcomer: str, program: Program) -> None:
    with untouched(one.catalog_url, newcomer):
        program("shard", "add", "s1", newcomer, "--yes").failed(3, "A shard named 's1' exists already")


def test_a_database_that_is_a_shard_already(
    one: Shards, newcomer: str, call: Program, fresh_database: FreshDatabase
) -> None:
    other = fresh_database(0)
    membership.initialise(other)
    with Catalog.open(other) as catalog, ShardConnections() as shards:
        catalog.take_lease()
        membership.join(catalog, shards, name="theirs", url=newcomer)
        cluster = str(catalog.cluster_id())
    with untouched(one.catalog_url, newcomer):
        call("shard", "add", "s2", newcomer, "--yes").failed(3, "shard 'theirs' of another catalog", cluster)
    mine = one.topology().named("s1").url
    with untouched(one.catalog_url, mine):
        call("shard", "add", "s2", mine, "--yes").failed(3, "a shard of this catalog already, named 's1'")


def test_a_server_that_does_not_answer(one: Shards, newcomer: str, program: Program) -> None:
    with untouched(one.catalog_url):
        program("shard", "add", "s2", NOBODY, "--yes").failed(
            5, "Shard s2 at postgresql://postgres@127.0.0.1:1/nothing", "Check the server and the URL"
        )
    program("status", "--catalog", NOBODY).failed(
        5, "The catalog at postgresql://postgres@127.0.0.1:1/nothing"
    )


def test_a_database_that_lets_nobody_in(
    one: Shards, newcomer: str, call: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = newcomer.replace("/fresh_", "/never_")
    nobody = newcomer.replace("postgres@", "nobody@")
    with untouched(one.catalog_url):
        call("shard", "add", "s2", missing, "--yes").failed(3, "does not exist", "has to be created")
    call("init", "--catalog", missing).failed(3, "The catalog at", "does not exist", "has to be created")
    monkeypatch.setenv("PGPASSWORD", "wrong")
    for url in (newcomer, nobody):
        refused = call("shard", "add", "s2", url, "--yes").failed(3, "authentication failed", "PGPASSFILE")
    assert "does not answer" not in refused.err
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", "/nowhere")
    call("status").failed(3, "no password supplied", "PGPASSFILE")


def test_logical_moves_from_a_server_below_wal_level_logical(
    call: Program, new_cluster: NewCluster, fresh_database: FreshDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_FSYNC_OFF, "1")
    catalog = fresh_database(0)
    monkeypatch.setenv("SHARDKIT_CATALOG", catalog)
    membership.initialise(catalog)
    server = new_cluster(settings={"wal_level": "replica"})
    plain, other = server.create_database("app"), fresh_database(1)
    for url in (plain, other):
        change(url, SCHEMA)
    call("shard", "add", "s1", plain).ok()
    with Catalog.open(catalog) as opened, ShardConnections() as shards:
        opened.take_lease()
        membership.declare(opened, shards, TABLES)
    with untouched(catalog, other):
        call("shard", "add", "s2", other, "--mode", "logical", "--yes").failed(
            3, "wal_level is not logical", "ALTER SYSTEM SET wal_level", "--mode locked"
        )
    shown = call("shard", "add", "s2", other, "--plan-only").ok()
    assert "rows leave shard s1 in locked steps, as its wal_level is not logical" in " ".join(
        shown.out.split()
    )
    moved = call("shard", "add", "s2", other, "--yes", "--json").ok().document
    assert [transfer["phase"] for transfer in moved["job"]["transfers"]] == ["done"]


def test_a_server_that_is_too_old(
    one: Shards, newcomer: str, call: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The servers at hand are new, so the bar is raised above them.
    monkeypatch.setattr(servers, "MINIMUM_VERSION", 990000)
    with untouched(one.catalog_url, newcomer):
        call("shard", "add", "s2", newcomer, "--yes").failed(3, "it runs PostgreSQL", "15 or newer is needed")


def test_a_server_without_room_for_replication(one: Shards, call: Program, new_cluster: NewCluster) -> None:
    server = new_cluster(settings={"max_logical_replication_workers": 1})
    url = server.create_database("app")
    change(url, SCHEMA)
    with untouched(one.catalog_url, url):
        call("shard", "add", "s2", url, "--yes").failed(
            3, "1 logical replication workers are free and 2 are needed"
        )
    shown = call("shard", "add", "s2", url, "--plan-only").ok()
    assert "In the way: shard s2: 1 logical replication workers" in shown.out


def test_another_shard_that_is_down(
    one: Shards, newcomer: str, call: Program, new_cluster: NewCluster
) -> None:
    server = new_cluster()
    url = server.create_database("app")
    change(url, SCHEMA)
    call("shard", "add", "s2", url, "--no-run").ok()
    server.stop()
    with untouched(one.catalog_url, newcomer):
        call("shard", "add", "s3", newcomer, "--yes").failed(5, "Shard s2 at ")
    seen = call("status", "--json").ok().document
    assert [(shard["name"], shard["reachable"]) for shard in seen["shards"]] == [("s1", True), ("s2", False)]
    assert "does not answer" in seen["shards"][1]["error"]
    ill = call("doctor", "--json")
    assert ill.code == 3
    found = [finding for finding in ill.document["findings"] if finding["level"] == "problem"]
    assert [(finding["subject"], finding["check"]) for finding in found] == [("s2", "reachable")]
    assert found[0]["next"]


def test_no_table_is_declared(call: Program, make_shards: MakeShards, newcomer: str) -> None:
    shards = make_shards(1, tables=())
    with untouched(shards.catalog_url, newcomer):
        refused = call("shard", "add", "s2", newcomer, "--yes", "--catalog", shards.catalog_url)
        refused.failed(3, "no table is declared", "shardkit schema declare MODULE:ATTR")


def test_models_that_differ_from_the_tables(
    one: Shards, call: Program, folder: Path, fresh_database: FreshDatabase
) -> None:
    # The models have columns of their own; what was created for the look must be gone again.
    url = fresh_database(1)
    with untouched(one.catalog_url, url):
        call("shard", "add", "s2", url, "--models", "models:Base", "--yes").failed(
            3, "column public.users.n is missing"
        )


def test_a_refusal_after_the_tables_were_tried(
    call: Program, catalog: str, fresh_database: FreshDatabase
) -> None:
    first, url = fresh_database(0), fresh_database(1)
    call("init").ok()
    call("shard", "add", "s1", first, "--models", "models:Base").ok()
    call("schema", "declare", "models:Base").ok()
    with untouched(catalog, url):
        call("shard", "add", "s2", url, "--models", "models:Base").failed(2, "stdin is no terminal")
        call("shard", "add", "s2", url, "--models", "models:Base", "--plan-only").ok()


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("a b", "URL"), "Not a shard name: 'a b'"),
    (("", "URL"), "Not a shard name: ''"),
    (("s2", "mysql://root@localhost/app"), "Not a PostgreSQL URL"),
    (("s2", "localhost"), "no database URL"),
    (("s2", "postgresql://localhost"), "names no database"),
    (("s2", "postgresql://localhost/app?flavour=blue"), "flavour"),
    (("s2", "URL", "--weight", "-1"), "--weight"),
    (("s2", "URL", "--weight", "heavy"), "--weight"),
    (("s2", "URL", "--plan-only", "--no-run"), "exclude each other"),
    (("s2", "URL", "--models", "models"), "Not a name of models"),
    (("s2", "URL", "--models", "no_such_module:Base"), "no_such_module cannot be imported"),
    (("s2", "URL", "--models", "models:User.id"), "no declarative base"),
    (("s2",), "URL"),
]


def test_a_command_line_that_is_wrong(one: Shards, newcomer: str, call: Program) -> None:
    with untouched(one.catalog_url, newcomer):
        for arguments, reason in WRONG:
            given = [newcomer if argument == "URL" else argument for argument in arguments]
            # Typer names the argument in small or capital letters, by version.
            assert reason.lower() in call("shard", "add", *given, "--yes").failed(2).err.lower()


def test_the_help_of_the_command_is_named(call: Program, folder: Path) -> None:
    call("demo", "--json", str(folder)).failed(2, "cannot be written", "See `shardkit demo --help`.")
    call("shard", "add", "--catalog", NOBODY, "s2").failed(2, "See `shardkit shard add --help`.")


# --- passwords ------------------------------------------------------------------------------------------------------


def test_a_password_is_neither_used_nor_kept_nor_shown(
    one: Shards, newcomer: str, call: Program, servers: Clusters
) -> None:
    secret = "open sesame"
    url = newcomer.replace("postgres@", "postgres:open%20sesame@") + "&password=open%20sesame"
    added = call("shard", "add", "s2", url, "--no-run").ok()
    assert "the password in the URL is not used and not stored" in added.err
    told = [added]
    told += [call(*words, "--json") for words in (["status"], ["shard", "list"], ["doctor"])]
    told.append(
        call("status", "--catalog", f"postgresql://postgres:{secret}@127.0.0.1:1/x?password={secret}")
    )
    told.append(call("init", "--catalog", f"postgresql://postgres:{secret}@[bad/x"))
    for outcome in told:
        assert "sesame" not in outcome.out + outcome.err
    for held in (contents(one.catalog_url), contents(newcomer)):
        assert "sesame" not in str(held)


# --- other commands -------------------------------------------------------------------------------------------------


def test_no_catalog(call: Program, fresh_database: FreshDatabase) -> None:
    empty = fresh_database(0)
    with untouched(empty):
        for words in (
            ["status"],
            ["shard", "list"],
            ["rebalance", "run", "--yes"],
            ["doctor"],
            ["route", "1"],
        ):
            call(*words, "--catalog", empty).failed(3, "holds no shardkit catalog", "shardkit init")
    call("status").failed(2, "--catalog", "SHARDKIT_CATALOG")
    call("init", "--catalog", NOBODY).failed(5, "does not answer")


def test_no_shard_yet(call: Program, catalog: str) -> None:
    call("init").ok()
    for words in (["route", "1"], ["rebalance", "plan"], ["schema", "declare", "models:Base"]):
        call(*words).failed(3, "no shard yet", "shardkit shard add NAME URL")
    assert call("status", "--json").ok().document["shards"] == []
    assert call("doctor").ok().out.endswith("Healthy.\n")


def test_a_role_without_rights(call: Program, fresh_database: FreshDatabase, servers: Clusters) -> None:
    url = fresh_database(0)
    role = sql.Identifier("weak")
    with connect(url) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, servers[0].password))
    try:
        with untouched(url):
            weak = url.replace("postgres@", f"weak:{servers[0].password}@")
            refused = call("init", "--catalog", weak)
            refused.failed(3, "The database role may not do this: permission denied for database")
            assert servers[0].password not in refused.err
    finally:
        change(url, "DROP ROLE weak")


MODELS: dict[str, tuple[list[str], str]] = {
    "nullable key": (
        [
            "user_id: Mapped[int | None] = mapped_column(BigInteger)",
            "id: Mapped[UUID] = mapped_column(primary_key=True)",
        ],
        "can be NULL",
    ),
    "key that cannot be hashed": (
        ["user_id: Mapped[Decimal] = mapped_column(Numeric, primary_key=True)"],
        "cannot be hashed",
    ),
    "primary key without the key": (
        [
            "user_id: Mapped[int] = mapped_column(BigInteger)",
            "id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)",
        ],
        "can be equal on two shards",
    ),
    "serial": (["user_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)"], "is a serial"),
}


def test_a_declaration_that_cannot_work(one: Shards, call: Program, folder: Path) -> None:
    with untouched(one.catalog_url, one.topology().named("s1").url):
        for case, (columns, reason) in MODELS.items():
            module = f"bad_{case.replace(' ', '_')}"
            (folder / f"{module}.py").write_text(
                "from decimal import Decimal\nfrom uuid import UUID\n"
                "from sqlalchemy import BigInteger, Numeric\n"
                "from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column\n"
                "from shardkit import sharded\n"
                "class Base(DeclarativeBase):\n    pass\n"
                "@sharded(by='user_id')\n"
                "class Bad(Base):\n    __tablename__ = 'bad'\n"
                + "".join(f"    {column}\n" for column in columns)
            )
            call("schema", "declare", f"{module}:Base", "--create").failed(2, reason)


def test_a_table_that_cannot_be_declared(call: Program, make_shards: MakeShards) -> None:
    shards = make_shards(2, tables=())
    urls = [shard.url for shard in shards.topology().shards]
    environment = {"SHARDKIT_CATALOG": shards.catalog_url}
    change(urls[1], "DROP TABLE public.posts")
    with untouched(shards.catalog_url, *urls):
        call("schema", "declare", "models:Base", **environment).failed(
            3, "shard s2: table public.posts is missing"
        )
    # Made on the second shard from the models, posts would still differ from those of the first.
    with untouched(shards.catalog_url, *urls):
        refused = call("schema", "declare", "models:Base", "--create", **environment)
        refused.failed(3, "shard s2: column public.posts.body differs")
    for url in urls:
        change(url, "DROP TABLE IF EXISTS public.posts; DROP TABLE public.users")
    done = call("schema", "declare", "models:Base", "--create", "--json", **environment).ok().document
    assert [table["name"] for table in done["tables"] if table["new"]] == ["posts", "users"]
    assert [value(shards.on(name), "SELECT count(*) FROM public.posts") for name in ("s1", "s2")] == [0, 0]


def test_rows_on_two_shards_before_the_declaration(call: Program, make_shards: MakeShards) -> None:
    shards = make_shards(2, tables=())
    shards.on("s2").execute("INSERT INTO public.users VALUES (1, 'one')")
    change(shards.topology().named("s1").url, "ALTER TABLE public.users DROP n")
    change(shards.topology().named("s2").url, "ALTER TABLE public.users DROP n")
    with untouched(shards.catalog_url):
        refused = call("schema", "declare", "models:Base", "--catalog", shards.catalog_url)
        refused.failed(3, "Table public.users on shard s2 has rows already")


def test_a_key_that_cannot_be_hashed(one: Shards, call: Program) -> None:
    cases: list[tuple[tuple[str, ...], str]] = [
        (("9223372036854775808",), "64"),
        (("--type", "int", "5.7"), "'5.7' is no int"),
        (("--type", "int", ""), "'' is no int"),
        (("--type", "uuid", "42"), "'42' is no uuid"),
        (("--type", "float", "5.7"), "float"),
        ((), "key"),
    ]
    for arguments, reason in cases:
        assert reason in call("route", *arguments).failed(2).err.lower()


def test_a_key_of_another_type_than_the_tables(one: Shards, call: Program) -> None:
    identity = "00112233-4455-6677-8899-aabbccddeeff"
    for key, family in (("None", "text"), ("5.7", "text"), ("", "text"), (" 5", "text"), (identity, "uuid")):
        refused = call("route", key).failed(2, f"{key!r} is no key of a declared table: their keys are int.")
        assert f"`--type {family}`" in refused.err
        routed = call("route", key, "--type", family, "--json").ok()
        assert routed.document["type"] == family
        assert f"No declared table has a key of type {family}; there are: int." in routed.err
    assert call("route", "-5", "--json").ok().document["type"] == "int"
    assert call("route", "5", "--type", "text", "--json").ok().document["type_guessed"] is False


def test_tables_that_cannot_be_created(
    call: Program, catalog: str, folder: Path, fresh_database: FreshDatabase
) -> None:
    url = fresh_database(0)
    call("init").ok()
    text = (
        (folder / "models.py")
        .read_text()
        .replace("__tablename__", '__table_args__ = {"schema": "gone"}\n    __tablename__')
    )
    (folder / "elsewhere.py").write_text(text.replace("users.id", "gone.users.id"))
    with untouched(catalog, url):
        refused = call("shard", "add", "s1", url, "--models", "elsewhere:Base")
        refused.failed(3, "The tables cannot be created in", 'schema "gone" does not exist')


def test_a_catalog_of_a_newer_version(call: Program, catalog: str) -> None:
    call("init").ok()
    change(catalog, "UPDATE shardkit.alembic_version SET version_num = 'catalog_9999'")
    with untouched(catalog):
        call("init").failed(3, "another version of shardkit", "newer")


def test_a_lease_that_is_held(one: Shards, newcomer: str, call: Program) -> None:
    with one.writer(), untouched(one.catalog_url, newcomer):
        call("shard", "add", "s2", newcomer, "--yes").failed(5, "Another mover is at work")
        call("schema", "declare", "models:Base").failed(5, "Another mover is at work")
        call("rebalance", "resume").failed(5, "Another mover is at work")


def test_a_catalog_that_goes_away(
    call: Program, new_cluster: NewCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_cluster()
    url = server.create_database("catalog")
    call("init", "--catalog", url).ok()

    def stopped(self: Catalog) -> None:
        server.stop()
        self.connection.execute("SELECT 1")

    monkeypatch.setattr(Catalog, "latest_job", stopped)
    call("rebalance", "status", "--catalog", url).failed(
        5, "The server ended this statement or is shutting down"
    )


def test_what_nobody_expects(one: Shards, call: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Catalog) -> None:
        raise ZeroDivisionError("postgresql://me:sesame@host/x password='open sesame'")

    monkeypatch.setattr(Catalog, "latest_job", broken)
    outcome = call("rebalance", "status", "--json")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "error: ZeroDivisionError: postgresql://me:***@host/x" in outcome.err
    assert "sesame" not in outcome.out + outcome.err
    assert outcome.document["error"] == "unexpected"


def test_a_url_of_several_hosts_that_nobody_can_read(one: Shards, call: Program) -> None:
    mixed = "postgresql://postgres@/app?host=one&port=5432&host=two"
    with untouched(one.catalog_url):
        call("shard", "add", "s2", mixed, "--yes").failed(2, "The URL cannot be understood", "Several hosts")
