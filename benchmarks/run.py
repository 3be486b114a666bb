"""Run the benchmarks and print how shardkit compares with each peer, measured in the same run.

Arguments go to pytest. Everything measured is written to ``benchmarks/results/``, with the machine and the versions;
``ratios`` there are what is printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


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
    """A row for each peer of each benchmark: the medians in seconds for one time, and ours divided by theirs."""
    return [
        {
            "what": info["what"],
            "shardkit": one["stats"]["median"] / info["times"],
            "peer": who,
            "version": peer["version"],
            "seconds": peer["median"] / info["times"],
            "ratio": one["stats"]["median"] / peer["median"],
            "ratio_of_fastest": one["stats"]["min"] / peer["min"],
        }
        for one in benchmarks
        for info in [one["extra_info"]]
        for who, peer in info["peers"].items()
    ]


def _shown(seconds: float) -> str:
    for unit, size in (("s ", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def main() -> int:
    path = measure(sys.argv[1:])
    if path is None:
        return 1
    document = json.loads(path.read_text())
    document["ratios"] = ratios(document["benchmarks"])
    path.write_text(json.dumps(document, indent=1))
    print(f"\n{'':<28} {'shardkit':>9} {'peer':>9} {'ratio':>7} {'fastest':>8}")
    for row in document["ratios"]:
        both = f"{_shown(row['shardkit']):>9} {_shown(row['seconds']):>9}"
        ratio = f"{row['ratio']:>7.3f} {row['ratio_of_fastest']:>8.3f}"
        print(f"{row['what']:<28} {both} {ratio}  {row['peer']} ({row['version']})")
    print(
        "\nMedians and their ratio, shardkit / peer; then the same of the fastest round of each. They took turns."
    )
    print(f"All of it is in {path.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
