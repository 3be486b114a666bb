"""Run the benchmarks and print how shardkit compares with each peer, measured in the same run.

Arguments go to pytest, but for ``--docs FILE``, which puts the tables there between its two marks, and
``--readme FILE``, which does so with a short one. Everything measured is written to ``benchmarks/results/``, with the
machine and the versions; ``ratios``, ``trips`` and ``bars`` there are what is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import bars, documents, plots
from shardkit.dev import find_binaries

HERE = Path(__file__).parent
COMMAND = "make bench"
DRAWING = "docs/benchmarks.svg"
"""Of the short table, beside the README."""


def measure(arguments: list[str]) -> Path | None:
    """Run them; the file with what was measured, or None if one failed."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    path = results / f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
    command = [sys.executable, "-m", "pytest", str(HERE), "-o", "python_files=bench_*.py", "-q"]
    command += ["--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={path}"]
    done = subprocess.run([*command, *arguments], cwd=HERE.parent, check=False)
    return path if done.returncode == 0 and path.exists() else None


def ratios(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each peer of each benchmark: the medians in seconds for one time, the median of ours divided by theirs
    in each round, and the ratio of the fastest rounds."""
    return [
        {
            "what": info["what"],
            "shardkit": one["stats"]["median"] / info["times"],
            "fastest": one["stats"]["min"] / info["times"],
            "peer": who,
            "version": peer["version"],
            "seconds": peer["median"] / info["times"],
            "peer_fastest": peer["min"] / info["times"],
            "ratio": peer["ratio"],
            "ratio_of_fastest": one["stats"]["min"] / peer["min"],
        }
        for one in benchmarks
        for info in [one["extra_info"]]
        for who, peer in info["peers"].items()
    ]


def _shown(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def trips(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Round trips a call, by who did the work, where they were counted."""
    return [
        {"what": info["what"], "trips": info["trips"]}
        for one in benchmarks
        for info in [one["extra_info"]]
        if "trips" in info
    ]


def tables(document: Mapping[str, Any]) -> Iterator[documents.Table]:
    """What is shown, as far as it was measured: who took how long, the round trips, the bars."""
    ratios = [
        [
            row["what"],
            f"{row['peer']} ({row['version']})",
            _shown(row["shardkit"]),
            _shown(row["seconds"]),
            f"{row['ratio']:.3f}",
            f"{row['ratio_of_fastest']:.3f}",
        ]
        for row in document["ratios"]
    ]
    reached = [
        [bar["what"], bar["wanted"], bar["found"], "reached" if bar["reached"] else "MISSED"]
        for bar in document["bars"]
    ]
    yield [["", "peer", "shardkit", "peer", "ratio", "of the fastest"], *ratios]
    if document["trips"]:
        names = list(document["trips"][0]["trips"])
        counted = [
            [row["what"], *(f"{row['trips'][name]:g}" for name in names)] for row in document["trips"]
        ]
        yield [["round trips a call", *names], *counted]
    if reached:
        yield [["bar", "wanted", "found", ""], *reached]


SHORT = (
    ("owner of an int, slot ring", bars.FLOOR),
    ("owner of a string, against others", "uhashring"),
    ("owner of a string, against others", "md5 and bisect"),
    ("owners of a buffer of int64, slot ring", bars.NUMPY),
    *((what, peer) for what in bars.ONE_SHARD for peer in ("plain SQLAlchemy", "horizontal_shard")),
    ("count of all rows, 4 shards", "the 4 shards at once, bare"),
)
"""What the short table holds."""


def short(document: Mapping[str, Any]) -> documents.Table:
    """The most telling rows."""
    return [
        ["", "shardkit", "beside", "takes", "ratio"],
        *(
            [row["what"], _shown(row["shardkit"]), row["peer"], _shown(row["seconds"]), f"{row['ratio']:.2f}"]
            for row in _telling(document)
        ),
    ]


def _telling(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    by_name = {(row["what"], row["peer"]): row for row in document["ratios"]}
    return [by_name[name] for name in SHORT if name in by_name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--docs", type=Path, help="put the tables into this file")
    parser.add_argument("--readme", type=Path, help="put the short table into this file")
    options, rest = parser.parse_known_args()
    path = measure(rest)
    if path is None:
        return 1
    document = json.loads(path.read_text())
    document["ratios"] = ratios(document["benchmarks"])
    document["trips"] = trips(document["benchmarks"])
    document["bars"] = [*bars.checked(document["ratios"]), *bars.trips(document["trips"])]
    path.write_text(json.dumps(document, indent=1))
    for table in tables(document):
        print("\n" + documents.aligned(table))
    print(
        "\nMedians; the median of the ratios, shardkit / peer, of each round, in which they took turns; then the ratio "
        "of the fastest rounds."
    )
    said = documents.measured(f"PostgreSQL {find_binaries().version}")
    if options.docs is not None:
        documents.put(options.docs, COMMAND, said, *map(documents.markdown, tables(document)))
    if options.readme is not None:
        drawing = f"![The same, drawn]({DRAWING})"
        documents.put(options.readme, COMMAND, said, documents.markdown(short(document)), drawing)
        plots.short(_telling(document), options.readme.parent / DRAWING)
    for drawn in plots.draw(document["ratios"], path):
        print(f"Drawn: {drawn.relative_to(HERE.parent)}")
    print(f"All of it is in {path.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
