"""What every benchmark gets: the tests' servers, and `versus`, by which it says what it measures against what."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import pytest

pytest_plugins = ["tests.fix_postgres"]


class Versus(Protocol):
    def __call__(
        self, group: str, who: str, version: str, run: Callable[[], Any], *, times: int = 1
    ) -> None: ...


@pytest.fixture
def versus(benchmark: Any) -> Versus:
    """`versus(group, who, version, run, times=1)` measures `run`, which does its work `times` times.

    Those of one group are compared with each other by `benchmarks/run.py`; "shardkit" is compared with each.
    """

    def measure(group: str, who: str, version: str, run: Callable[[], Any], *, times: int = 1) -> None:
        benchmark.group = group
        benchmark.extra_info.update(who=who, version=version, times=times)
        benchmark(run)

    return measure


def each(function: Callable[[Any], Any], keys: Iterable[Any]) -> Callable[[], Any]:
    """Calls `function` with each key, in C: the loop costs the same few nanoseconds whatever is called."""
    return lambda: deque(map(function, keys), maxlen=0)
