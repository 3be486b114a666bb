"""The bars of a job with more transfers than a screen has lines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shardkit.cli import bars
from shardkit.core.move import Phase
from shardkit.rebalance.progress import Progress


def test_only_transfers_that_run_have_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=24)
    monkeypatch.setattr(bars, "narration_console", lambda: console)
    with bars.Bars() as shown:
        for number in range(100):
            shown(Progress(number, "s1", f"s{number}", Phase.COPYING, rows=5, rows_expected=10))
            if number >= 2:
                shown(Progress(number - 2, "s1", f"s{number - 2}", Phase.DONE))
        progress = shown._bars
        assert progress is not None
        assert [task.description for task in progress.tasks if task.visible] == ["s1 -> s98", "s1 -> s99"]
    drawn = out.getvalue()
    for number in range(98):
        assert f"s1 -> s{number}: Done: the target owns the arcs, the source is clean." in drawn
