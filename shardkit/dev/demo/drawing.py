"""The ring, drawn in a terminal: a band of cells, each in the colour of the shard that owns its positions.

The smallest position is at the top, and positions grow clockwise. Pure: topology in, `rich` text out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from shardkit.core.keyrange import SLOTS, slot_arc
from shardkit.core.topology import Topology

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "white")
SHADES = "█░▚▒◆·"
"""For each shard, where there are no colours."""

_ROWS = 15
_INNER = 0.62
"""Radius of the hole, of 1."""


def owner_of_slot(topology: Topology, slot: int) -> int:
    """The shard that owns the first position of a slot."""
    return topology.ring.owner_at(slot_arc(slot).first)


def cells(topology: Topology, rows: int = _ROWS) -> list[list[int | None]]:
    """Owners on a grid of ``rows`` and twice as many columns (a terminal's cells are half as wide as they are high);
    None outside the band."""
    grid: list[list[int | None]] = []
    for row in range(rows):
        line: list[int | None] = []
        for column in range(2 * rows):
            x = (column + 0.5) / rows - 1
            y = 1 - 2 * (row + 0.5) / rows
            turn = math.atan2(x, y) / (2 * math.pi) % 1
            inside = _INNER <= math.hypot(x, y) <= 1
            line.append(owner_of_slot(topology, int(turn * SLOTS) % SLOTS) if inside else None)
        grid.append(line)
    return grid


class Palette:
    """How each shard is drawn, the same in every drawing of a report."""

    def __init__(self, names: Sequence[str], *, coloured: bool) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._coloured = coloured

    def text(self, name: str, length: int = 1) -> Text:
        """``length`` cells of a shard."""
        place = self._places[name]
        if self._coloured:
            return Text("█" * length, style=COLOURS[place % len(COLOURS)])
        return Text(SHADES[place % len(SHADES)] * length)


def side_by_side(drawings: Sequence[Sequence[Text]], gap: int) -> Text:
    """Drawings beside each other, top lines level, ``gap`` columns between them."""
    widths = [max(map(len, drawing)) for drawing in drawings]
    lines = []
    for number in range(max(map(len, drawings))):
        line = Text()
        for drawing, width in zip(drawings, widths, strict=True):
            cell = drawing[number].copy() if number < len(drawing) else Text()
            cell.pad_right(width - len(cell) + gap)
            line.append_text(cell)
        line.rstrip()
        lines.append(line)
    return Text("\n").join(lines)


def ring(topology: Topology, title: str, palette: Palette) -> list[Text]:
    """The lines of the ring with a title in its hole, and a line for each shard below."""
    names = {shard.id: shard.name for shard in topology.shards}
    lines = []
    grid = cells(topology)
    for number, row in enumerate(grid):
        line = Text()
        for owner, run in groupby(row):
            length = len(list(run))
            line.append_text(Text(" " * length) if owner is None else palette.text(names[owner], length))
        if number == len(grid) // 2:
            line = _centred(line, title)
        lines.append(line)
    return [*lines, Text(), *_legend(topology, palette)]


def _centred(line: Text, title: str) -> Text:
    start = (len(line) - len(title)) // 2
    return Text.assemble(line[:start], (title, "bold"), line[start + len(title) :])


def _legend(topology: Topology, palette: Palette) -> list[Text]:
    lines = []
    for shard in topology.shards:
        share = topology.owned(shard.id).width / 2**64
        arcs = len(topology.owned(shard.id))
        noun = "arc" if arcs == 1 else "arcs"
        lines.append(
            Text.assemble(palette.text(shard.name, 2), f" {shard.name} {share:7.2%} in {arcs} {noun}")
        )
    return lines
