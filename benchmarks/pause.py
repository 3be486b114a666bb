"""The pause that an application sees while keys change their shard: clients on the session, sampling each millisecond.

Two client processes, one that reads and one that writes, use keys that are about to move, one statement after the
other with a millisecond between. Positions go to the second shard and come back, some times over. For each move the
longest answer that each client waited for stands beside the pause by the mover's own clock and its parts; all answers
are in a histogram. At the end each acknowledged write must be there. Everything goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import bisect
import gc
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median

from sqlalchemy import update

import shardkit
from shardkit import ShardSession
from shardkit.core.move import Mode
from shardkit.dev import Clusters
from shardkit.rebalance.mover import Mover, plan_job
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage.connections import connect, value
from tests.sharded import ShardedCluster, User

from . import documents

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.pause --docs"
EACH_SECONDS = 0.001
BOUNDS_MS = (1, 2, 5, 10, 20, 50, 100)
POSTS = 5
KINDS = ("read", "write")
PARTS = ("total", "lock", "catch_up", "verify", "decide", "open", "median")
"""Of the mover's pause; a locked move has many, of which it keeps the worst and the median."""
SHARDS = ("s0", "s1")
FILL_POSTS = """
INSERT INTO public.posts (user_id, id, caption) SELECT id, n, 'caption' FROM public.users, generate_series(1, %s) n
"""


@dataclass(frozen=True, slots=True)
class Move:
    """One move: rows carried, the longest answer of each client, the mover's own pause by part; all in milliseconds.

    ``answers`` counts the answers of both clients by `BOUNDS_MS`, the last of those that took longer than all of them.
    """

    rows: int
    read_ms: float
    write_ms: float
    pause_ms: dict[str, float]
    answers: list[int]


def sample(catalog_url: str, kind: str, pipe: Pipe) -> None:
    """A client process: for each list of keys that arrives, sample until the next message and send the latencies."""
    with shardkit.connect(catalog_url) as cluster:
        make = cluster.sessionmaker()
        work = {"read": _read, "write": _write}[kind]
        while keys := pipe.recv():
            latencies = []
            turn = cycle(keys)
            work(make, next(turn))  # connects
            # A full collection of Python's own, of all that was imported, takes longer than the pauses looked for.
            gc.collect()
            gc.freeze()
            pipe.send("ready")
            while not pipe.poll():
                began = time.perf_counter()
                work(make, next(turn))
                took = time.perf_counter() - began
                latencies.append(took * 1000)
                time.sleep(max(0.0, EACH_SECONDS - took))
            pipe.recv()
            pipe.send(latencies)


def _read(make: Callable[[], ShardSession], key: int) -> None:
    with make() as session:
        assert session.get(User, key) is not None


def _write(make: Callable[[], ShardSession], key: int) -> None:
    with make() as session:
        session.execute(update(User).where(User.id == key).values(score=User.score + 1))
        session.commit()


