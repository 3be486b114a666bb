"""A job as the operator sees it: its transfers, what they do or wait for, who works on it, and the next step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from shardkit.core.move import FINAL, STILL, sentence
from shardkit.core.placement import plan
from shardkit.core.topology import Shard, Topology
from shardkit.rebalance.mover import weights_of
from shardkit.storage import leaving
from shardkit.storage.catalog import KEPT_HINT, Catalog, Job, TransferRow
from shardkit.storage.connections import ShardConnections

from .bars import counts
from .live import progress
from .output import duration, size, table
from .plans import slots

RESUME = "`shardkit rebalance resume` goes on with it; `shardkit rebalance abort` turns back."
ROLLED_BACK = (
    "the weights still ask for what was rolled back: `shardkit shard reweight` makes them those of now, `shardkit "
    "rebalance run` moves the rows again."
)
_KEEP = "`shardkit shard reweight NAME=WEIGHT` keeps it."


def describe(catalog: Catalog, job: Job) -> dict[str, Any]:
    """The job as a document.

    ``id``, ``kind``, ``state`` (running, kept, done, aborted, rolled back), ``paused`` (it was told to, since
    a mover last began), ``keep_source``, ``attempts``, ``last_error``, ``slots_moved``,
    ``slots_minimum``, ``mover`` (the process at work, or null), ``transfers``: each with ``id``, ``source``,
    ``target``, ``slots``, ``phase``, ``sentence``, ``waiting_for``, ``attempts``, ``last_error``, ``rows_expected``,
    ``rows_moved`` (compared by content), ``rows_purged``, ``copy_seconds``, ``pause_ms`` (of the cutover, whole and by
    part), ``pause_back_ms`` (of a rollback's), ``certificate`` (of the comparison), ``progress`` (what the mover
    reported last of this phase: ``rows``, ``rows_expected``, ``bytes``, ``bytes_expected``, ``rate``,
    ``seconds_left``, ``lag_bytes``; the last three null unless one is at work), ``live`` (see `live.progress`, asked of
    the servers now); those not known are null.
    """
    topology = catalog.current()
    assert topology is not None  # there is no job without shards
    rows = catalog.transfers(job.id)
    names = {shard.id: shard.name for shard in topology.shards}
    if any(row.source not in names or row.target not in names for row in rows):
        names = {**catalog.shards_ever(), **names}  # a shard has left since
    holder = catalog.lease_holder()
    with ShardConnections("shardkit status") as shards:
        transfers = [
            _transfer(catalog, topology, names, row, shards, holder is not None) for row in rows
        ]
    return {
        "id": job.id,
        "kind": job.kind,
        "state": "kept" if catalog.is_kept(job) else job.state,
        "paused": job.paused,
        "keep_source": job.keeps_source,
        "attempts": job.attempts,
        "last_error": job.last_error,
        "slots_moved": job.goal.slots_moved,
        "slots_minimum": job.goal.slots_minimum,
        "mover": holder,
        "transfers": transfers,
    }


def _transfer(
    catalog: Catalog,
    topology: Topology,
    names: Mapping[int, str],
    row: TransferRow,
    shards: ShardConnections,
    at_work: bool,
) -> dict[str, Any]:
    rows = row.record.get("certificate", {}).get("rows")
    copied = row.record.get("copy_seconds")
    return {
        "id": row.id,
        "source": names[row.source],
        "target": names[row.target],
        "slots": slots(row.arcs),
        "phase": row.phase.value,
        "sentence": sentence(row.phase),
        "waiting_for": row.waiting_for,
        "attempts": row.attempts,
        "last_error": row.last_error,
        "rows_expected": row.record.get("rows_expected"),
        "rows_moved": None if rows is None else sum(rows.values()),
        "rows_purged": row.record.get("rows_purged"),
        "copy_seconds": None if copied is None else round(copied, 3),
        "pause_ms": row.record.get("pause_ms"),
        "pause_back_ms": row.record.get("pause_back_ms"),
        "progress": _reported(row, at_work),
        "certificate": row.record.get("certificate"),
        "live": progress(catalog, topology, row, shards),
    }


def _reported(row: TransferRow, at_work: bool) -> dict[str, Any] | None:
    if row.progress is None or row.progress["phase"] != row.phase or row.phase in STILL:
        return None
    of_now = {name: row.progress[name] if at_work else None for name in ("rate", "seconds_left", "lag_bytes")}
    return {
        **{name: row.progress[name] for name in ("rows", "rows_expected", "bytes", "bytes_expected")},
        **of_now,
    }


def is_over(document: Mapping[str, Any]) -> bool:
    """Whether no mover has anything to do for the job that a document describes."""
    return bool(document["state"] != "running")


def next_step(catalog: Catalog, topology: Topology | None) -> str | None:
    """What the operator does now; None if there is nothing to do."""
    # A command that holds the lease itself has done its work when it asks.
    holder = catalog.lease_holder() if catalog.token is None else None
    if holder is not None:
        return f"wait for the mover at work ({holder}); `shardkit rebalance status --watch` follows it."
    job = catalog.running_job()
    if job is not None:
        return KEPT_HINT if catalog.is_kept(job) else RESUME
    if catalog.proposed() is not None:
        return "`shardkit rebalance resume` settles a change of topology that was interrupted."
    if topology is None:
        return "`shardkit shard add NAME URL` adds the first shard."
    if not topology.tables:
        return "`shardkit schema declare MODULE:ATTR` declares the sharded tables."
    if ready := leaving.ready(topology):
        return f"`shardkit shard remove {_listed(ready)}` lets it leave; {_KEEP}"
    if plan(topology, weights_of(topology)).transfers:
        if to_leave := [shard for shard in topology.shards if shard.leaving]:
            return f"`shardkit shard remove {_listed(to_leave)}` drains it and lets it leave; {_KEEP}"
        latest = catalog.latest_job()
        if latest is not None and latest.state == "rolled back":
            return ROLLED_BACK
        return "`shardkit rebalance run` gives every shard its share; `shardkit rebalance plan` shows what would move."
    return None


def _listed(shards: Iterable[Shard]) -> str:
    return " ".join(shard.name for shard in shards)


def draw(console: Console, job: Mapping[str, Any]) -> None:
    """Draw the job."""
    mover = f", mover {job['mover']}" if job["mover"] and not is_over(job) else ""
    paused = ", paused" if job["paused"] and not is_over(job) else ""
    console.print(f"Job {job['id']} ({job['kind']}): {job['state']}{paused}{mover}", soft_wrap=True)
    numbers = ("slots", "rows", "copy", "pause")
    rows = [
        [
            f"{move['source']} -> {move['target']}",
            move["phase"],
            move["slots"],
            _rows(move),
            None if move["copy_seconds"] is None else duration(move["copy_seconds"]),
            None if move["pause_ms"] is None else f"{move['pause_ms']['total']:.0f} ms",
        ]
        for move in job["transfers"]
    ]
    console.print(table(("transfer", "phase", *numbers), rows, right=numbers))
    for move in job["transfers"]:
        _draw_reasons(console, move)


def _rows(move: Mapping[str, Any]) -> str | None:
    if move["rows_moved"] is not None:
        return f"{move['rows_moved']:,}"
    return f"about {move['rows_expected']:,}" if move["rows_expected"] else None


def _draw_reasons(console: Console, move: Mapping[str, Any]) -> None:
    name = f"{move['source']} -> {move['target']}"
    if move["phase"] not in FINAL:
        told = ", ".join(_counts(move["progress"]) + _live(move["live"]))
        console.print(f"{name}: {move['sentence']}" + (f" ({told})" if told else ""), soft_wrap=True)
    if move["waiting_for"]:
        console.print(f"{name} waits: {move['waiting_for']}", soft_wrap=True)
    if move["last_error"]:
        console.print(f"{name} failed ({move['attempts']} times): {move['last_error']}", soft_wrap=True)


def _counts(reported: Mapping[str, Any] | None) -> list[str]:
    # How far the target is behind, the servers tell themselves.
    return counts({**reported, "lag_bytes": None}) if reported is not None else []


def _live(state: Mapping[str, Any] | None) -> list[str]:
    if state is None:
        return []
    if state["tables_copied"] < state["tables"]:
        copying = f"{state['rows_copying']:,} rows of the others"
        return [f"{state['tables_copied']} of {state['tables']} tables copied", copying]
    return [
        *([] if state["enabled"] else ["the replication has stopped"]),
        *([f"{size(state['lag_bytes'])} behind"] if state["lag_bytes"] else []),
        *([f"{size(state['wal_retained'])} of WAL retained"] if state["wal_retained"] else []),
    ]
