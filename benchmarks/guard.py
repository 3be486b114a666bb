"""A guard against slower code: what hot paths cost beside a baseline that is checked in, ``benchmarks/baseline.json``.

What is Python is counted: the bytecode instructions that shardkit's own modules execute for a call, which are the same
on every machine, but not for every version of Python. What is native is timed, as CPU time beside a call that does
nothing, which tells something on one kind of processor alone; noise only ever adds to it, so that what is too slow is
measured again for a while. Ends with status 1 if something costs a tenth more than its baseline; what has no baseline
is said. ``--write`` makes what is measured the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any
from uuid import UUID

from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import sessionmaker

import shardkit
from shardkit.core.keyrange import SLOTS, slot_arc
from shardkit.core.ring import Ring
from shardkit.dev import Clusters
from shardkit.storage.urls import sqlalchemy_url
from tests.sharded import Base, Post, ShardedCluster, User

from . import documents

BASELINE = Path(__file__).with_name("baseline.json")
COMMAND = "python -m benchmarks.guard --docs"
PACKAGE = str(Path(shardkit.__file__).parent)
ALLOWED = 1.1
SECONDS = 60.0
"""For so long a time that is over its limit is measured again."""
KEYS = 10_000

Work = Callable[[], object]


def instructions(work: Work) -> Counter[str]:
    """Bytecode instructions in one call, in this thread, by source file; the fewest of a few calls."""

    def count_once() -> Counter[str]:
        counted = Counter[str]()

        def inside(frame: FrameType, event: str, _: Any) -> Any:
            if event == "opcode":
                counted[frame.f_code.co_filename] += 1
            return inside

        def entered(frame: FrameType, *_: Any) -> Any:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            return inside

        before = sys.gettrace()
        sys.settrace(entered)
        try:
            work()
        finally:
            sys.settrace(before)
        return counted

    for _ in range(10):  # caches fill, and the driver prepares what is repeated
        work()
    return min((count_once() for _ in range(3)), key=own)


def own(counted: Counter[str]) -> int:
    """Those of shardkit's own modules."""
    return sum(count for path, count in counted.items() if path.startswith(PACKAGE))


def sessions() -> Iterator[tuple[str, Counter[str], Counter[str]]]:
    """What work costs a session in Python, on two shards of one server, and a plain one on a database of it."""
    with Clusters(1) as servers:
        os.environ["PGPASSFILE"] = str(servers[0].passfile)
        urls = [servers[0].create_database(name) for name in ("catalog", "s0", "s1", "plain")]
        sharded, engine = ShardedCluster(urls[0], urls[1:3]), create_engine(sqlalchemy_url(urls[3]))
        Base.metadata.create_all(engine)
        with sharded.connect() as cluster:
            both = (cluster.sessionmaker(), sessionmaker(engine))
            for make in both:
                with make.begin() as session:
                    session.add(User(id=7, name="user", posts=[Post(id=1, caption="caption")]))
            for (name, work), plain in zip(_works(both[0]).items(), _works(both[1]).values(), strict=True):
                yield name, instructions(work), instructions(plain)
        engine.dispose()
        sharded.close()


def profile(found: Sequence[tuple[str, Counter[str], Counter[str]]]) -> documents.Table:
    """Where the instructions are."""
    parts = {"planning": "/orm/planning/", "session": "/orm/", "guard": "/storage/"}
    table = [["instructions", "plain", "with shardkit", "its own", *parts]]
    for name, counted, plain in found:
        left = {path: count for path, count in counted.items() if path.startswith(PACKAGE)}
        shares = []
        for folder in parts.values():
            those = [path for path in left if path.startswith(PACKAGE + folder)]
            shares.append(sum(left.pop(path) for path in those))
        row = (plain.total(), counted.total(), own(counted), *shares)
        table.append([name, *(f"{number:,}" for number in row)])
    return table


