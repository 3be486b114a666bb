"""Tables of figures: for a terminal, and for documents, where each stands between two marks, the first of which names
the command that makes it. A table is a list of rows, its head first."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

END = "<!-- end of figures -->"

Table = Sequence[Sequence[str]]


def aligned(table: Table) -> str:
    """For a terminal: figures to the right, what they are of to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.lstrip().ljust(widths[0]), *rest]))
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """For a document."""
    rows = [table[0], ["---", *("--:" for _ in table[0][1:])], *table[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def put(document: Path, command: str, *paragraphs: str) -> None:
    """Put paragraphs in place of what stands between the marks of a command; `ValueError` if they are not there."""
    mark = f"<!-- figures: made by `{command}` -->"
    before, rest = document.read_text().split(mark)
    _, after = rest.split(END, 1)
    text = "\n\n".join(paragraphs)
    document.write_text(f"{before}{mark}\n\n{text}\n\n{END}{after}")


def measured(*further: str) -> str:
    """When and on what, with further versions."""
    python = f"Python {platform.python_version()}"
    on = ", ".join([processor(), f"{os.cpu_count()} cores", python, *further])
    return f"Measured on {datetime.now(UTC):%Y-%m-%d}: {on}."


def processor() -> str:
    """Its name, where the system tells."""
    return _told("model name") or platform.processor() or platform.machine()


def exact_processor() -> str:
    """With the numbers by which makers tell theirs apart, which can share a name."""
    numbers = "/".join(_told(field) or "?" for field in ("cpu family", "model", "stepping"))
    return f"{processor()} {numbers}"


def _told(field: str) -> str | None:
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text().splitlines() if listed.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None
