"""What the demo tells while it runs: lines with the time since its start, and a line that changes on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

_TICK = 0.2


class Narrator:
    """Tells on a console, which is stderr's."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def say(self, text: str) -> None:
        """One line."""
        self._console.print(Text.assemble((f"{self.elapsed():6.1f} s  ", "dim"), text), soft_wrap=True)

    def restore(self) -> None:
        """Show the cursor that a killed program has hidden."""
        self._console.show_cursor()

    def wait(self, seconds: float, told: Callable[[], str]) -> None:
        """Let time pass; on a terminal ``told()`` is shown meanwhile."""
        until = time.monotonic() + seconds
        with self._console.status(told()) as status:
            while (left := until - time.monotonic()) > 0:
                time.sleep(min(_TICK, left))
                status.update(told())