def _works(make: Any) -> Mapping[str, Work]:
    def get() -> None:
        with make() as session:
            session.get_one(User, 7)

    def chosen() -> None:
        with make() as session:
            session.scalars(select(Post).where(Post.user_id == 7).order_by(Post.id)).all()

    def lazily() -> None:
        with make() as session:
            assert session.get_one(User, 7).posts

    def update() -> None:
        with make.begin() as session:
            session.get_one(User, 7).score += 1

    def insert() -> None:
        with make() as session:
            session.add(User(id=8, name="new"))
            session.flush()

    def count() -> None:
        with make() as session:
            session.scalar(select(func.count()).select_from(User))

    return {
        "session.get": get,
        "select by key": chosen,
        "a lazy load after get": lazily,
        "get, update and commit": update,
        "insert": insert,
        "count over two shards": count,
    }


def lookups() -> Iterator[tuple[str, Callable[[], float]]]:
    """What measures a look-up in the ring once, as a multiple of a call that does nothing."""
    ends = [slot_arc(slot).last for slot in range(63, SLOTS, 64)]
    ring = Ring(ends, [number % 16 for number in range(len(ends))])
    keys: Mapping[str, list[Any]] = {
        "an int": list(range(1 << 40, (1 << 40) + KEYS)),
        "a string": [f"user:{number:08}" for number in range(KEYS)],
        "a UUID": [UUID(int=number << 64 | 1) for number in range(KEYS)],
    }
    many = array("q", range(100 * KEYS))
    for kind, those in keys.items():
        yield f"owner of {kind}", partial(_beside_nothing, ring.owner, those)
    yield "owners of an int64", lambda: _once(lambda: ring.owners(many)) / 100 / _timed(callable, many[:KEYS])


def _beside_nothing(function: Callable[[Any], object], keys: Any) -> float:
    return _timed(function, keys) / _timed(callable, keys)


def _timed(function: Callable[[Any], object], keys: Any) -> float:
    return _once(lambda: deque(map(function, keys), maxlen=0))


def _once(work: Work) -> float:
    """CPU time of the fastest of some calls: the others were disturbed."""
    times = []
    for _ in range(50):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


def within(measure: Callable[[], float], limit: float | None) -> float:
    """What is measured, again and again until it is within its limit, if there is one."""
    deadline = time.monotonic() + SECONDS
    least = measure()
    while limit is not None and least > limit and time.monotonic() < deadline:
        least = min(least, measure())
    return least


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="make what is measured the baseline")
    parser.add_argument("--docs", type=Path, help="put where the instructions are into this file")
    options = parser.parse_args()
    python = ".".join(platform.python_version_tuple()[:2])
    machine = f"{documents.exact_processor()}, Python {platform.python_version()}"
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"instructions": {}, "times": {}}
    counts = baseline["instructions"].setdefault(python, {})
    times = baseline["times"].setdefault(machine, {})
    seen = list(sessions())
    rows: list[tuple[str, float, float | None]] = [
        (name, own(counted), counts.get(name)) for name, counted, _ in seen
    ]
    if options.write:
        counts.update({name: found for name, found, _ in rows})
    for name, measure in lookups():
        known = times.get(name)
        found = within(measure, None if options.write or known is None else known * ALLOWED)
        rows.append((name, found, known))
        if options.write:
            times[name] = round(median(measure() for _ in range(9)), 3)
    worse = [name for name, found, known in rows if known is not None and found > known * ALLOWED]
    table = [
        [
            name,
            f"{found:,.4g}",
            "none" if known is None else f"{known:,.4g}",
            "SLOWER" if name in worse else "",
        ]
        for name, found, known in rows
    ]
    print(documents.aligned([[f"on {machine}", "now", "baseline", ""], *table]))
    if options.docs is not None:
        documents.put(options.docs, COMMAND, f"On Python {python}:", documents.markdown(profile(seen)))
    if options.write:
        BASELINE.write_text(json.dumps(baseline, indent=1, sort_keys=True) + "\n")
        return 0
    if worse:
        print(
            f"\nMore than {ALLOWED:g} times the baseline: {', '.join(worse)}. "
            "If that has to be: `python -m benchmarks.guard --write`.",
            file=sys.stderr,
        )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
