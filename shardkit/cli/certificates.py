"""`shardkit rebalance certificate`: what a move compared before it was decided, and when."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from shardkit.core.errors import NothingToDo
from shardkit.storage.catalog import Catalog, TransferRow

from .options import AsJson, CatalogUrl
from .output import count, next_step, show, table

Number = Annotated[
    int | None,
    typer.Argument(
        metavar="[TRANSFER]", envvar="SHARDKIT_TRANSFER", help="The number of one transfer, of whichever job."
    ),
]


def certificate(catalog: CatalogUrl, transfer: Number = None, as_json: AsJson = False) -> None:
    """Show the certificates of the last job's transfers, or of one transfer: tables, digests, topologies, times."""
    with Catalog.open(catalog) as opened:
        rows = _rows(opened, transfer)
        topology = opened.current()
    names = {shard.id: shard.name for shard in topology.shards} if topology is not None else {}
    entries: list[dict[str, Any]] = [
        {
            "transfer": row.id,
            "job": row.job_id,
            "source": names.get(row.source),
            "target": names.get(row.target),
            "phase": row.phase.value,
            "certificate": row.record.get("certificate"),
        }
        for row in rows
    ]
    todo = (
        None
        if all(each["certificate"] for each in entries)
        else "`shardkit rebalance status` shows the others."
    )

    def draw(console: Console) -> None:
        for entry in entries:
            _draw(console, entry)
        next_step(console, todo)

    show({"certificates": entries, "next": todo}, as_json, draw)


def _rows(catalog: Catalog, transfer: int | None) -> list[TransferRow]:
    if transfer is not None:
        found = catalog.find_transfer(transfer)
        if found is None:
            raise NothingToDo(
                f"There is no transfer {transfer}.",
                hint="`shardkit rebalance status --json` shows the last ones.",
            )
        return [found]
    job = catalog.latest_job()
    if job is None:
        raise NothingToDo("There was no job yet.")
    return catalog.transfers(job.id)


def _draw(console: Console, entry: dict[str, Any]) -> None:
    found = entry["certificate"]
    console.print(
        f"Transfer {entry['transfer']}, {entry['source']} -> {entry['target']}, {entry['phase']}",
        soft_wrap=True,
    )
    if found is None:
        console.print("Nothing was compared yet.")
        return
    if "steps" in found:
        rows = [[name, number] for name, number in found["rows"].items()]
        console.print(table(("table", "rows"), rows, right=("rows",)))
        console.print(
            f"Compared in {count(found['steps'], 'step')}, each while nobody could write; the last one "
            f"{found.get('checked_at', 'at no known time')}.",
            soft_wrap=True,
        )
        return
    rows = [
        [name, sides["source"]["rows"], sides["source"]["sum"], sides["target"]["sum"]]
        for name, sides in found.get("digests", {}).items()
    ]
    console.print(table(("table", "rows", "digest on the source", "on the target"), rows, right=("rows",)))
    again = (
        f"{count(found.get('compared_again', 0), 'row')} compared again in {count(found['rounds'], 'round')}"
    )
    console.print(
        f"{count(found['chunks'], 'chunk')} compared, {again}, {found.get('checked_in_cutover', 'not known how many')} "
        f"in the cutover.",
        soft_wrap=True,
    )
    decided = found.get("decided_by")
    console.print(
        f"Verified {found.get('verified_at', 'at no known time')}"
        + (f", decided {found['decided_at']} by topology {decided[0]}" if decided else ""),
        soft_wrap=True,
    )
