"""The progress of a mover on stderr: bars of what runs on a terminal, a line for each phase and reason elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Self

from rich.progress import BarColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from shardkit.core.move import STILL, Phase
from shardkit.rebalance.progress import Progress

from .output import duration, narration_console, size

SECONDS_BETWEEN_LINES = 10.0


class Bars:
    """A listener of the mover, called from its threads. A context manager that ends the drawing."""

    def __init__(self) -> None:
        self._console = narration_console()
        self.latest: dict[int, Progress] = {}
        self._bars = _bars(self._console) if self._console.is_terminal else None
        self._tasks: dict[int, int] = {}
        self._told: dict[int, tuple[Phase, str | None]] = {}
        self._told_at: dict[int, float] = {}

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Take the progress of one transfer."""
        self.latest[progress.transfer] = progress
        if self._bars is not None:
            self._draw(self._bars, progress)
        else:
            self._tell(progress)

    def say(self, text: str) -> None:
        """One line, above the bars."""
        self._console.print(text, soft_wrap=True)

    def show_cursor(self) -> None:
        """Give the terminal its cursor back: the process is about to be ended."""
        self._console.show_cursor(True)

    def _draw(self, bars: RichProgress, progress: Progress) -> None:
        if progress.transfer not in self._tasks:
            name = f"{progress.source} -> {progress.target}"
            self._tasks[progress.transfer] = bars.add_task(name, total=None, facts="", reason="")
        task = self._tasks[progress.transfer]
        if progress.phase in STILL:
            # A line instead of its bar: of a job with many transfers only those that run fit a screen.
            bars.update(task, visible=False)  # type: ignore[arg-type]
            self.say(f"{progress.source} -> {progress.target}: {progress.sentence}")
            return
        bars.update(
            task,  # type: ignore[arg-type]
            total=max(progress.rows_expected, progress.rows) or None,
            completed=progress.rows,
            facts=facts(progress),
            reason=f"waits: {progress.waiting_for}" if progress.waiting_for else progress.sentence,
        )

    def _tell(self, progress: Progress) -> None:
        what = (progress.phase, progress.waiting_for)
        now = time.monotonic()
        told_at = self._told_at.get(progress.transfer, 0.0)
        if self._told.get(progress.transfer) == what and now - told_at < SECONDS_BETWEEN_LINES:
            return
        if self._told.get(progress.transfer) == what and not progress.rows:
            return
        self._told[progress.transfer], self._told_at[progress.transfer] = what, now
        reason = f"waits: {progress.waiting_for}" if progress.waiting_for else progress.sentence
        counted = f" ({facts(progress)})" if progress.rows else ""
        self.say(f"{progress.source} -> {progress.target}: {reason}{counted}")


def facts(progress: Progress) -> str:
    """Rows, bytes, rate, time left and lag in one line."""
    return ", ".join(counts(progress.as_dict()))


def counts(reported: Mapping[str, Any]) -> list[str]:
    """The same as parts, of `Progress.as_dict`; what is null there is left out."""
    parts = []
    if reported["rows"]:
        # The expected number is an estimate, which may turn out too small.
        known = reported["rows_expected"] > reported["rows"]
        rows = f"{reported['rows']:,}"
        parts.append(f"{rows} of about {reported['rows_expected']:,} rows" if known else f"{rows} rows")
        if reported["bytes"]:
            parts.append(size(reported["bytes"]))
        if reported["rate"] is not None:
            parts.append(f"{reported['rate']:,.0f} rows/s")
        if known and reported["seconds_left"] is not None:
            parts.append(f"{duration(reported['seconds_left'])} left")
    if reported["lag_bytes"]:
        parts.append(f"{size(reported['lag_bytes'])} behind")
    return parts


class _Field(TextColumn):
    """A field of a task, never read as markup."""

    def __init__(self, name: str) -> None:
        super().__init__("", markup=False)
        self._name = name

    def render(self, task: Task) -> Text:
        return Text(task.description if self._name == "description" else str(task.fields[self._name]))


def _bars(console: object) -> RichProgress:
    return RichProgress(
        _Field("description"),
        BarColumn(bar_width=20),
        _Field("facts"),
        _Field("reason"),
        console=console,  # type: ignore[arg-type]
    )
