"""A catalog with shards on real servers, driven below the ORM: what tests of storage and mover stand on."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql

from shardkit.core.move import Mode
from shardkit.core.ring import position
from shardkit.core.topology import ShardedTable, Topology
from shardkit.dev import Cluster
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage import fence, membership
from shardkit.storage.catalog import Catalog, Job
from shardkit.storage.connections import Connection, ShardConnections, connect, value
from shardkit.storage.predicate import within
from tests.fix_postgres import FreshDatabase

SCHEMA = """
CREATE TABLE public.users (id bigint PRIMARY KEY, name text NOT NULL, n integer NOT NULL DEFAULT 0);
CREATE TABLE public.posts (
    user_id bigint NOT NULL REFERENCES public.users (id),
    id bigint NOT NULL,
    body text,
    PRIMARY KEY (user_id, id)
);
"""
TABLES = (ShardedTable("public", "posts", "user_id", "int"), ShardedTable("public", "users", "id", "int"))

LEFTOVERS = {
    "slots": "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()",
    "publications": "SELECT pubname FROM pg_publication",
    "subscriptions": "SELECT subname FROM pg_subscription "
    "WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())",
    "triggers": "SELECT tgname FROM pg_trigger WHERE tgname ~ 'shardkit'",
    "functions": "SELECT proname FROM pg_proc "
    "WHERE pronamespace = 'shardkit'::regnamespace AND proname ~ '^(note|stand)_'",
    "moved": "SELECT transfer_id FROM shardkit.moved",
    "markers": "SELECT relname FROM pg_class "
    "WHERE relnamespace = 'shardkit'::regnamespace AND relname ~ '^mov[a-z]+_[0-9]'",
    "changed": "SELECT key FROM shardkit.changed",
    "opened": "SELECT transfer_id FROM shardkit.opened",
    "identities": "SELECT relation FROM shardkit.replica_identity",
    "indexes": "SELECT relname FROM pg_class WHERE relname ~ '^shardkit_'",
    "set aside": "SELECT name FROM shardkit.set_aside",
    "unfinished": "SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid",
    "locks": "SELECT relation::regclass FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
    "WHERE c.relname ~ '^fence_' AND c.relnamespace = 'shardkit'::regnamespace AND l.pid <> pg_backend_pid()",
}


@dataclass
class Shards:
    """A cluster under test: its catalog, and ways to look at it that go round everything."""

    catalog_url: str
    fresh_database: FreshDatabase
    tables: Sequence[ShardedTable] = TABLES
    schema: str = SCHEMA
    _open: dict[str, Connection] = field(default_factory=dict)

    def add(self, name: str, server: int | Cluster | str) -> Topology:
        """One more shard, on a new database of a server, or the one of a URL; it owns nothing yet unless it is the
        first."""
        if isinstance(server, int):
            url = self.fresh_database(server)
        elif isinstance(server, str):
            url = server
        else:
            url = server.create_database("app")
            url = server.url("app", tcp=True) if server.tcp else url
        self._open[name] = connect(url)
        self._open[name].execute(self.schema)
        with self.writer() as (catalog, shards):
            membership.join(catalog, shards, name=name, url=url)
            return membership.declare(catalog, shards, self.tables)

    def writer(self) -> Any:
        """`(Catalog, ShardConnections)` with the lease, for changes."""
        return _Writer(self.catalog_url)

    def topology(self) -> Topology:
        """The topology in force."""
        with Catalog.open(self.catalog_url) as catalog:
            found = catalog.current()
        assert found is not None
        return found

    def on(self, name: str) -> Connection:
        """A connection to a shard, unguarded."""
        if self._lost(name):
            self._open[name] = connect(self.topology().named(name).url)
        return self._open[name]

    def _lost(self, name: str) -> bool:
        """Whether there is no connection: its server may have been killed, or a command may have added the shard."""
        if name not in self._open:
            return True
        try:
            self._open[name].execute("SELECT 1")
        except psycopg.OperationalError:
            self._open[name].close()
            return True
        return False

    def move(self, mode: Mode = Mode.AUTO, *, keep_source: bool = False, **options: Any) -> Job:
        """Make a job and carry it out."""
        with Mover(self.catalog_url, **{"patience": 30.0, **options}) as mover:
            mover.start("rebalance", mode=mode, keep_source=keep_source)
            return mover.run()

    def rollback(self, **options: Any) -> Job:
        """Bring the arcs of the kept job back."""
        with Mover(self.catalog_url, **{"patience": 30.0, **options}) as mover:
            return mover.rollback()

    def finalize(self, **options: Any) -> Job:
        """Let the sources of the kept job go."""
        with Mover(self.catalog_url, **{"patience": 30.0, **options}) as mover:
            return mover.finalize()

    def resume(self, **options: Any) -> Job:
        """Carry the unfinished job to its end."""
        with Mover(self.catalog_url, **{"patience": 30.0, **options}) as mover:
            return mover.run()

    def rows(self, table: ShardedTable) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of a table, by shard, owned or not."""
        query = sql.SQL("SELECT * FROM {} ORDER BY 1, 2").format(sql.Identifier(table.schema, table.name))
        return {name: self.on(name).execute(query).fetchall() for name in self._open}

    def assert_clean(self) -> None:
        """Every row is on its owner, nothing of a move is left, catalog and shards agree."""
        topology = self.topology()
        for shard in topology.shards:
            connection = self.on(shard.name)
            assert not shard.in_transit
            assert shard.fence.relation in fence.relations(connection)
            assert value(connection, "SELECT version FROM shardkit.topology") <= topology.version
            for table in self.tables:
                strays = sql.SQL("SELECT count(*) FROM {} WHERE NOT {}").format(
                    sql.Identifier(table.schema, table.name), within(table, topology.owned(shard.id))
                )
                assert value(connection, strays) == 0, f"{shard.name} holds rows of {table} it does not own"
            left = {what: connection.execute(query).fetchall() for what, query in LEFTOVERS.items()}
            assert not any(left.values()), f"{shard.name}: {left}"
        with Catalog.open(self.catalog_url) as catalog:
            assert catalog.proposed() is None
            assert catalog.running_job() is None


