"""What the clients measured: the times of their operations, and percentiles of them by phase.

The clock is `time.monotonic`, which all processes of a machine share. Pure but for the two functions that store.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Latency:
    """Of the operations of a phase: how many, and milliseconds."""

    operations: int
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Latency:
        """Percentiles by nearest rank; all 0 where there was no operation."""
        ordered = sorted(seconds)
        if not ordered:
            return cls(0, 0.0, 0.0, 0.0)
        return cls(len(ordered), _rank(ordered, 50), _rank(ordered, 99), _milliseconds(ordered[-1]))


def _rank(ordered: list[float], percent: int) -> float:
    return _milliseconds(ordered[-(-len(ordered) * percent // 100) - 1])


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 2)


class Measures:
    """Begin and end of each operation, in the order of their ends."""

    def __init__(self) -> None:
        self._times = array("d")

    def add(self, began: float, ended: float) -> None:
        """One operation, in seconds of the shared clock."""
        self._times.extend((began, ended))

    def __len__(self) -> int:
        return len(self._times) // 2

    def save(self, path: Path) -> None:
        """Write them to a new file."""
        path.write_bytes(self._times.tobytes())

    @classmethod
    def load(cls, path: Path) -> Measures:
        """Read what `save` wrote."""
        measures = cls()
        measures._times.frombytes(path.read_bytes())
        return measures

    def durations(self, first: float, last: float) -> list[float]:
        """Seconds that the operations took which were under way at some time from ``first`` to ``last``."""
        pairs = zip(self._times[::2], self._times[1::2], strict=True)
        return [ended - began for began, ended in pairs if began < last and ended > first]


def by_phase(
    all_measures: Iterable[Measures], phases: Mapping[str, tuple[float, float]]
) -> dict[str, Latency]:
    """The latency in each phase, which is a span of the shared clock. An operation that is under way when a phase
    ends belongs to both: a pause at a border is in the numbers of each side."""
    kept = list(all_measures)
    return {
        name: Latency.of(duration for measures in kept for duration in measures.durations(*span))
        for name, span in phases.items()
    }
