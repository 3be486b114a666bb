"""Changes of the topology on real shards: one at a time, decided by one commit, settled whatever was interrupted."""

from __future__ import annotations

import signal
from contextlib import suppress
from uuid import uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from shardkit.core.errors import (
    AlreadyShard,
    DeclarationError,
    IncompatibleServer,
    JobRunning,
    LeaseHeld,
    MoverSuperseded,
    MoveWaiting,
    NameTaken,
    NotInitialised,
    PreflightFailed,
    ShardBehind,
    ShardNotEmpty,
    ShardUnreachable,
)
from shardkit.core.keyrange import ArcSet, slot_arc
from shardkit.core.topology import ShardedTable, Topology
from shardkit.rebalance.mover import Mover
from shardkit.storage import change, fence, idsplit, membership, migrate, replicas, servers
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, connect, value
from tests.fix_postgres import FreshDatabase
from tests.fix_shards import SCHEMA, TABLES, MakeShards, Shards, fill
from tests.movers import run_forked
from tests.sharded import until

ARCS = ArcSet([slot_arc(0, 100)])


def mark(current: Topology | None, version: int) -> Topology:
    assert current is not None
    return current.marked(version, 1, ARCS)


def test_a_closing_change_renames_and_an_opening_one_adds(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    with shards.writer() as (catalog, connections):
        marked = change.apply(catalog, connections, mark)
        assert fence.relations(shards.on("s2")) == {marked.by_id[1].fence.relation}
        unmarked = change.apply(
            catalog, connections, lambda now, v: now.unmarked(v, 1, ARCS) if now else mark(now, v)
        )
        both = {marked.by_id[1].fence.relation, unmarked.by_id[1].fence.relation}
        assert fence.relations(shards.on("s2")) == both
        change.drain(catalog, connections)
        assert fence.relations(shards.on("s2")) == {unmarked.by_id[1].fence.relation}
        assert catalog.current() == unmarked
        assert value(shards.on("s2"), "SELECT version FROM shardkit.topology") == unmarked.version


def test_whoever_waits_behind_a_closing_change_is_refused_by_name(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    old = shards.topology().by_id[1].fence
    with shards.writer() as (catalog, connections):
        change.apply(catalog, connections, mark)
    with pytest.raises(psycopg.errors.UndefinedTable), shards.on("s2").transaction():
        fence.guard(shards.on("s2"), old)


def test_a_closing_change_that_gets_no_lock_names_the_holder_and_changes_nothing(
    make_shards: MakeShards,
) -> None:
    shards = make_shards(2)
    before = shards.topology()
    with connect(before.named("s2").url, application="report") as holder, holder.transaction():
        fence.guard(holder, before.by_id[1].fence)
        with shards.writer() as (catalog, connections):
            with pytest.raises(MoveWaiting, match="report"):
                change.apply(catalog, connections, mark, patience=0.3)
            assert catalog.proposed() is None
            assert catalog.current() == before
            abandoned = catalog.next_version()
    assert abandoned == before.version + 2, "a number is never used twice"
    assert fence.relations(shards.on("s2")) == {before.by_id[1].fence.relation}


def test_a_prepared_transaction_that_holds_the_fence_is_named(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    before = shards.topology()
    gid = f"in doubt {uuid4().hex}"
    with connect(before.named("s2").url) as holder:
        holder.execute("BEGIN")
        fence.guard(holder, before.by_id[1].fence)
        holder.execute("INSERT INTO public.users VALUES (1, 'x')")
        holder.execute(f"PREPARE TRANSACTION '{gid}'")
        try:
            with shards.writer() as (catalog, connections), pytest.raises(MoveWaiting, match=gid):
                change.apply(catalog, connections, mark, patience=0.3)
        finally:
            holder.execute(f"ROLLBACK PREPARED '{gid}'")


def test_a_proposal_that_was_not_decided_is_discarded(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    before = shards.topology()
    with shards.writer() as (catalog, _):
        catalog.propose(mark(before, catalog.next_version()))
    with shards.writer() as (catalog, connections):
        change.settle(catalog, connections)
        assert catalog.proposed() is None
        assert catalog.current() == before


def test_a_proposal_that_was_decided_is_finished(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    with shards.writer() as (catalog, connections):
        marked = change.apply(catalog, connections, mark)
        proposal = marked.cut_over(catalog.next_version(), 0, 1, ARCS)
        catalog.propose(proposal)
        with connections.get(marked.by_id[0]).transaction():
            source = connections.get(marked.by_id[0])
            names = fence.relations(source)
            fence.lock_all(source, names)
            source.execute(fence.close(names, proposal, 0))
    with shards.writer() as (catalog, connections):
        change.settle(catalog, connections)
        assert catalog.current() == proposal
    assert proposal.by_id[1].fence.relation in fence.relations(shards.on("s2"))


def test_what_a_job_left_is_settled_by_its_mover_alone(make_shards: MakeShards) -> None:
    """Who knows nothing of jobs would open the target without what the way back needs."""
    shards = make_shards(2)
    fill(shards.on("s1"), 20)
    assert run_forked("keep", shards.catalog_url, "cutting over.before opening") == -signal.SIGKILL
    with shards.writer() as (catalog, connections):
        with pytest.raises(JobRunning):
            membership.declare(catalog, connections, [ShardedTable("public", "other", "id", "int")])
        with pytest.raises(JobRunning):
            replicas.remove(catalog, connections, "s1", "postgresql:///other")
        with pytest.raises(JobRunning):
            idsplit.split(catalog, connections)
        assert catalog.proposed() is not None
    shards.resume()
    shards.rollback()
    shards.assert_clean()


def _cut_over(current: Topology | None, version: int) -> Topology:
    assert current is not None
    return current.cut_over(version, 0, 1, ARCS)


def _standing_ready(shards: Shards) -> list[int]:
    """Processes of the second shard's server that hold a transaction open."""
    found = shards.on("s2").execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'"
    )
    return [pid for (pid,) in found]


def test_an_opening_ahead_shows_nothing_before_the_decision(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    seen: list[set[str]] = []

    def look(_: object) -> None:
        assert len(_standing_ready(shards)) == 1
        seen.append(fence.relations(shards.on("s2")))

    with shards.writer() as (catalog, connections):
        marked = change.apply(catalog, connections, mark)
        opened = change.apply(catalog, connections, _cut_over, while_closed=look, ahead=True)
        assert catalog.current() == opened
    old, new = marked.by_id[1].fence.relation, opened.by_id[1].fence.relation
    assert seen == [{old}]
    assert fence.relations(shards.on("s2")) == {old, new}
    assert not _standing_ready(shards)


def test_an_opening_ahead_is_rolled_back_where_the_closing_fails(make_shards: MakeShards) -> None:
    shards = make_shards(2)

    def fail(_: object) -> None:
        assert _standing_ready(shards)
        raise RuntimeError("not now")

    with shards.writer() as (catalog, connections):
        marked = change.apply(catalog, connections, mark)
        with pytest.raises(RuntimeError, match="not now"):
            change.apply(catalog, connections, _cut_over, while_closed=fail, ahead=True)
        assert not _standing_ready(shards)
        assert fence.relations(shards.on("s2")) == {marked.by_id[1].fence.relation}
        assert (catalog.proposed(), catalog.current()) == (None, marked)
        with connect(marked.named("s1").url, application="report") as holder, holder.transaction():
            fence.guard(holder, marked.by_id[0].fence)
            with pytest.raises(MoveWaiting, match="report"):
                change.apply(catalog, connections, _cut_over, ahead=True, patience=0.3)
            assert not _standing_ready(shards)
        opened = change.apply(catalog, connections, _cut_over, ahead=True)
    assert opened.by_id[1].fence.relation in fence.relations(shards.on("s2"))


def test_an_opening_ahead_that_its_server_ended_is_made_anew(make_shards: MakeShards) -> None:
    shards = make_shards(2)

    def end(_: object) -> None:
        (pid,) = _standing_ready(shards)
        assert value(shards.on("s2"), "SELECT pg_terminate_backend(%s, 10000)", (pid,))

    with shards.writer() as (catalog, connections):
        change.apply(catalog, connections, mark)
        opened = change.apply(catalog, connections, _cut_over, while_closed=end, ahead=True)
        assert catalog.current() == opened
    assert opened.by_id[1].fence.relation in fence.relations(shards.on("s2"))
    assert value(shards.on("s2"), "SELECT max(version) FROM shardkit.topology") == opened.version


def test_a_closing_that_its_server_ended_is_a_moment_that_was_not_found(make_shards: MakeShards) -> None:
    shards = make_shards(2)

    def idle(closed: Connection) -> None:
        pid = closed.info.backend_pid
        there = "SELECT FROM pg_stat_activity WHERE pid = %s"
        until(lambda: not shards.on("s1").execute(there, (pid,)).fetchall(), "its server ends it", 20)
        closed.execute("SELECT 1")

    with shards.writer() as (catalog, connections):
        marked = change.apply(catalog, connections, mark)
        with pytest.raises(MoveWaiting, match="s1 was closed"):
            change.apply(catalog, connections, _cut_over, while_closed=idle, ahead=True)
        assert (catalog.proposed(), catalog.current()) == (None, marked)
        assert change.apply(catalog, connections, _cut_over, ahead=True) == catalog.current()


def test_an_error_that_a_hook_keeps_to_itself_decides_nothing(make_shards: MakeShards) -> None:
    shards = make_shards(2)

    def swallow(closed: Connection) -> None:
        with suppress(psycopg.errors.DivisionByZero):
            closed.execute("SELECT 1 / 0")

    with shards.writer() as (catalog, connections):
        marked = change.apply(catalog, connections, mark)
        with pytest.raises(psycopg.OperationalError, match="s1 was lost"):
            change.apply(catalog, connections, _cut_over, while_closed=swallow)
        change.settle(catalog, connections)
        assert (catalog.proposed(), catalog.current()) == (None, marked)


def test_an_older_mover_can_decide_nothing_any_more(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    with shards.writer() as (catalog, connections):
        old_token = catalog.token
        assert old_token is not None
    with shards.writer() as (catalog, connections):
        change.apply(catalog, connections, mark)
        for shard in shards.topology().shards:
            with connections.get(shard).transaction():
                change.claim(connections.get(shard), catalog.token)
    with Catalog.open(shards.catalog_url).use_lease(old_token) as slow:
        with pytest.raises(MoverSuperseded):
            slow.propose(mark(shards.topology(), slow.next_version()))
    with pytest.raises(MoverSuperseded):
        change.claim(shards.on("s1"), old_token)


def test_a_shard_restored_to_an_older_state_is_refused(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    now = shards.topology().by_id[1].fence.relation
    shards.on("s2").execute(f'ALTER TABLE shardkit."{now}" RENAME TO fence_1_00000000')
    with shards.writer() as (catalog, connections):
        with pytest.raises(ShardBehind, match="s2"):
            change.apply(catalog, connections, mark)
        assert catalog.proposed() is None


def test_a_topology_that_is_younger_on_the_shard_is_not_overwritten(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    topology = shards.topology()
    younger = topology.declared(topology.version + 50, ())
    shards.on("s2").execute(
        "INSERT INTO shardkit.topology VALUES (%s, %s, %s)",
        (younger.version, younger.digest, Jsonb(younger.to_json())),
    )
    with shards.writer() as (catalog, connections):
        change.apply(catalog, connections, mark)
    assert value(shards.on("s2"), "SELECT max(version) FROM shardkit.topology") == younger.version


def test_owned_answers_for_people_at_psql(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    fill(shards.on("s1"), 500)
    shards.add("s2", 1)
    shards.move()
    for name in ("s1", "s2"):
        held, owned = shards.on(name).execute(
            "SELECT count(*), count(*) FILTER (WHERE shardkit.owned(id)) FROM public.users"
        ).fetchone() or (0, 0)
        assert held == owned > 100
    assert (
        value(shards.on("s1"), "SELECT count(*) FROM public.users WHERE NOT shardkit.owned(id + 100000)")
        > 100
    )
    for key in ("'x'::text", "gen_random_uuid()"):
        assert value(shards.on("s1"), f"SELECT shardkit.owned({key})") in (True, False)


# --- joining and declaring -----------------------------------------------------------------------------------------


def attempt(shards: Shards, name: str, url: str) -> None:
    with shards.writer() as (catalog, connections):
        membership.join(catalog, connections, name=name, url=url)


def untouched(url: str) -> bool:
    with connect(url) as connection:
        return value(connection, "SELECT to_regnamespace('shardkit')") is None


def test_a_refused_join_leaves_nothing_behind(make_shards: MakeShards, fresh_database: FreshDatabase) -> None:
    shards = make_shards(1)
    before = shards.topology()
    bare, filled, differing = (fresh_database(1) for _ in range(3))
    for url in (filled, differing):
        with connect(url) as connection:
            connection.execute(SCHEMA)
    with connect(filled) as connection:
        connection.execute("INSERT INTO public.users VALUES (1, 'early')")
    with connect(differing) as connection:
        connection.execute("ALTER TABLE public.posts ALTER COLUMN body SET NOT NULL")
    with pytest.raises(PreflightFailed, match=r"public\.users is missing"):
        attempt(shards, "s2", bare)
    with pytest.raises(ShardNotEmpty, match=r"public\.users"):
        attempt(shards, "s2", filled)
    with pytest.raises(PreflightFailed, match=r"public\.posts\.body differs"):
        attempt(shards, "s2", differing)
    with pytest.raises(NameTaken):
        attempt(shards, "s1", bare)
    with pytest.raises(AlreadyShard, match="already"):
        attempt(shards, "s2", before.named("s1").url)
    with pytest.raises(ShardUnreachable, match="s2"):
        attempt(shards, "s2", "postgresql://nobody@127.0.0.1:1/none")
    assert all(map(untouched, (bare, filled, differing)))
    assert shards.topology() == before


def test_a_shard_of_another_catalog_is_refused(make_shards: MakeShards) -> None:
    ours, theirs = make_shards(1), make_shards(1)
    with pytest.raises(AlreadyShard, match="another catalog"):
        attempt(ours, "s2", theirs.topology().named("s1").url)


def test_a_server_that_cannot_be_a_shard_is_refused(
    make_shards: MakeShards, fresh_database: FreshDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(1)
    old = fresh_database(1)
    monkeypatch.setattr(servers, "MINIMUM_VERSION", 990000)
    with pytest.raises(IncompatibleServer, match="15 or newer is needed"):
        attempt(shards, "s2", old)
    assert untouched(old)


def test_an_interrupted_join_can_be_run_again(make_shards: MakeShards, fresh_database: FreshDatabase) -> None:
    shards = make_shards(1)
    url = fresh_database(1)
    with connect(url) as connection:
        connection.execute(SCHEMA)
    migrate.upgrade(url, "shard")
    with shards.writer() as (catalog, _):
        current = catalog.current()
        assert current is not None
        with connect(url) as connection:
            connection.execute(
                "INSERT INTO shardkit.shard VALUES (true, %s, 1, 's2')", (catalog.cluster_id(),)
            )
        interrupted = current.joined(catalog.next_version(), shard_id=1, name="s2", url=url, weight=100)
        catalog.propose(interrupted)
    with pytest.raises(AlreadyShard, match="a shard of this catalog already"):
        attempt(shards, "s2", url)
    assert shards.topology() == interrupted
    with connect(url) as connection:
        assert fence.relations(connection) == {interrupted.by_id[1].fence.relation}


def test_no_catalog_is_said(fresh_database: FreshDatabase) -> None:
    with pytest.raises(NotInitialised):
        Catalog.open(fresh_database())


def test_declaring(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    new = ShardedTable("public", "likes", "user_id", "int")
    with shards.writer() as (catalog, connections):
        before = catalog.current()
        assert membership.declare(catalog, connections, TABLES) == before
        with pytest.raises(DeclarationError, match="cannot become sharded by"):
            membership.declare(catalog, connections, [ShardedTable("public", "posts", "id", "int")])
        with pytest.raises(PreflightFailed, match="does not exist"):
            membership.declare(catalog, connections, [new])
        for name in ("s1", "s2"):
            shards.on(name).execute("CREATE TABLE public.likes (user_id int PRIMARY KEY)")
        shards.on("s2").execute("INSERT INTO public.likes VALUES (1)")
        with pytest.raises(ShardNotEmpty, match="likes"):
            membership.declare(catalog, connections, [new])
        shards.on("s2").execute("DELETE FROM public.likes")
        assert new in membership.declare(catalog, connections, [new]).tables
    for name in ("s1", "s2"):
        document = value(
            shards.on(name), "SELECT document FROM shardkit.topology ORDER BY version DESC LIMIT 1"
        )
        assert new in Topology.from_json(document).tables


def test_nothing_joins_or_is_declared_while_a_job_is_unfinished(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    with Mover(shards.catalog_url) as mover:
        mover.start("rebalance")
        with pytest.raises(LeaseHeld), shards.writer():
            pass
    with shards.writer() as (catalog, connections):
        with pytest.raises(JobRunning):
            membership.declare(catalog, connections, [ShardedTable("public", "likes", "user_id", "int")])
        with pytest.raises(JobRunning):
            membership.join(catalog, connections, name="s3", url=shards.topology().named("s1").url)
