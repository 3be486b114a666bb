"""The question before rows move."""

from __future__ import annotations

import sys
from typing import Any

from shardkit.core.errors import NotConfirmed, UsageError

from . import plans
from .output import narration_console


def refuse_silence(yes: bool) -> None:
    """`UsageError` if a question would have to be asked and nobody could answer it; before anything is done."""
    if not yes and not sys.stdin.isatty():
        raise UsageError(
            "Nobody can be asked here: stdin is no terminal.", hint="Add --yes to move without asking."
        )


def confirm(plan: dict[str, Any], yes: bool) -> None:
    """Show the plan on stderr and ask; `NotConfirmed` for any answer but yes."""
    console = narration_console()
    plans.draw(console, plan)
    if yes:
        return
    console.print("Move them now? [y/N] ", end="", soft_wrap=True)
    answer = sys.stdin.readline().strip().lower()
    if answer not in ("y", "yes"):
        raise NotConfirmed
