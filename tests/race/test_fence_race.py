"""Writers against moves, at every isolation level: nothing lost, nothing twice, and no error but those of the level.

A mover carries keys round the shards as fast as it can while applications increment them. Each application has its own
router; some are processes that are stopped in the middle of whatever they do and thawed after a move.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from shardkit.core.errors import MoveWaiting, TopologyChanged
from tests.sharded import Post, ShardedCluster, User, until

LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
WRITERS = 3
MOVES = 12


@pytest.fixture
def keys(sharded: ShardedCluster) -> list[int]:
    """Users on every shard, one of each for a writer."""
    keys = []
    for name in ("s0", "s1", "s2"):
        for key in sharded.keys(name, WRITERS):
            sharded.admin(name).execute(
                "INSERT INTO public.users (id, name, score) VALUES (%s, 'x', 0)", (key,)
            )
            keys.append(key)
    return keys


@contextmanager
def moving(sharded: ShardedCluster, keys: list[int]) -> Iterator[threading.Event]:
    """Keys are moved in the block until enough have been; the event is set then."""
    done, stop = threading.Event(), threading.Event()

    def move() -> None:
        for number, key in enumerate(itertools.cycle(keys)):
            if stop.is_set():
                return
            if number >= MOVES:
                done.set()
            sharded.move_key(key)

    with ThreadPoolExecutor(1) as mover:
        future = mover.submit(move)
        try:
            yield done
        finally:
            stop.set()
            future.result(60)


def _retryable(error: BaseException) -> bool:
    """What the isolation level asks an application to try again: 40001, and a snapshot that a move has outrun."""
    return isinstance(error, TopologyChanged) or (
        isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) == "40001"
    )


def work(session: Session, key: int, number: int, others: list[int]) -> None:
    """Read here and there, write one user and its posts."""
    session.get(User, others[number % len(others)])
    if number % 3 == 0:
        with session.begin_nested():
            session.execute(update(User).where(User.id == key).values(score=User.score + 1))
    else:
        user = session.get_one(User, key, with_for_update=True)
        user.score += 1
    session.add(Post(user_id=key, id=number, caption="x"))
    if number % 5 == 0:
        assert len(session.scalars(select(User.id)).all()) == len(others)
    session.commit()


def _write(
    Session: sessionmaker[Any], mine: list[int], keys: list[int], done: threading.Event, level: str
) -> Counter[int]:
    acknowledged: Counter[int] = Counter()
    for number in itertools.count(1):
        if done.is_set():
            return acknowledged
        key = mine[number % len(mine)]
        while True:
            try:
                with Session() as session:
                    work(session, key, number, keys)
            except Exception as error:
                if level == "READ COMMITTED" or not _retryable(error):
                    raise
                continue
            acknowledged[key] += 1
            break
    raise AssertionError("unreachable")


def _check(sharded: ShardedCluster, acknowledged: Counter[int], keys: list[int]) -> None:
    scores: dict[int, int] = {}
    posts: Counter[int] = Counter()
    for shard in sharded.topology.shards:
        for key, score in sharded.query(shard.name, "SELECT id, score FROM public.users"):
            assert key not in scores, f"user {key} is on two shards"
            assert sharded.owner(key) == shard.name
            scores[key] = score
        for (key,) in sharded.query(shard.name, "SELECT user_id FROM public.posts"):
            posts[key] += 1
    assert scores == {key: acknowledged[key] for key in keys}
    assert posts == acknowledged
    assert acknowledged.total() > 0


@pytest.mark.parametrize("level", LEVELS)
def test_threads_against_moves(sharded: ShardedCluster, keys: list[int], level: str) -> None:
    clusters = [sharded.connect() for _ in range(WRITERS)]
    options: dict[str, Any] = {"execution_options": {"isolation_level": level}}
    with ThreadPoolExecutor(WRITERS) as threads, moving(sharded, keys) as done:
        futures = [
            threads.submit(_write, cluster.sessionmaker(**options), keys[number::WRITERS], keys, done, level)
            for number, cluster in enumerate(clusters)
        ]
        acknowledged = sum((future.result(120) for future in futures), Counter[int]())
    for cluster in clusters:
        cluster.dispose()
    _check(sharded, acknowledged, keys)


@pytest.mark.parametrize("level", LEVELS)
async def test_tasks_against_moves(sharded: ShardedCluster, keys: list[int], level: str) -> None:
    cluster = sharded.connect()
    Session = cluster.async_sessionmaker(execution_options={"isolation_level": level})
    acknowledged: Counter[int] = Counter()

    async def write(mine: list[int], done: threading.Event) -> None:
        for number in itertools.count(1):
            if done.is_set():
                return
            key = mine[number % len(mine)]
            while True:
                try:
                    session: AsyncSession
                    async with Session() as session:
                        await session.run_sync(work, key, number, keys)
                except Exception as error:
                    if level == "READ COMMITTED" or not _retryable(error):
                        raise
                    continue
                acknowledged[key] += 1
                break

    with moving(sharded, keys) as done:
        async with asyncio.TaskGroup() as group:
            for number in range(WRITERS):
                group.create_task(write(keys[number::WRITERS], done))
    await cluster.adispose()
    _check(sharded, acknowledged, keys)


# --- frozen processes ------------------------------------------------------------------------------------------------

APPLICATION = """
import asyncio, json, sys
import shardkit
from tests.race.test_fence_race import work