class _Writer:
    def __init__(self, url: str) -> None:
        self._catalog = Catalog.open(url)
        self._shards = ShardConnections()

    def __enter__(self) -> tuple[Catalog, ShardConnections]:
        try:
            self._catalog.take_lease()
        except BaseException:
            self.__exit__()
            raise
        return self._catalog, self._shards

    def __exit__(self, *exc: object) -> None:
        self._shards.__exit__(*exc)
        self._catalog.__exit__(*exc)


MakeShards = Callable[..., Shards]


@pytest.fixture
def make_shards(fresh_database: FreshDatabase, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeShards]:
    """`make_shards(2, schema=..., tables=...) -> Shards`: that many shards, s1 owning everything."""
    monkeypatch.setenv(ALLOW_FSYNC_OFF, "1")
    made: list[Shards] = []

    def make(number: int, catalog_server: Cluster | None = None, **options: Any) -> Shards:
        catalog_url = catalog_server.create_database("catalog") if catalog_server else fresh_database(0)
        membership.initialise(catalog_url)
        shards = Shards(catalog_url, fresh_database, **options)
        made.append(shards)
        for index in range(number):
            shards.add(f"s{index + 1}", index % 3)
        return shards

    yield make
    for shards in made:
        for connection in shards._open.values():
            connection.close()


def fill(connection: Connection, users: int, posts: int = 2) -> None:
    """Users 1 to ``users`` with some posts each, and statistics."""
    connection.execute(
        "INSERT INTO public.users SELECT g, 'user ' || g FROM generate_series(1, %s) g", (users,)
    )
    connection.execute(
        "INSERT INTO public.posts SELECT g, i, repeat('x', 50) FROM generate_series(1, %s) g, generate_series(1, %s) i",
        (users, posts),
    )
    connection.execute("ANALYZE")


