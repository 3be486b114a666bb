"""Run the benchmarks and print how shardkit compares with each peer, measured in the same run.

Arguments go to pytest, but for ``--docs FILE``, which puts the tables there between its two marks. Everything measured
is written to ``benchmarks/results/``, with the machine and the versions; ``ratios`` and ``bars`` there are what is
printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import bars, plots

HERE = Path(__file__).parent
MARKS = ("<!-- figures: made by `make bench` -->", "<!-- end of figures -->")


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
    """A row for each peer of each benchmark: the medians in seconds for one time, ours divided by theirs, the same of
    the fastest rounds."""
    return [
        {
            "what": info["what"],
            "shardkit": one["stats"]["median"] / info["times"],
            "fastest": one["stats"]["min"] / info["times"],
            "peer": who,
            "version": peer["version"],
            "seconds": peer["median"] / info["times"],
            "peer_fastest": peer["min"] / info["times"],
            "ratio": one["stats"]["median"] / peer["median"],
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


def tables(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """What is shown: the head and the lines of each table."""
    yield (
        ("", "shardkit", "peer", "ratio", "fastest", ""),
        [
            (
                row["what"],
                _shown(row["shardkit"]),
                _shown(row["seconds"]),
                f"{row['ratio']:.3f}",
                f"{row['ratio_of_fastest']:.3f}",
                f"{row['peer']} ({row['version']})",
            )
            for row in document["ratios"]
        ],
    )
    yield (
        ("bar", "wanted", "found", ""),
        [
            (bar["what"], bar["wanted"], bar["found"], "reached" if bar["reached"] else "MISSED")
            for bar in document["bars"]
        ],
    )


def as_text(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """A table for a terminal."""
    every = [head, *lines]
    widths = [max(len(line[column]) for line in every) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in every
    )


def as_markdown(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """The same for a document."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *lines))


def write_docs(path: Path, document: Mapping[str, Any], name: str) -> None:
    """Put the tables between the marks of a document."""
    machine = document["machine_info"]
    cpu = machine["cpu"]
    about = (
        f"Measured {document['datetime'][:10]} by `make bench` (`{name}`), on "
        f"{cpu.get('brand_raw', machine['machine'])}, {cpu.get('count', '?')} cores, "
        f"{machine['python_implementation']} {machine['python_version']}, {machine['system']} {machine['release']}."
    )
    shown = "\n\n".join(as_markdown(*table) for table in tables(document))
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n\n{about}\n\n{shown}\n\n{MARKS[1]}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--docs", type=Path, help="put the tables into this file")
    options, rest = parser.parse_known_args()
    path = measure(rest)
    if path is None:
        return 1
    document = json.loads(path.read_text())
    document["ratios"] = ratios(document["benchmarks"])
    document["bars"] = list(bars.checked(document["ratios"]))
    path.write_text(json.dumps(document, indent=1))
    for table in tables(document):
        print("\n" + as_text(*table))
    print(
        "\nMedians and their ratio, shardkit / peer; then the same of the fastest round of each. They took turns."
    )
    if options.docs is not None:
        write_docs(options.docs, document, path.name)
    for drawn in plots.draw(document["ratios"], path):
        print(f"Drawn: {drawn.relative_to(HERE.parent)}")
    print(f"All of it is in {path.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
