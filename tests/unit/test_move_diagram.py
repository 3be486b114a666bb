"""The diagram of a transfer's life in the documents is the one that the table gives.

``python tests/unit/test_move_diagram.py`` writes it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from shardkit.core.move import FINAL, TABLE, Event, Phase, Transition, can_abort

DOCUMENT = Path(__file__).parents[2] / "docs" / "how-it-works.md"
GROUPS = (
    ("undecided", "before the decision", Phase.ABORTING),
    ("undecided_back", "before the decision to go back", Phase.STAYING),
)
BEGIN, END = "<!-- move diagram: begin -->\n", "<!-- move diagram: end -->\n"


def diagram(table: Iterable[Transition]) -> str:
    """The section between the marks: a Mermaid state diagram, then what the operator reads on each transition."""
    rows = list(table)
    return "\n".join(
        [
            "```mermaid",
            "stateDiagram-v2",
            f"    [*] --> {_id(rows[0].phase)}",
            *(line for group in GROUPS for line in _group(rows, *group)),
            *_arrows(row for row in rows if not _inside(row) and not _aborts(row)),
            *(f"    {_id(phase)} --> [*]" for phase in Phase if phase in FINAL),
            "```",
            "",
            "| phase | event | next phase | the operator reads |",
            "|---|---|---|---|",
            *(f"| {row.phase} | {row.event} | {row.next} | {row.sentence} |" for row in rows),
            "",
        ]
    )


def _group(rows: list[Transition], name: str, title: str, turned: Phase) -> Iterator[str]:
    """What can be aborted, and the one arrow for all of it."""
    yield f'    state "{title}" as {name} {{'
    yield from (
        f"    {line}" for line in _arrows(row for row in rows if _inside(row) and _name(row.phase) == name)
    )
    yield "    }"
    yield f"    {name} --> {_id(turned)} : {Event.ABORT}"


def _name(phase: Phase) -> str:
    """The group of a phase that can be aborted."""
    turned = next(row.next for row in TABLE if (row.phase, row.event) == (phase, Event.ABORT))
    return next(name for name, _, to in GROUPS if to is turned)


def _inside(row: Transition) -> bool:
    """Whether the transition begins and ends where the arcs can still stay where they are."""
    return can_abort(row.phase) and can_abort(row.next)


def _aborts(row: Transition) -> bool:
    """Whether the transition is part of the one arrow that leaves from all phases before a decision."""
    return row.event is Event.ABORT and can_abort(row.phase)


def _arrows(rows: Iterable[Transition]) -> Iterator[str]:
    return (f"    {_id(row.phase)} --> {_id(row.next)} : {row.event}" for row in rows)


def _id(phase: Phase) -> str:
    """Mermaid's names hold no spaces."""
    return phase.replace(" ", "_")


def _split(text: str) -> tuple[str, str, str]:
    before, rest = text.split(BEGIN)
    section, after = rest.split(END)
    return before, section, after


def test_the_document_shows_the_table() -> None:
    _, section, _ = _split(DOCUMENT.read_text())
    assert section == diagram(TABLE), f"run: python {Path(__file__).name}"


def test_every_transition_is_drawn() -> None:
    drawn = diagram(TABLE)
    for row in TABLE:
        start = _name(row.phase) if _aborts(row) else _id(row.phase)
        assert f"{start} --> {_id(row.next)} : {row.event}\n" in drawn


def test_another_table_gives_another_diagram() -> None:
    changed = [row._replace(next=Phase.DONE) if row.event is Event.OPENED else row for row in TABLE]
    assert diagram(changed) != diagram(TABLE)


if __name__ == "__main__":
    first, _, last = _split(DOCUMENT.read_text())
    DOCUMENT.write_text(first + BEGIN + diagram(TABLE) + END + last)