class FencedWriter(threading.Thread):
    """An application in miniature: increments, inserts and deletes behind the fence, and remembers what was
    acknowledged. It owns the users whose id is ``number`` modulo ``of``, so it knows their every state."""

    def __init__(
        self, shards: Shards, number: int, of: int, users: int, isolation: str = "READ COMMITTED"
    ) -> None:
        super().__init__(name=f"writer {number}")
        self._shards = shards
        self._topology = shards.topology()
        self._isolation = isolation
        self._random = random.Random(number)
        self.users = [user for user in range(1, users + 1) if user % of == number]
        self.counts = dict.fromkeys(self.users, 0)
        self.posts: dict[tuple[int, int], str] = {}
        self.gone: set[tuple[int, int]] = set()
        self.done = 0
        self.refused = 0
        self.errors: list[BaseException] = []
        self.ending = threading.Event()
        self._open: dict[int, Connection] = {}

    def run(self) -> None:
        try:
            while not self.ending.is_set():
                self._work(self._random.choice(self.users))
                self.done += 1
        except BaseException as error:
            self.errors.append(error)
        finally:
            for connection in self._open.values():
                connection.close()

    def _work(self, user: int) -> None:
        while True:
            shard = self._topology.by_id[self._topology.ring.owner(user)]
            if shard.id not in self._open:
                self._open[shard.id] = connect(shard.url, application="writer")
            connection = self._open[shard.id]
            try:
                connection.execute(
                    sql.SQL("BEGIN ISOLATION LEVEL {}; LOCK TABLE {} IN ACCESS SHARE MODE").format(
                        sql.SQL(self._isolation), sql.Identifier("shardkit", shard.fence.relation)
                    )
                )
            except psycopg.errors.UndefinedTable:
                connection.execute("ROLLBACK")
                self.refused += 1
                self._refresh(connection)
                continue
            try:
                self._write(connection, user)
            except psycopg.errors.SerializationFailure:
                if self._isolation != "SERIALIZABLE":
                    raise
                connection.execute("ROLLBACK")
                continue
            return

    def _refresh(self, connection: Connection) -> None:
        document = value(connection, "SELECT document FROM shardkit.topology ORDER BY version DESC LIMIT 1")
        copy = Topology.from_json(document)
        if copy.version > self._topology.version:
            self._topology = copy

    def _write(self, connection: Connection, user: int) -> None:
        post = (user, self._random.randrange(10, 30))
        text = f"{self.done}"
        updated = connection.execute("UPDATE public.users SET n = n + 1 WHERE id = %s", (user,)).rowcount
        assert updated == 1, f"user {user} is not on its owner"
        delete = post in self.posts and self._random.random() < 0.4
        if delete:
            assert (
                connection.execute("DELETE FROM public.posts WHERE user_id = %s AND id = %s", post).rowcount
                == 1
            )
        else:
            connection.execute(
                "INSERT INTO public.posts VALUES (%s, %s, %s) "
                "ON CONFLICT (user_id, id) DO UPDATE SET body = excluded.body",
                (*post, text),
            )
        connection.execute("COMMIT")
        self.counts[user] += 1
        if delete:
            del self.posts[post]
        else:
            self.posts[post] = text

    def check(self) -> None:
        """Compare every acknowledged write with what the shards hold."""
        assert not self.errors, self.errors
        users = [row for rows in self._shards.rows(TABLES[1]).values() for row in rows]
        posts = [row for rows in self._shards.rows(TABLES[0]).values() for row in rows]
        assert len({row[0] for row in users}) == len(users), "a user is there twice"
        held = {row[0]: row[2] for row in users}
        assert {user: held.get(user) for user in self.users} == self.counts
        mine = {(row[0], row[1]): row[2] for row in posts if row[0] in self.counts and row[1] >= 10}
        assert mine == self.posts
        assert len({row[:2] for row in posts}) == len(posts), "a post is there twice"


def owner_of(topology: Topology, key: int | str) -> str:
    """Name of the shard that owns a key."""
    return topology.by_id[topology.ring.owner_at(position(key))].name
