"""`shardkit shard set-url`: where the databases of shards are, after servers moved or standbys took over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console

from shardkit.core.errors import UsageError
from shardkit.rebalance import addresses
from shardkit.rebalance.addresses import Located
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections
from shardkit.storage.urls import redacted

from . import jobs
from .options import AsJson, CatalogUrl, database_url
from .output import narrate, next_step, show, table

Changes = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME=URL...", help="Shards, and where their databases are now; passwords are not stored."
    ),
]
OldStopped = Annotated[
    bool,
    typer.Option(
        "--old-stopped",
        envvar="SHARDKIT_OLD_STOPPED",
        help="Go on where the server at an old URL answers but does not let us look: it takes no writes.",
    ),
]


def set_url(
    changes: Changes, catalog: CatalogUrl, old_stopped: OldStopped = False, as_json: AsJson = False
) -> None:
    """Say where the databases of shards are now, after their servers moved or standbys took over.

    Each has to be this very shard and to take writes, and the one at the old URL must not. No row moves. Applications
    that run learn of it when the old URL does not answer. What an interrupted change left is settled first.
    """
    urls = _parsed(changes)
    with Catalog.open(catalog) as opened, ShardConnections("shardkit set-url") as shards:
        opened.take_lease()
        located = addresses.set_urls(opened, shards, urls, old_stopped=old_stopped)
        todo = _next(opened, located)
    for name in located.away:
        narrate(f"note: shard {name} does not answer, or something else does in its place.")
    entries = [
        {
            "shard": name,
            "url": redacted(located.topology.named(name).url),
            "behind": name in located.behind,
        }
        for name in urls
    ]

    def draw(console: Console) -> None:
        console.print(table(("shard", "url"), [[entry["shard"], entry["url"]] for entry in entries]))
        next_step(console, todo)

    show(
        {
            "version": located.topology.version,
            "shards": entries,
            "unreachable": list(located.away),
            "next": todo,
        },
        as_json,
        draw,
    )


def _parsed(changes: Iterable[str]) -> dict[str, str]:
    """The URLs by name; `UsageError` for what is none."""
    urls: dict[str, str] = {}
    for change in changes:
        name, _, url = change.partition("=")
        if not name or "://" not in url:
            raise UsageError(
                f"Not NAME=URL: {redacted(change) if '://' in name else change!r}.",
                hint="It looks like s1=postgresql://user@host:5432/database.",
            )
        if name in urls:
            raise UsageError(f"Shard {name} is named twice.", hint="Name each shard once.")
        urls[name] = database_url(url)
    return urls


def _next(catalog: Catalog, located: Located) -> str | None:
    if located.behind:
        name = located.behind[0]
        return f"`shardkit shard readmit {name}` brings it forward: it is older than the topology in force."
    if located.away:
        return f"the same command again, when {', '.join(located.away)} can be told."
    return jobs.next_step(catalog, located.topology)
