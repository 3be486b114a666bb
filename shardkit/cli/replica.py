"""`shardkit shard replica`: which standbys of a shard applications may read from."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from shardkit.core.topology import Topology
from shardkit.storage import replicas
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections
from shardkit.storage.urls import redacted

from .options import AsJson, CatalogUrl, database_url
from .output import next_step, show, table

Name = Annotated[str, typer.Argument(help="The shard.")]
Url = Annotated[
    str,
    typer.Argument(
        callback=database_url, help="The database on one of its standbys; the password is not stored."
    ),
]
Remove = Annotated[
    bool,
    typer.Option("--remove", envvar="SHARDKIT_REMOVE", help="Take it off the list; it need not answer."),
]

READ = 'Sessions read from it with execution_options(read_from="replica").'


def replica(
    name: Name, url: Url, catalog: CatalogUrl, remove: Remove = False, as_json: AsJson = False
) -> None:
    """List a physical standby of a shard, so that applications can read from it; or take it off the list.

    Nothing closes and no row moves. Applications that run learn of it with the next topology they meet, or when they
    ask for a replica of a shard that lists none.
    """
    with Catalog.open(catalog) as opened, ShardConnections("shardkit replica") as shards:
        opened.take_lease()
        change = replicas.remove if remove else replicas.add
        topology = change(opened, shards, name, url)
    _show(topology, name, as_json, None if remove else READ)


def _show(topology: Topology, name: str, as_json: bool, todo: str | None) -> None:
    urls = [redacted(url) for url in topology.named(name).replicas]

    def draw(console: Console) -> None:
        console.print(table(("shard", "replica"), [[name, url] for url in urls] or [[name, "none"]]))
        next_step(console, todo)

    show({"version": topology.version, "shard": name, "replicas": urls, "next": todo}, as_json, draw)
