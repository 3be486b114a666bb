"""`shardkit init`: make a catalog."""

from __future__ import annotations

import typer
from rich.console import Console

from shardkit.core.errors import NotInitialised
from shardkit.storage import membership
from shardkit.storage.catalog import Catalog
from shardkit.storage.urls import redacted

from . import jobs
from .options import AsJson, CatalogUrl
from .output import next_step, show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("init")(init)


def init(catalog: CatalogUrl, as_json: AsJson = False) -> None:
    """Make the catalog in a database, or bring an older one and its shards up to date.

    The database must exist; it may be one of the shards. Run again, it changes nothing.
    """
    there = _is_initialised(catalog)
    cluster = membership.initialise(catalog)
    with Catalog.open(catalog) as opened:
        todo = jobs.next_step(opened, opened.current())
    document = {"catalog": redacted(catalog), "cluster_id": str(cluster), "created": not there, "next": todo}

    def draw(console: Console) -> None:
        verb = "is up to date" if there else "is made"
        console.print(f"The catalog {verb}: {redacted(catalog)} (cluster {cluster})", soft_wrap=True)
        next_step(console, todo)

    show(document, as_json, draw)


def _is_initialised(catalog: str) -> bool:
    try:
        Catalog.open(catalog).connection.close()
    except NotInitialised:
        return False
    return True
