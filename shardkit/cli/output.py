"""What the commands print: the result on stdout, everything else on stderr.

A result is one document: with ``--json`` as it is, else drawn as tables by the command. Text that comes from servers
and users is never read as markup.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .options import JSON_VARIABLE

Document = Mapping[str, Any]
Draw = Callable[[Console], None]

_UNBOUNDED = 10_000
"""Columns of an output that is no terminal: a line is never broken, so that it can be searched."""


def result_console() -> Console:
    """Where a result is drawn."""
    return Console(
        width=None if sys.stdout.isatty() else _UNBOUNDED, highlight=False, markup=False, emoji=False
    )


def narration_console() -> Console:
    """Where progress and narration go."""
    return Console(
        stderr=True,
        width=None if sys.stderr.isatty() else _UNBOUNDED,
        highlight=False,
        markup=False,
        emoji=False,
    )


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line, which may be faulty, asks for JSON."""
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in flags or os.environ.get(JSON_VARIABLE, "").lower() in (
        "1",
        "true",
        "t",
        "yes",
        "y",
        "on",
    )


def show(document: Document, as_json: bool, draw: Draw) -> None:
    """Print the result."""
    if as_json:
        write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return
    console = result_console()
    with console.capture() as drawn:
        draw(console)
    write(drawn.get())


def write(text: str) -> None:
    """Write a result to stdout. A reader that has gone away is no failure: the work is done."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter fails on what is left in its buffer when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def narrate(text: str) -> None:
    """One line to the operator, on stderr."""
    narration_console().print(text, soft_wrap=True)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Iterable[str] = ()) -> Table:
    """A table without frames; ``right`` names the columns of numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        made.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    return made


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def next_step(console: Console, text: str | None) -> None:
    """What to do now, as every status ends."""
    console.print(f"Next: {text}" if text else "Nothing to do.", soft_wrap=True)


def count(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def percent(part: float, whole: float) -> str:
    """A share for people."""
    return f"{100 * part / whole:.2f} %"