@contextmanager
def clients(catalog_url: str) -> Iterator[dict[str, Pipe]]:
    """The client processes, by what they do."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for kind in KINDS:
        pipes[kind], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=sample, args=(catalog_url, kind, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    try:
        yield pipes
        for pipe in pipes.values():
            pipe.send([])
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()


def measure(sharded: ShardedCluster, mode: Mode, turns: Iterator[int], moves: int, users: int) -> list[Move]:
    """The moves, each to the weight of the second shard that is next in ``turns``.

    Raises `AssertionError` where an acknowledged write is not there.
    """
    found = []
    written = 0
    with clients(sharded.catalog_url) as pipes:
        for number in range(moves):
            weights = {0: 1, 1: next(turns)}
            with Mover(sharded.catalog_url) as mover:
                _, placement = plan_job(mover.catalog, weights)
                (planned,) = placement.transfers
                keys = [key for key in range(users) if shardkit.position(key) in planned.arcs]
                for pipe in pipes.values():
                    pipe.send(keys)
                for pipe in pipes.values():
                    assert pipe.recv() == "ready"
                mover.start("benchmark", weights, mode)
                job = mover.run()
                (row,) = mover.catalog.transfers(job.id)
            for pipe in pipes.values():
                pipe.send("stop")
            latencies = {kind: pipe.recv() for kind, pipe in pipes.items()}
            written += 1 + len(latencies["write"])
            worst = {kind: max(those) for kind, those in latencies.items()}
            answers = histogram([one for those in latencies.values() for one in those])
            pause = row.record["pause_ms"]
            found.append(Move(len(keys) * (1 + POSTS), worst["read"], worst["write"], pause, answers))
            print(
                f"{mode} {number + 1} of {moves}: clients {max(worst.values()):.1f} ms, mover {pause['total']:.1f} ms",
                file=sys.stderr,
            )
    held = sum(sharded.query(name, "SELECT sum(score) FROM public.users")[0][0] for name in SHARDS)
    assert held == written, f"{written} writes were acknowledged, {held} are there"
    for name in SHARDS:
        sharded.admin(name).execute("UPDATE public.users SET score = 0")
    return found


def fill(sharded: ShardedCluster, users: int) -> None:
    """Users and their posts, each on its shard."""
    topology = sharded.topology
    owners = topology.ring.owners(range(users))
    for name in SHARDS:
        own = topology.named(name).id
        keys = [key for key, owner in enumerate(owners) if owner == own]
        connection = sharded.admin(name)
        connection.execute("INSERT INTO public.users SELECT k, 'name', 0 FROM unnest(%s::bigint[]) k", [keys])
        connection.execute(FILL_POSTS, [POSTS])
        connection.execute("VACUUM ANALYZE public.users, public.posts")


def histogram(latencies: Sequence[float]) -> list[int]:
    """How many lie within each of `BOUNDS_MS`, and above the last."""
    counts = [0] * (len(BOUNDS_MS) + 1)
    for latency in latencies:
        counts[bisect.bisect_left(BOUNDS_MS, latency)] += 1
    return counts


def tables(moves: Sequence[Move]) -> tuple[documents.Table, documents.Table]:
    """What was found of one mode: milliseconds, and how many answers took how long."""
    rows = {
        "longest read": [move.read_ms for move in moves],
        "longest write": [move.write_ms for move in moves],
        **{
            f"the mover's {part}": [move.pause_ms[part] for move in moves]
            for part in PARTS
            if part in moves[0].pause_ms
        },
    }
    names = [*(f"up to {bound} ms" for bound in BOUNDS_MS), "longer"]
    totals = [sum(column) for column in zip(*(move.answers for move in moves), strict=True)]
    return (
        [
            ["ms", "median", "worst"],
            *([name, f"{median(ms):.1f}", f"{max(ms):.1f}"] for name, ms in rows.items()),
        ],
        [
            ["answers of the clients", ""],
            *([name, f"{total:,}"] for name, total in zip(names, totals, strict=True)),
        ],
    )


def title(mode: Mode, moves: Sequence[Move]) -> str:
    """What the tables are of."""
    return f"{mode}: {len(moves)} moves of about {median(move.rows for move in moves):,.0f} rows"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--users", type=int, default=20_000, help=f"each with {POSTS} posts")
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--modes", nargs="+", type=Mode, default=[Mode.LOGICAL])
    parser.add_argument("--docs", type=Path, help="replace the tables in this document")
    options = parser.parse_args()
    os.environ[ALLOW_FSYNC_OFF] = "1"
    found: dict[str, list[Move]] = {}
    with Clusters(2) as servers:
        os.environ["PGPASSFILE"] = str(servers[0].passfile)
        with connect(servers[0].url()) as connection:
            version = value(connection, "SHOW server_version")
        urls = [
            servers[server].create_database(name) for server, name in ((0, "catalog"), (0, "s0"), (1, "s1"))
        ]
        sharded = ShardedCluster(urls[0], urls[1:])
        fill(sharded, options.users)
        turns = cycle((3, 1))  # there and back
        for mode in options.modes:
            found[mode.value] = measure(sharded, mode, turns, options.moves, options.users)
            print("\n" + title(mode, found[mode.value]))
            for table in tables(found[mode.value]):
                print(documents.aligned(table))
        sharded.close()
    if options.docs is not None:
        shown = [
            text
            for mode in options.modes
            for text in (
                title(mode, found[mode.value]).capitalize() + ".",
                *map(documents.markdown, tables(found[mode.value])),
            )
        ]
        documents.put(options.docs, COMMAND, documents.measured(f"PostgreSQL {version}"), *shown)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"pause-{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    moves = {mode: [asdict(one) for one in those] for mode, those in found.items()}
    document = {"postgresql": version, **machine, "bounds_ms": BOUNDS_MS, "moves": moves}
    path.write_text(json.dumps(document, indent=1))
    print(f"\nAll of it is in {path.relative_to(RESULTS.parents[1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
