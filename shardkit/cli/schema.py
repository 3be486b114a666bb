"""`shardkit schema declare`: which tables are sharded, reference or home tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from sqlalchemy import MetaData

from shardkit.core.errors import UsageError
from shardkit.core.topology import DeclaredTable, HomeTable, ReferenceTable, ShardedTable, Topology
from shardkit.orm.declare import declared_tables, problems
from shardkit.storage import membership
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections

from . import jobs
from .models import METAVAR, Provisional, load
from .options import AsJson, CatalogUrl
from .output import narrate, next_step, show, table
from .reach import Lent

_KINDS = {ShardedTable: "sharded", ReferenceTable: "reference", HomeTable: "home"}

Models = Annotated[
    str,
    typer.Argument(metavar=METAVAR, envvar="SHARDKIT_MODELS", help="The models, as in app.models:Base."),
]
Create = Annotated[
    bool,
    typer.Option(
        "--create", envvar="SHARDKIT_CREATE", help="Create the missing tables on every shard first."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Which tables are where.", no_args_is_help=True)
    group.command("declare")(declare)
    app.add_typer(group, name="schema")


def declare(models: Models, catalog: CatalogUrl, create: Create = False, as_json: AsJson = False) -> None:
    """Declare the tables of the application's models to the cluster: sharded, reference and home tables.

    Sharded tables must exist, alike, on every shard, and be empty where there is more than one; reference tables must
    hold the same rows on every shard. What is declared already stays as it is.
    """
    metadata = load(models)
    wanted = declared_tables(metadata)
    if not wanted:
        raise UsageError(
            f"No table of {models} is declared as sharded, reference or home table.",
            hint='Put @sharded(by="..."), @reference or @home("...") above the models.',
        )
    for problem in problems(metadata):
        narrate(f"note: {problem}")
    with Catalog.open(catalog) as opened, ShardConnections("shardkit declare") as shards:
        before = opened.require_current()
        opened.take_lease()
        if create:
            _create(opened, before, metadata, wanted)
        topology = membership.declare(opened, shards, wanted)
    with Catalog.open(catalog) as opened:
        todo = jobs.next_step(opened, topology)
    _show(topology, before, todo, as_json)


def _create(
    catalog: Catalog, topology: Topology, metadata: MetaData, wanted: Iterable[DeclaredTable]
) -> None:
    """Make the missing tables on all shards, or on none."""
    catalog.require_no_job()
    new = [each for each in wanted if (each.schema, each.name) not in topology.declared_tables]
    with Lent("shardkit create") as shards, Provisional(metadata) as provisional:
        for shard in topology.shards:
            shards.get(shard)
        for shard in topology.shards:
            shards.lend(shard.id, provisional.create(shard.url, shard.name))
        membership.check_declared(topology, shards, new)
        provisional.commit()


def _show(topology: Topology, before: Topology, todo: str | None, as_json: bool) -> None:
    entries: list[dict[str, Any]] = [
        {
            "schema": each.schema,
            "name": each.name,
            "kind": _KINDS[type(each)],
            "key": each.key if isinstance(each, ShardedTable) else None,
            "key_type": each.key_type if isinstance(each, ShardedTable) else None,
            "home": each.shard if isinstance(each, HomeTable) else None,
            "new": (each.schema, each.name) not in before.declared_tables,
        }
        for each in topology.declared_tables.values()
    ]

    def draw(console: Console) -> None:
        rows = [
            [f"{e['schema']}.{e['name']}", e["key"] or _place(e), e["key_type"], e["new"]] for e in entries
        ]
        console.print(table(("table", "key", "type", "new"), rows))
        next_step(console, todo)

    show({"version": topology.version, "tables": entries, "next": todo}, as_json, draw)


def _place(entry: dict[str, Any]) -> str:
    return f"home {entry['home']}" if entry["home"] else "reference"
