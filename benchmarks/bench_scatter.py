"""Statements that ask all shards: what it takes beside what the shards themselves take.

The same statements are sent to the shards without shardkit too: to the slowest of them alone, and to all of them at
once, with nothing merged. On a machine with fewer processors than shards the second is the floor of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import pytest
import sqlalchemy
from psycopg import sql
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.orm import Session, sessionmaker

from shardkit.dev import Clusters
from shardkit.storage.urls import sqlalchemy_url
from tests.sharded import ShardedCluster, User

from .conftest import Peer, Run, Versus

SHARDS = 4
USERS = 200_000
GROUPS = 100

STATEMENTS: dict[str, Callable[[], Any]] = {
    "the first 20 of all rows": lambda: select(User).order_by(User.score.desc(), User.id).limit(20),
    "count of all rows": lambda: select(func.count()).select_from(User),
    "counts by group": lambda: select(User.score, func.count()).group_by(User.score).order_by(User.score),
}


class Sides(NamedTuple):
    """Sessions over all shards, and the engines of each alone."""

    sharded: sessionmaker[Any]
    engines: Sequence[Engine]
    threads: ThreadPoolExecutor


@pytest.fixture(scope="module")
def sides(servers: Clusters) -> Iterator[Sides]:
    urls = [servers[0].create_database("scatter_catalog")]
    urls += [servers[number % len(servers)].create_database(f"scatter_{number}") for number in range(SHARDS)]
    sharded = ShardedCluster(urls[0], urls[1:])
    for shard in sharded.topology.shards:
        admin = sharded.admin(shard.name)
        admin.execute(
            sql.SQL(
                "INSERT INTO public.users (id, name, score) SELECT k, 'user ' || k, k % {} "
                "FROM generate_series(1, {}::bigint) k WHERE shardkit.owned(k)"
            ).format(GROUPS, USERS)
        )
        admin.execute("VACUUM ANALYZE public.users")
    cluster = sharded.connect()
    engines = [create_engine(sqlalchemy_url(url)) for url in urls[1:]]
    with ThreadPoolExecutor(SHARDS) as threads:
        yield Sides(cluster.sessionmaker(), engines, threads)
    for engine in engines:
        engine.dispose()
    cluster.dispose()
    sharded.close()


def _alone(engine: Engine, statement: Callable[[], Any]) -> Run:
    def work() -> None:
        with Session(engine) as session:
            session.execute(statement()).all()

    return work


def _slowest(works: Sequence[Run]) -> Run:
    """The work that takes longest."""

    def took(work: Run) -> float:
        times = []
        for _ in range(10):
            began = perf_counter()
            work()
            times.append(perf_counter() - began)
        return median(times)

    return max(works, key=took)


def _at_once(works: Sequence[Run], threads: ThreadPoolExecutor) -> Run:
    def work() -> None:
        for future in [threads.submit(one) for one in works]:
            future.result()

    return work


@pytest.mark.parametrize("what", STATEMENTS)
def test_scatter(versus: Versus, sides: Sides, what: str) -> None:
    statement = STATEMENTS[what]

    def work() -> None:
        with sides.sharded() as session:
            session.execute(statement()).all()

    alone = [_alone(engine, statement) for engine in sides.engines]
    others = {
        "the slowest shard alone": Peer(sqlalchemy.__version__, _slowest(alone)),
        "the 4 shards at once, bare": Peer(sqlalchemy.__version__, _at_once(alone, sides.threads)),
    }
    versus(f"{what}, {SHARDS} shards", work, others)
