"""The verdict: from what clients, mover and end check left to the checks and numbers of the report. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardkit.core.keyrange import SLOT_BITS, SLOTS
from shardkit.core.move import Phase
from shardkit.core.topology import Shard, Topology
from shardkit.storage.catalog import TransferRow

from .content import KEY_COLUMNS
from .findings import Findings
from .measures import Measures, by_phase
from .report import ChangeReport, Check, Report, Rows, TransferReport

SLOT = 1 << SLOT_BITS
"""Positions of a slot."""


@dataclass(frozen=True)
class ClientReport:
    """What a client tells at its end: numbers, and the first few in words."""

    operations: int
    errors: int
    described: list[str]
    stale: int
    stale_described: list[str]


@dataclass(frozen=True)
class Kill:
    """A mover that was to be killed at a point: whether it was, and the phases in which it left its transfers."""

    point: str
    as_asked: bool
    found: str


@dataclass(frozen=True)
class Move:
    """What is known of the move when it is over; ``status`` and ``output`` are those of the last mover. Of several
    changes one after the other, it is all of them, and ``changes`` has each."""

    before: Topology
    after: Topology
    rows_before: Rows
    transfers: list[TransferRow]
    status: int
    output: str
    kills: list[Kill]
    name: str = ""
    changes: tuple[Move, ...] = ()

    @classmethod
    def of(cls, changes: Sequence[Move]) -> Move:
        """Several changes as one move; the status is that of the first that failed."""
        first, last = changes[0], changes[-1]
        worst = next((one for one in changes if one.status), last)
        return cls(
            first.before,
            last.after,
            first.rows_before,
            [row for one in changes for row in one.transfers],
            worst.status,
            worst.output,
            [kill for one in changes for kill in one.kills],
            changes=tuple(changes),
        )

    @property
    def shards(self) -> dict[int, Shard]:
        """Every shard that there was, by number."""
        topologies = [topology for one in (self, *self.changes) for topology in (one.before, one.after)]
        return {shard.id: shard for topology in topologies for shard in topology.shards}

    @property
    def left(self) -> list[Shard]:
        """The shards that left."""
        return [shard for number, shard in self.shards.items() if number not in self.after.by_id]

    @property
    def positions_moved(self) -> int:
        """Positions that another shard owns now; of several changes, those of each."""
        if self.changes:
            return sum(one.positions_moved for one in self.changes)
        return sum(
            (self.before.owned(number) - self.after.owned(number)).width
            if number in self.after.by_id
            else self.before.owned(number).width
            for number in self.before.by_id
        )

    @property
    def positions_minimum(self) -> int:
        """The least that had to move, whoever planned it: from the weights alone, so that the planner is checked.

        On an even ring of whole slots a shard holds its exact share rounded down or up. So it had to give away what
        it held above the latter, and to get what it lacked of the former; one that left, all.
        """
        if self.changes:
            return sum(one.positions_minimum for one in self.changes)
        total = sum(shard.weight for shard in self.after.shards)
        gone = [number for number in self.before.by_id if number not in self.after.by_id]
        given = sum(self.before.owned(number).width // SLOT for number in gone)
        received = 0
        for shard in self.after.shards:
            held = self.before.owned(shard.id).width // SLOT if shard.id in self.before.by_id else 0
            given += max(0, held - -(-SLOTS * shard.weight // total))
            received += max(0, SLOTS * shard.weight // total - held)
        return max(given, received) * SLOT

    @property
    def unevenness(self) -> float:
        """Slots by which the shard that is farthest from its exact share misses it, after whichever change."""
        if self.changes:
            return max(one.unevenness for one in self.changes)
        total = sum(shard.weight for shard in self.after.shards)
        return max(
            abs(self.after.owned(shard.id).width / SLOT - SLOTS * shard.weight / total)
            for shard in self.after.shards
        )


@dataclass(frozen=True)
class Outcome:
    """Everything that was found."""

    clients: Sequence[ClientReport]
    measures: Sequence[Measures]
    phases: Mapping[str, tuple[float, float]]
    move: Move
    writes: int
    findings: Findings
    leftovers: list[str]
    rows_after: Rows

    def counts(self) -> dict[str, int]:
        """The numbers that must be 0."""
        found = self.findings
        return {
            "errors": sum(client.errors for client in self.clients),
            "lost": len(found.lost),
            "doubled": len(found.doubled),
            "stale": len(found.stale) + sum(client.stale for client in self.clients),
            "unwritten": len(found.unwritten),
            "misplaced": len(found.misplaced),
            "left_over": len(self.leftovers),
        }

    def problems(self) -> dict[str, list[str]]:
        """The same in words."""
        found = self.findings
        return {
            "errors": [text for client in self.clients for text in client.described],
            "lost": found.lost,
            "doubled": found.doubled,
            "stale": found.stale + [text for client in self.clients for text in client.stale_described],
            "unwritten": found.unwritten,
            "misplaced": found.misplaced,
            "left_over": self.leftovers,
        }

    def checks(self) -> tuple[Check, ...]:
        """Every promise that was looked at."""
        counts, move = self.counts(), self.move
        sentences = {
            "errors": "clients saw no error",
            "lost": "no acknowledged write is lost",
            "doubled": "no row is on two shards",
            "stale": "nothing stale was read or is stored",
            "unwritten": "no row is there that nobody wrote",
            "misplaced": "every row is on the shard that owns its key",
            "left_over": "the move left nothing behind",
        }
        checks = [
            Check(sentence, not counts[kind], f"{counts[kind]:,}") for kind, sentence in sentences.items()
        ]
        unfinished = [row.phase for row in move.transfers if row.phase is not Phase.DONE]
        finished = move.status == 0 and bool(move.transfers) and not unfinished
        moved, minimum = move.positions_moved, move.positions_minimum
        slots = f"{moved / SLOT:,.5g} slots of {SLOTS:,} moved; the minimum is {minimum / SLOT:,.5g}"
        return (
            *checks,
            Check("every client worked in every phase", self._all_worked()),
            Check(
                "the mover ended well", finished, "" if finished else f"status {move.status}: {move.output}"
            ),
            Check("no more keys moved than the theoretical minimum", moved == minimum, slots),
            Check("the ring is even", move.unevenness < 1, f"within {move.unevenness:.2f} of a slot"),
            *(
                Check(f"a mover was killed in mid-{kill.point}", kill.as_asked, kill.found)
                for kill in move.kills
            ),
        )

    def _all_worked(self) -> bool:
        complete = len(self.measures) == len(self.clients)
        return complete and all(
            one.durations(*span) for one in self.measures for span in self.phases.values()
        )

    def report(self, options: Mapping[str, Any], seconds: Mapping[str, float]) -> Report:
        """The report of a demo that was run with these options and took these times."""
        move = self.move
        names = {number: shard.name for number, shard in move.shards.items()}
        return Report(
            options=options,
            operations=sum(client.operations for client in self.clients),
            writes=self.writes,
            rows_checked=self.findings.rows,
            counts=self.counts(),
            problems=self.problems(),
            topology_before=move.before,
            topology_after=move.after,
            rows_before={
                name: move.rows_before.get(name, dict.fromkeys(KEY_COLUMNS, 0)) for name in self.rows_after
            },
            rows_after=self.rows_after,
            positions_moved=move.positions_moved,
            positions_minimum=move.positions_minimum,
            latency=by_phase(self.measures, self.phases),
            transfers=tuple(_transfer(row, names) for row in move.transfers),
            changes=tuple(_change(one, names) for one in move.changes or (move,)),
            kills=tuple(kill.point for kill in move.kills),
            seconds=seconds,
            checks=self.checks(),
        )


def _change(move: Move, names: Mapping[int, str]) -> ChangeReport:
    return ChangeReport(
        move.name,
        move.positions_moved,
        move.positions_minimum,
        tuple(_transfer(row, names) for row in move.transfers),
    )


def _transfer(row: TransferRow, names: Mapping[int, str]) -> TransferReport:
    record = row.record
    return TransferReport(
        names[row.source],
        names[row.target],
        row.phase.value,
        sum(record.get("certificate", {}).get("rows", {}).values()),
        record.get("copy_began", 0.0),
        record.get("copy_seconds", 0.0),
        record.get("pause_ms", {}),
    )
