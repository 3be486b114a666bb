"""A move against a raw pipe, ``COPY .. TO STDOUT`` into ``COPY .. FROM STDIN``, of the same rows in the same run.

Each trial pipes the rows that are planned to move into a table beside the target, then moves them. What is compared is
the time until the target holds the rows, in all of its indexes; that until the move is done, verification and purge
included, and the pause of the cutover are printed beside it. Everything measured is written to
``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from psycopg import sql
from sqlalchemy import make_url

from shardkit.core.move import Mode
from shardkit.core.topology import ShardedTable
from shardkit.dev import Clusters
from shardkit.rebalance.mover import Mover, plan_job
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage import membership
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, ShardConnections, connect, value
from shardkit.storage.predicate import within

from . import documents

RESULTS = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.move --docs"
SCHEMA = """
CREATE TABLE public.posts (
    user_id bigint NOT NULL,
    id bigint NOT NULL,
    caption text NOT NULL,
    created timestamptz NOT NULL DEFAULT now(),
    likes integer NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, id)
);
CREATE INDEX ON public.posts (created);
CREATE INDEX ON public.posts (likes, created);
"""
POSTS = ShardedTable("public", "posts", "user_id", "int")
FILL = """
INSERT INTO public.posts
SELECT g / 10, g, repeat(md5(g::text), 4), now() - make_interval(secs => g), g %% 1000 FROM generate_series(1, %s) g
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial: rows carried, seconds, and the pause in milliseconds."""

    mode: str
    target: str
    rows: int
    pipe_seconds: float
    copy_seconds: float
    move_seconds: float
    pause_ms: float

    @property
    def ratio(self) -> float:
        """The move's rate of copying, as a share of the pipe's."""
        return self.pipe_seconds / self.copy_seconds


def trial(servers: Clusters, mode: Mode, rows: int, number: int) -> list[Trial]:
    """Two moves, each after a pipe of the same rows: half of the rows to an empty target, then half of the rest to what
    is no longer empty. The table that the pipe fills holds the same rows as the target."""
    urls = [
        servers[server].create_database(f"{name}_{number}")
        for server, name in ((0, "catalog"), (0, "source"), (1, "target"), (1, "pipe"))
    ]
    catalog_url, source_url, target_url, pipe_url = urls
    membership.initialise(catalog_url)
    for url in urls[1:]:
        with connect(url) as connection:
            connection.execute(SCHEMA)
    with Catalog.open(catalog_url) as catalog, ShardConnections() as shards:
        catalog.take_lease()
        for name, url in (("s1", source_url), ("s2", target_url)):
            membership.join(catalog, shards, name=name, url=url)
        membership.declare(catalog, shards, [POSTS])
    with connect(source_url) as source, connect(target_url) as target, connect(pipe_url) as pipe:
        source.execute(FILL, (rows,))
        made = []
        for what, weights in (("empty", {0: 1, 1: 1}), ("that holds rows", {0: 1, 1: 3})):
            for connection in (source, target, pipe):
                connection.execute("VACUUM ANALYZE public.posts")
                connection.execute("CHECKPOINT")
            with Mover(catalog_url) as mover:
                _, placement = plan_job(mover.catalog, weights)
                (planned,) = placement.transfers
                carried, pipe_seconds = _pipe(source, pipe, within(POSTS, planned.arcs))
                pipe.execute("CHECKPOINT")
                began = time.perf_counter()
                mover.start("benchmark", weights, mode)
                job = mover.run()
                move_seconds = time.perf_counter() - began
                (row,) = mover.catalog.transfers(job.id)
            # Where the target is empty, its secondary indexes are built after the copy; the pipe fills them as it goes.
            copy_seconds = row.record["copy_seconds"] + row.record.get("index_seconds", 0.0)
            pause = row.record["pause_ms"]["total"]
            made.append(Trial(mode.value, what, carried, pipe_seconds, copy_seconds, move_seconds, pause))
    for server, url in zip((0, 0, 1, 1), urls, strict=True):
        servers[server].drop_database(make_url(url).database or "")
    return made


def _pipe(source: Connection, target: Connection, where: sql.Composable) -> tuple[int, float]:
    began = time.perf_counter()
    read = sql.SQL("COPY (SELECT * FROM public.posts WHERE {}) TO STDOUT (FORMAT binary)").format(where)
    into = target.cursor()
    with (
        source.cursor().copy(read) as rows,
        into.copy("COPY public.posts FROM STDIN (FORMAT binary)") as sink,
    ):
        for block in rows:
            sink.write(block)
    return into.rowcount, time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=400_000, help="rows on the source")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--modes", nargs="+", type=Mode, default=[Mode.LOGICAL, Mode.LOCKED])
    parser.add_argument("--docs", type=Path, help="replace the table in this document")
    options = parser.parse_args()
    os.environ[ALLOW_FSYNC_OFF] = "1"
    trials: list[Trial] = []
    with Clusters(2) as servers:
        os.environ["PGPASSFILE"] = str(servers[0].passfile)
        with connect(servers[0].url()) as connection:
            server = value(connection, "SHOW server_version")
        for number in range(options.trials):
            for mode in options.modes:
                trials += trial(servers, mode, options.rows, len(trials))
                print(f"trial {number + 1} of {options.trials}, {mode}", file=sys.stderr)
    rows = summary(trials)
    table = [
        ["mode and target", "rows", "copied rows/s", "of the pipe", "move, s", "pause, ms"],
        *(
            [
                f"{row['mode']}, {row['target']}",
                f"{row['rows']:,}",
                f"{row['rows_per_second']:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['move_seconds']:.2f}",
                f"{row['pause_ms']:.1f}",
            ]
            for row in rows
        ),
    ]
    print(documents.aligned(table))
    if options.docs is not None:
        said = f"{documents.measured(f'PostgreSQL {server}')} Medians of {options.trials} trials."
        documents.put(options.docs, COMMAND, said, documents.markdown(table))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"move-{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    document = {"postgresql": server, **machine, "summary": rows, "trials": [asdict(one) for one in trials]}
    path.write_text(json.dumps(document, indent=1))
    print(f"\nMedians of {options.trials} trials. All of it is in {path.relative_to(RESULTS.parents[1])}")
    return 0


def summary(trials: list[Trial]) -> list[dict[str, Any]]:
    """Medians by mode and target."""
    found = []
    for mode, target in dict.fromkeys((one.mode, one.target) for one in trials):
        those = [one for one in trials if (one.mode, one.target) == (mode, target)]
        found.append(
            {
                "mode": mode,
                "target": target,
                "rows": those[0].rows,
                "rows_per_second": median(one.rows / one.copy_seconds for one in those),
                "ratio": median(one.ratio for one in those),
                "move_seconds": median(one.move_seconds for one in those),
                "pause_ms": median(one.pause_ms for one in those),
            }
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
