"""The question before rows move or go, or sequences change."""

from __future__ import annotations

import sys
from typing import Any

from shardkit.core.errors import NotConfirmed, UsageError

from . import plans
from .output import narration_console


def refuse_silence(yes: bool, hint: str = "Add --yes to move without asking.") -> None:
    """`UsageError` if a question would have to be asked and nobody could answer it; before anything is done."""
    if not yes and not sys.stdin.isatty():
        raise UsageError("Nobody can be asked here: stdin is no terminal.", hint=hint)


def confirm(plan: dict[str, Any], yes: bool, question: str = "Move them now?") -> None:
    """Show the plan on stderr and ask; `NotConfirmed` for any answer but yes."""
    plans.draw(narration_console(), plan)
    if not yes:
        ask(question)


def ask(question: str) -> None:
    """`NotConfirmed` for any answer but yes."""
    narration_console().print(f"{question} [y/N] ", end="", soft_wrap=True)
    answer = sys.stdin.readline().strip().lower()
    if answer not in ("y", "yes"):
        raise NotConfirmed
