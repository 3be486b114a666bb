"""What goes over the wire, as libpq sees it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import IO, Any


@contextmanager
def counting(raw: Any) -> Iterator[Callable[[], int]]:
    """The number of times that a driver connection sent something and then read the answer, by libpq's own trace."""
    with tempfile.TemporaryFile("w+") as trace:
        raw.pgconn.trace(trace.fileno())
        try:
            yield lambda: _turns(trace)
        finally:
            raw.pgconn.untrace()


def _turns(trace: IO[str]) -> int:
    """How often the direction of the messages (F of the client, B of the server) turns from F to B."""
    trace.seek(0)
    directions = [parts[1] for line in trace if len(parts := line.split("\t")) > 1]
    return sum(pair == ("F", "B") for pair in pairwise(directions))
