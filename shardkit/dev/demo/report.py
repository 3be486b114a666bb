"""What the demo found: as JSON, and drawn for people.

Driven by the command; the numbers come from `run`. Every promise that was checked is one `Check`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardkit.core.errors import DemoFailed
from shardkit.core.topology import Topology

from .content import KEY_COLUMNS
from .drawing import Palette, ring, side_by_side
from .measures import Latency

Rows = Mapping[str, Mapping[str, int]]
"""Rows by shard and table."""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Check:
    """A promise, whether it held, and what was found."""

    name: str
    held: bool
    found: str = ""


@dataclass(frozen=True, slots=True)
class TransferReport:
    """One transfer as the catalog recorded it.

    ``rows`` were copied or caught up, and compared by content before the cutover. The copy lasts from its begin, in
    seconds since 1970, until a mover saw its end. ``pause_ms`` has the whole write pause and its parts.
    """

    source: str
    target: str
    phase: str
    rows: int
    copy_began: float
    copy_seconds: float
    pause_ms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ChangeReport:
    """One change of placement: its name, and what it moved."""

    name: str
    positions_moved: int
    positions_minimum: int
    transfers: tuple[TransferReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """The change for ``--json``."""
        return {
            "change": self.name,
            "positions_moved": self.positions_moved,
            "positions_minimum": self.positions_minimum,
            "cutover_pause_ms": [transfer.pause_ms.get("total") for transfer in self.transfers],
            "rows_copied": sum(transfer.rows for transfer in self.transfers),
        }


@dataclass(frozen=True)
class Report:
    """The result of a demo. ``problems`` are sentences by kind: errors, lost, doubled, stale and others; ``counts``
    their numbers."""

    options: Mapping[str, Any]
    operations: int
    writes: int
    rows_checked: int
    counts: Mapping[str, int]
    problems: Mapping[str, list[str]]
    topology_before: Topology
    topology_after: Topology
    rows_before: Rows
    rows_after: Rows
    positions_moved: int
    positions_minimum: int
    latency: Mapping[str, Latency]
    transfers: tuple[TransferReport, ...]
    kills: tuple[str, ...]
    seconds: Mapping[str, float]
    checks: tuple[Check, ...]
    changes: tuple[ChangeReport, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The document of ``--json``.

        ``rows_copied`` are those of the transfers, and ``copy_seconds`` is the time of the clock in which they
        arrived: once for transfers side by side, and with the time in which no mover ran if one was killed meanwhile.
        ``operations`` are all, ``latency_ms`` has those of each phase. ``changes`` has what each change moved, the
        numbers without are those of all together.
        """
        return {
            "passed": not self.failed,
            "checks": [asdict(check) for check in self.checks],
            "options": dict(self.options),
            "operations": self.operations,
            "acknowledged_writes": self.writes,
            "rows_checked": self.rows_checked,
            **self.counts,
            "problems": {kind: list(found) for kind, found in self.problems.items() if found},
            "rows_before": {name: dict(tables) for name, tables in self.rows_before.items()},
            "rows_after": {name: dict(tables) for name, tables in self.rows_after.items()},
            "positions_moved": self.positions_moved,
            "positions_minimum": self.positions_minimum,
            "changes": [change.as_dict() for change in self.changes],
            "latency_ms": {
                phase: {
                    "p50": latency.p50,
                    "p99": latency.p99,
                    "max": latency.max,
                    "operations": latency.operations,
                }
                for phase, latency in self.latency.items()
            },
            "cutover_pause_ms": [transfer.pause_ms.get("total") for transfer in self.transfers],
            "rows_copied": sum(transfer.rows for transfer in self.transfers),
            "copy_seconds": round(self.copy_seconds, 3),
            "transfers": [asdict(transfer) for transfer in self.transfers],
            "movers_killed": list(self.kills),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    @property
    def copy_seconds(self) -> float:
        """From the begin of the first copy to the end of the last one, without what lay between two."""
        spans = sorted((one.copy_began, one.copy_began + one.copy_seconds) for one in self.transfers)
        total, until = 0.0, 0.0
        for began, ended in spans:
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total

    @property
    def failed(self) -> list[Check]:
        """The checks that did not hold."""
        return [check for check in self.checks if not check.held]

    def raise_if_failed(self) -> None:
        """`DemoFailed`, naming the checks that did not hold."""
        if self.failed:
            raise DemoFailed(
                "The demo failed: "
                + "; ".join(
                    f"{check.name}: {check.found}" if check.found else check.name for check in self.failed
                ),
                checks=[check.name for check in self.failed],
            )

    # --- for people ------------------------------------------------------------------------------------------------

    def draw(self, console: Console) -> None:
        """The summary."""
        both = (*self.topology_after.shards, *self.topology_before.shards)
        palette = Palette(list(dict.fromkeys(shard.name for shard in both)), coloured=console.color_system is not None)
        rings = [ring(self.topology_before, "before", palette), ring(self.topology_after, "after", palette)]
        _section(console, "The ring, from the smallest position at the top clockwise")
        console.print(side_by_side(rings, 8), soft_wrap=True)
        moved = self.positions_moved / 2**64
        minimum = self.positions_minimum / 2**64
        _section(console, "Rows")
        console.print(self._rows_table())
        console.print(
            f"  keys moved: {moved:.4%} of all positions; the theoretical minimum is {minimum:.4%}",
            soft_wrap=True,
        )
        for change in self.changes if len(self.changes) > 1 else ():
            moved, minimum = change.positions_moved / 2**64, change.positions_minimum / 2**64
            console.print(f"    {change.name}: {moved:.4%}; {minimum:.4%}", soft_wrap=True)
        _section(console, "The move")
        console.print(self._transfers_table())
        if "copy" in self.kills:
            console.print("  A copy goes on while no mover runs, and so does its time.", soft_wrap=True)
        _section(console, "Latency of the operations in each phase")
        console.print(self._latency_table())
        console.print(
            f"  {self.operations:,} operations in all, with those of the warm-up and between two phases",
            soft_wrap=True,
        )
        _section(
            console,
            f"Checks of {self.writes:,} acknowledged writes of rows against {self.rows_checked:,} rows",
        )
        for check in self.checks:
            mark = Text("ok  ", "green") if check.held else Text("FAIL", "bold red")
            line = Text.assemble(
                "  ", mark, f"  {check.name}", (f": {check.found}" if check.found else "", "dim")
            )
            console.print(line, soft_wrap=True)
        for kind, found in self.problems.items():
            for sentence in found[:_SHOWN]:
                console.print(Text(f"  {kind}: {sentence}", "red"), soft_wrap=True)

    def _rows_table(self) -> Table:
        table = _table("shard", *KEY_COLUMNS, "all")
        for name in self.rows_after:
            before, after = self.rows_before[name], self.rows_after[name]
            cells = [_change(before[each], after[each]) for each in KEY_COLUMNS]
            table.add_row(name, *cells, _change(sum(before.values()), sum(after.values())))
        return table

    def _transfers_table(self) -> Table:
        parts = ("lock", "catch_up", "verify", "decide", "open")
        table = _table(
            "transfer", "phase", "rows", "copied in", "write pause", *(p.replace("_", " ") for p in parts)
        )
        for transfer in self.transfers:
            pause = transfer.pause_ms
            table.add_row(
                f"{transfer.source} to {transfer.target}",
                transfer.phase,
                f"{transfer.rows:,}",
                f"{transfer.copy_seconds:.2f} s",
                f"{pause['total']:.1f} ms" if pause else "unknown",
                *(f"{pause[part]:.1f}" if part in pause else "" for part in parts),
            )
        return table

    def _latency_table(self) -> Table:
        table = _table("phase", "operations", "p50", "p99", "max")
        for phase, latency in self.latency.items():
            milliseconds = (f"{value:.1f} ms" for value in (latency.p50, latency.p99, latency.max))
            table.add_row(phase, f"{latency.operations:,}", *milliseconds)
        return table


def _section(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, "bold"), soft_wrap=True)


def _table(*headers: str) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=True)
    for number, header in enumerate(headers):
        made.add_column(header, justify="right" if number else "left", no_wrap=True)
    return made


def _change(before: int, after: int) -> str:
    return f"{before:,} → {after:,}"
