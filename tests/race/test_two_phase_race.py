"""Transfers between shards, all or nothing, while their writers are killed, others recover and keys move.

Every transfer takes points from one user and gives them to another, and leaves one post with each. So the points of
all shards together never change, and posts come in pairs, whatever happened in between.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shardkit.core.errors import MoveWaiting
from shardkit.storage import indoubt
from shardkit.storage.connections import ShardConnections
from tests.both import Kind, both_kinds
from tests.crash.test_two_phase_killed import left
from tests.sharded import ShardedCluster, until

WRITER = """
import asyncio, itertools, json, random, sys
import shardkit
from sqlalchemy import update
from tests.sharded import Post, User

url, kind, log, seed, *rest = sys.argv[1:]
keys, rng, log = list(map(int, rest)), random.Random(seed), open(log, "a")

def work(session, numbers=itertools.count(int(seed) * 100_000)):
    number = next(numbers)
    giver, taker = rng.sample(keys, 2)
    first, second = sorted((giver, taker))
    for key in (first, second):  # in one order, so that few wait for each other in a circle
        session.execute(update(User).where(User.id == key).values(score=User.score + (1 if key == taker else -1)))
    session.add_all(Post(user_id=key, id=number, caption="x") for key in (giver, taker))
    return number

def acknowledged(number):
    print(number, file=log, flush=True)

cluster = shardkit.connect(url)
if kind == "sync":
    unit = shardkit.retrying(cluster.sessionmaker(mode="two_phase"), attempts=50)(work)
    while True:
        acknowledged(unit())
else:
    async def in_session(session):
        return await session.run_sync(work)
    async def main():
        unit = shardkit.retrying(cluster.async_sessionmaker(mode="two_phase"), attempts=50)(in_session)
        while True:
            acknowledged(await unit())
    asyncio.run(main())
"""
POINTS = [
    "noted", "preparing", "prepared", "deciding", "decided", "finishing", "finished", "forgotten",
]  # fmt: skip


class Writers:
    """Processes that are killed at points of their own, and followed by others."""

    def __init__(self, sharded: ShardedCluster, keys: list[int], log: Path, rng: random.Random) -> None:
        self._sharded, self._keys, self._log, self._rng = sharded, keys, log, rng
        self._seeds = itertools.count(1)
        self._running: list[tuple[subprocess.Popen[str], str]] = []
        self.killed: Counter[str] = Counter()

    def start(self, kind: str) -> None:
        seed = str(next(self._seeds))
        point = self._rng.choice(POINTS)
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                WRITER,
                self._sharded.catalog_url,
                kind,
                str(self._log),
                seed,
                *map(str, self._keys),
            ],
            env={**os.environ, "SHARDKIT_FAILPOINT": f"two_phase.{point}:{self._rng.randint(1, 15)}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._running.append((process, point))

    def replace_the_dead(self, kind: str) -> None:
        for process, point in list(self._running):
            if process.poll() is not None:
                self._ended(process, point)
                self.start(kind)

    def stop(self) -> None:
        for process, point in list(self._running):
            process.kill()
            process.wait(20)
            self._ended(process, point)

    def _ended(self, process: subprocess.Popen[str], point: str) -> None:
        assert process.stderr is not None
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        self._running.remove((process, point))
        self.killed[point] += 1


@both_kinds
def test_all_or_nothing(sharded: ShardedCluster, tmp_path: Path, kind: Kind) -> None:
    check_all_or_nothing(sharded, tmp_path, kind, 5)


@pytest.mark.slow
@both_kinds
def test_all_or_nothing_for_long(sharded: ShardedCluster, tmp_path: Path, kind: Kind) -> None:
    check_all_or_nothing(sharded, tmp_path, kind, 60)


def check_all_or_nothing(sharded: ShardedCluster, tmp_path: Path, kind: Kind, kills: int) -> None:
    keys = [key for name in ("s0", "s1", "s2") for key in sharded.keys(name, 3)]
    for key in keys:
        sharded.admin(sharded.owner(key)).execute(
            "INSERT INTO public.users (id, name, score) VALUES (%s, 'x', 100)", (key,)
        )
    rng = random.Random()
    writers = Writers(sharded, keys, tmp_path / "acknowledged", rng)
    stop = threading.Event()

    def recover() -> None:
        while not stop.wait(0.05):
            with ShardConnections("shardkit tests") as shards:
                indoubt.recover(sharded.topology, shards)

    def move() -> int:
        moved = 0
        for key in itertools.cycle(keys[::2]):
            if stop.is_set():
                return moved
            try:
                sharded.move_key(key)
                moved += 1
            except MoveWaiting:
                continue
        return moved

    with ThreadPoolExecutor(2) as others:
        futures: list[Future[Any]] = [others.submit(recover), others.submit(move)]
        try:
            for _ in range(3):
                writers.start(kind)

            def enough() -> bool:
                writers.replace_the_dead(kind)
                return sum(writers.killed.values()) >= kills or any(future.done() for future in futures)

            until(enough, "the writers to be killed", 30.0 + 10.0 * kills)
        finally:
            writers.stop()
            stop.set()
        futures[0].result(60)
        assert futures[1].result(60) > 0

    def recovered() -> bool:
        with ShardConnections("shardkit tests") as shards:
            return not indoubt.recover(sharded.topology, shards) and not left(sharded)

    until(recovered, "everything to be ended", 30.0)
    everywhere = [shard.name for shard in sharded.topology.shards]
    points = [
        score for name in everywhere for (score,) in sharded.query(name, "SELECT score FROM public.users")
    ]
    assert (len(points), sum(points)) == (len(keys), 100 * len(keys))
    posts = Counter(
        number for name in everywhere for (number,) in sharded.query(name, "SELECT id FROM public.posts")
    )
    assert set(posts.values()) == {2}
    acknowledged = {json.loads(line) for line in (tmp_path / "acknowledged").read_text().splitlines()}
    assert acknowledged
    assert acknowledged <= posts.keys()
