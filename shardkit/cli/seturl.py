"""`shardkit shard set-url`: where the database of a shard is, after its server moved or a standby took over."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from shardkit.core.errors import UsageError
from shardkit.rebalance.redirect import redirect
from shardkit.storage import addresses
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections
from shardkit.storage.urls import redacted, sqlalchemy_url

from . import jobs
from .options import AsJson, CatalogUrl
from .output import narrate, next_step, show, table

Name = Annotated[str, typer.Argument(help="The shard.")]
Url = Annotated[str, typer.Argument(help="Where its database is now; the password is not stored.")]


def set_url(name: Name, url: Url, catalog: CatalogUrl, as_json: AsJson = False) -> None:
    """Say where the database of a shard is now, after its server moved or a standby took over.

    It has to be this very shard and to take writes, and the one at the old URL must not. No row moves. Applications
    that run learn of it when the old URL does not answer. What an interrupted change left is settled first.
    """
    if sqlalchemy_url(url).database is None:
        raise UsageError(
            f"The URL names no database: {redacted(url)}",
            hint="It looks like postgresql://user@host:5432/database.",
        )
    with Catalog.open(catalog) as opened, ShardConnections("shardkit set-url") as shards:
        opened.take_lease()
        located = addresses.set_url(opened, shards, name, url)
        redirect(opened, shards, located.topology.named(name).id)
        todo = (
            f"`shardkit shard readmit {name}` brings it forward: it is older than the topology in force."
            if located.is_behind
            else jobs.next_step(opened, located.topology)
        )
    for shard in located.away:
        narrate(f"note: shard {shard} does not answer; run this again when it does.")
    stored = redacted(located.topology.named(name).url)

    def draw(console: Console) -> None:
        console.print(table(("shard", "url"), [[name, stored]]))
        next_step(console, todo)

    show(
        {
            "version": located.topology.version,
            "shard": name,
            "url": stored,
            "behind": located.is_behind,
            "unreachable": list(located.away),
            "next": todo,
        },
        as_json,
        draw,
    )
