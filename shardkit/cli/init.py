"""`shardkit init`: make a catalog."""

from __future__ import annotations

import typer
from rich.console import Console

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
    created = membership.initialise(catalog)
    with Catalog.open(catalog) as opened:
        cluster = opened.cluster_id()
        todo = jobs.next_step(opened, opened.current())
    document = {"catalog": redacted(catalog), "cluster_id": str(cluster), "created": created, "next": todo}

    def draw(console: Console) -> None:
        verb = "is made" if created else "is up to date"
        console.print(f"The catalog {verb}: {redacted(catalog)} (cluster {cluster})", soft_wrap=True)
        next_step(console, todo)

    show(document, as_json, draw)
