"""`shardkit transactions list|recover`: what crashes left of transactions that wrote several shards."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console

from shardkit.core.errors import EXIT_RETRY
from shardkit.core.topology import Topology
from shardkit.storage import indoubt
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections
from shardkit.storage.indoubt import Doubt, State

from .options import AsJson, CatalogUrl
from .output import duration, next_step, show, table

RECOVER = "`shardkit transactions recover` ends what a crash left, and leaves alone what lives."


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Transactions that wrote several shards.", no_args_is_help=True)
    group.command("list")(list_)
    group.command("recover")(recover)
    app.add_typer(group, name="transactions")


def list_(catalog: CatalogUrl, as_json: AsJson = False) -> None:
    """List the transactions over several shards that are prepared and not ended; changes nothing.

    A transaction that is being committed is among them for milliseconds. Shards that do not answer are left out.
    """
    topology = _topology(catalog)
    with ShardConnections("shardkit transactions") as shards:
        doubts = indoubt.look(topology, shards)
        away = _away(topology, shards)
    _show(topology, doubts, away, as_json, RECOVER if doubts else None)


def recover(catalog: CatalogUrl, as_json: AsJson = False) -> None:
    """End what crashes left: commit what was decided, roll back what was not, leave alone what lives.

    Can be run at any time, and again. Exit code 5 if a shard could not be asked. The next move does the same by itself.
    """
    topology = _topology(catalog)
    with ShardConnections("shardkit transactions") as shards:
        doubts = indoubt.recover(topology, shards)
        away = _away(topology, shards)
    unknown = away or any(doubt.state is State.UNKNOWN for doubt in doubts)
    todo = "Remove the reason, then `shardkit transactions recover` again." if unknown else None
    _show(topology, doubts, away, as_json, todo)
    if unknown:
        raise typer.Exit(EXIT_RETRY)


def _topology(catalog: str) -> Topology:
    with Catalog.open(catalog) as opened:
        return opened.require_current()


def _away(topology: Topology, shards: ShardConnections) -> list[str]:
    reached = shards.reached
    return [shard.name for shard in topology.shards if shard.id not in reached]


def _show(topology: Topology, doubts: list[Doubt], away: list[str], as_json: bool, todo: str | None) -> None:
    def name(number: int) -> str:
        return topology.by_id[number].name if number in topology.by_id else f"number {number}"

    entries: list[dict[str, Any]] = [
        {
            "transaction": doubt.gid,
            "state": doubt.state.value,
            "decided_by": name(doubt.decider),
            "prepared_on": [part.shard.name for part in doubt.parts],
            "owner": doubt.parts[0].owner,
            "age_seconds": round(doubt.age_seconds, 1),
            "reason": doubt.reason or None,
        }
        for doubt in doubts
    ]

    def draw(console: Console) -> None:
        rows = [
            [
                entry["transaction"],
                entry["state"],
                entry["decided_by"],
                ", ".join(entry["prepared_on"]),
                duration(entry["age_seconds"]),
                entry["reason"],
            ]
            for entry in entries
        ]
        if rows:
            console.print(table(("transaction", "state", "decided by", "prepared on", "age", "reason"), rows))
        for shard in away:
            console.print(f"Shard {shard} does not answer.", soft_wrap=True)
        next_step(console, todo)

    show({"transactions": entries, "unreachable": away, "next": todo}, as_json, draw)
