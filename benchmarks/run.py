"""Run the benchmarks and print how shardkit compares with each peer, measured in the same run.

Arguments go to pytest. Everything measured is written to ``benchmarks/results/``, with the machine and the versions;
``ratios`` there are what is printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = "shardkit"


def measure(arguments: list[str]) -> Path | None:
    """Run them; the file with what was measured, or None if one failed."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    path = results / f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"
    command = [sys.executable, "-m", "pytest", str(HERE), "-o", "python_files=bench_*.py", "-q"]
    command += ["--benchmark-warmup=on", "--benchmark-columns=median,iqr,rounds"]
    command += ["--benchmark-disable-gc", "--benchmark-max-time=0.5", "--benchmark-warmup-iterations=20"]
    done = subprocess.run([*command, f"--benchmark-json={path}", *arguments], cwd=HERE.parent, check=False)
    return path if done.returncode == 0 and path.exists() else None


def ratios(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each peer of each group: the medians of both, in seconds for one time, and how many times ours is theirs."""
    found = []
    for group, members in groupby(
        sorted(benchmarks, key=lambda one: str(one["group"])), lambda one: one["group"]
    ):
        by_name = {one["extra_info"]["who"]: one for one in members}
        if OURS not in by_name:
            continue
        ours = _once(by_name[OURS])
        for who, one in by_name.items():
            if who != OURS:
                version = one["extra_info"]["version"]
                found.append(
                    {
                        "what": group,
                        "shardkit": ours,
                        "peer": who,
                        "version": version,
                        "seconds": _once(one),
                        "ratio": ours / _once(one),
                    }
                )
    return found


def _once(one: dict[str, Any]) -> float:
    seconds: float = one["stats"]["median"] / one["extra_info"]["times"]
    return seconds


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
    print(f"\n{'what':<28} {'shardkit':>10} {'peer':>10}  {'shardkit / peer':>15}")
    for row in document["ratios"]:
        took, peer = _shown(row["shardkit"]), _shown(row["seconds"])
        print(
            f"{row['what']:<28} {took:>10} {peer:>10}  {row['ratio']:>15.3f}  {row['peer']} ({row['version']})"
        )
    print(f"\nMedians of one run on this machine; all of it is in {path.relative_to(HERE.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