url, kind, keys, mine = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
cluster = shardkit.connect(url)

def told(number, key):
    print(json.dumps([number, key]), flush=True)
    return sys.stdin.readline().strip() == "go"

def sync():
    Session = cluster.sessionmaker()
    number = 0
    while True:
        number += 1
        key = mine[number % len(mine)]
        with Session() as session:
            work(session, key, number, keys)
        if not told(number, key):
            return

async def asynchronous():
    Session = cluster.async_sessionmaker()
    number = 0
    while True:
        number += 1
        key = mine[number % len(mine)]
        async with Session() as session:
            await session.run_sync(work, key, number, keys)
        if not told(number, key):
            return await cluster.adispose()

sync() if kind == "sync" else asyncio.run(asynchronous())
cluster.dispose()
"""


class Application:
    """A process that works and says so after each commit; it may be stopped at any instruction."""

    def __init__(self, sharded: ShardedCluster, kind: str, keys: list[int], mine: list[int]) -> None:
        arguments = [sharded.catalog_url, kind, json.dumps(keys), json.dumps(mine)]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-c", APPLICATION, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        self.acknowledged: Counter[int] = Counter()
        self.ending = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        for line in self.process.stdout:
            self.acknowledged[json.loads(line)[1]] += 1
            with suppress(BrokenPipeError):
                self.process.stdin.write("stop\n" if self.ending else "go\n")
                self.process.stdin.flush()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.ending = True
        self.thaw()
        assert self.process.wait(60) == 0
        self._reader.join(20)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_process_that_is_frozen_and_thawed(sharded: ShardedCluster, keys: list[int], kind: str) -> None:
    """Frozen between transactions, it sleeps through the move; frozen within one, the move waits for it."""
    application = Application(sharded, kind, keys, keys)
    slept = waited = 0
    try:
        for key in itertools.islice(itertools.cycle(keys), 100):
            before = application.acknowledged.total()
            until(lambda: application.acknowledged.total() > before, "the application works")  # noqa: B023
            move = sharded.next_shard(key)
            application.freeze()
            try:
                sharded.patience = 0.05
                sharded.move(*move, drain=False)
                slept += 1
            except MoveWaiting:
                waited += 1
            finally:
                sharded.patience = 20.0
                application.thaw()
            sharded.move(*move)
            if slept >= 5 and waited >= 3:
                break
    finally:
        application.end()
    assert slept >= 5
    _check(sharded, application.acknowledged, keys)
