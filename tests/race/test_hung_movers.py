"""A mover that hangs, in the middle of whatever it does, lets go of what it holds within seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg
import pytest

from shardkit.core.errors import MoveWaiting
from shardkit.core.keyrange import Arc, ArcSet
from shardkit.core.topology import Topology
from shardkit.storage import change, purge, replicaidentity, sourceguard
from shardkit.storage.connections import Connection, connect, value
from tests.fix_postgres import NewCluster
from tests.fix_shards import MakeShards, Shards, fill

UPPER = ArcSet([Arc(0, 2**63 - 1)])


def marked(before: Topology | None, version: int) -> Topology:
    assert before is not None
    return before.marked(version, 1, UPPER)


def decided(before: Topology | None, version: int) -> Topology:
    assert before is not None
    return before.cut_over(version, 0, 1, UPPER)


def hang_until_let_go(shards: Shards, name: str, statement: str) -> Callable[[Connection], None]:
    """A hook that goes on only when an application was let through, as it never is by a mover that hangs."""

    def hook(connection: Connection) -> None:
        def pass_() -> None:
            with connect(shards.topology().named(name).url) as application:
                application.execute("SET lock_timeout = '20s'")
                application.execute(statement)
            through.set()

        through = threading.Event()
        thread = threading.Thread(target=pass_)
        thread.start()
        thread.join()
        assert through.is_set(), "the mover kept what it holds"

    return hook


def test_in_the_closing(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    with shards.writer() as (catalog, connections):
        change.apply(catalog, connections, marked)
        fence = shards.topology().named("s1").fence.relation
        lock = f'BEGIN; LOCK TABLE shardkit."{fence}" IN ACCESS SHARE MODE; COMMIT'
        hook = hang_until_let_go(shards, "s1", lock)
        with pytest.raises(MoveWaiting):
            change.apply(catalog, connections, decided, while_closed=hook)
    assert not shards.topology().owned(1)


def test_in_the_opening(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    hook = hang_until_let_go(shards, "s2", "UPDATE shardkit.mover SET token = token")
    with shards.writer() as (catalog, connections):
        change.apply(catalog, connections, marked)
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            change.apply(catalog, connections, decided, on_open=hook)
    with shards.writer() as (catalog, connections):
        change.settle(catalog, connections)
    assert shards.topology().owned(1) == UPPER


def test_every_transaction_of_a_mover_is_short(
    make_shards: MakeShards, new_cluster: NewCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TCP, where a machine may vanish: asked of the server, at each place where a mover writes its token."""
    asked: dict[str, set[tuple[str, ...]]] = {}

    def looking(module: str) -> Callable[[Connection, int], None]:
        def claim(connection: Connection, token: int) -> None:
            real(connection, token)
            names = ("lock_timeout", "idle_in_transaction_session_timeout", "tcp_user_timeout")
            found = tuple(str(value(connection, f"SHOW {name}")) for name in names)
            asked.setdefault(module, set()).add(found)

        return claim

    shards = make_shards(0)
    shards.add("s1", new_cluster(tcp=True))
    fill(shards.on("s1"), 100)
    shards.add("s2", new_cluster(tcp=True))
    real = change.claim
    for module in (change, purge, replicaidentity, sourceguard):
        monkeypatch.setattr(module, "claim", looking(module.__name__))
    shards.move()
    assert set(asked) >= {change.__name__, purge.__name__, sourceguard.__name__}
    for lock, idle, tcp in set().union(*asked.values()):
        assert lock != "0"
        assert (idle, tcp) == ("2s", "5000")
