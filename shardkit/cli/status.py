"""`shardkit status`: the cluster at a glance."""

from __future__ import annotations

from typing import Any

import psycopg
import typer
from rich.console import Console

from shardkit.core.errors import ShardkitError, ShardUnreachable
from shardkit.core.keyrange import SLOTS
from shardkit.core.topology import Shard, Topology
from shardkit.storage import fence
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection
from shardkit.storage.topologies import read_copy
from shardkit.storage.urls import redacted

from . import jobs, shard
from .options import AsJson, CatalogUrl
from .output import next_step, percent, show, table
from .reach import reach


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("status")(status)


def status(catalog: CatalogUrl, as_json: AsJson = False) -> None:
    """Show the topology, every shard and its fence, the unfinished job, and the next step.

    Succeeds also while shards do not answer; `shardkit doctor` judges.
    """
    document = look(catalog)

    def draw(console: Console) -> None:
        _draw(console, document)

    show(document, as_json, draw)


def look(catalog: str) -> dict[str, Any]:
    """The cluster as a document."""
    with Catalog.open(catalog) as opened:
        topology = opened.current()
        job = opened.running_job()
        pending = opened.proposed()
        return {
            "catalog": redacted(catalog),
            "cluster_id": str(opened.cluster_id()),
            "version": topology.version if topology is not None else None,
            "pending_version": pending.version if pending is not None else None,
            "mover": opened.lease_holder(),
            "shards": _shards(topology) if topology is not None else [],
            "tables": [
                {"schema": each.schema, "name": each.name, "key": each.key, "key_type": each.key_type}
                for each in (topology.tables if topology is not None else ())
            ],
            "references": [
                {"schema": each.schema, "name": each.name}
                for each in (topology.references if topology is not None else ())
            ],
            "homes": [
                {"schema": each.schema, "name": each.name, "shard": each.shard}
                for each in (topology.homes if topology is not None else ())
            ],
            "job": jobs.describe(opened, job) if job is not None else None,
            "next": jobs.next_step(opened, topology),
        }


def _shards(topology: Topology) -> list[dict[str, Any]]:
    with reach(topology.shards, "shardkit status") as reached:
        return [
            {**described, **_state(topology.by_id[described["id"]], reached[described["id"]])}
            for described in shard.describe(topology)
        ]


def _state(shard: Shard, connection: Connection | ShardUnreachable) -> dict[str, Any]:
    """``reachable``, ``fence``, whether the shard holds it, the version of its copy, and what keeps it away."""
    if isinstance(connection, ShardUnreachable):
        held, version, error = None, None, connection.message
    else:
        try:
            names = fence.relations(connection)
            copy = read_copy(connection)
        except (psycopg.Error, ShardkitError) as refused:  # a damaged shard must not hide the others
            names, copy, error = set(), None, " ".join(str(refused).split())
        else:
            error = None
        held = shard.fence.relation in names
        version = copy.version if copy is not None else None
    return {
        "reachable": not isinstance(connection, ShardUnreachable),
        "fence": shard.fence.relation,
        "fence_held": held,
        "copy_version": version,
        "error": error,
    }


def _draw(console: Console, document: dict[str, Any]) -> None:
    console.print(
        f"Catalog {document['catalog']}, cluster {document['cluster_id']}, "
        f"topology {document['version'] or 'none yet'}",
        soft_wrap=True,
    )
    rows = [
        [
            each["name"],
            "unreachable" if not each["reachable"] else "ok" if each["fence_held"] else "other fence",
            each["slots"],
            percent(each["slots"], SLOTS),
            each["arcs_in_transit"] or None,
            each["fence"],
            each["url"],
        ]
        for each in document["shards"]
    ]
    headers = ("shard", "state", "slots", "share", "arcs in transit", "fence", "database")
    console.print(table(headers, rows, right=("slots", "share", "arcs in transit")))
    for each in document["shards"]:
        if each["error"]:
            console.print(f"{each['name']}: {each['error']}", soft_wrap=True)
    listed = ", ".join(
        f"{t['schema']}.{t['name']} by {t['key']} ({t['key_type']})" for t in document["tables"]
    )
    console.print(f"Sharded tables: {listed or 'none'}", soft_wrap=True)
    references = ", ".join(f"{t['schema']}.{t['name']}" for t in document["references"])
    if references:
        console.print(f"Reference tables: {references}", soft_wrap=True)
    homes = ", ".join(f"{t['schema']}.{t['name']} on {t['shard']}" for t in document["homes"])
    if homes:
        console.print(f"Home tables: {homes}", soft_wrap=True)
    if document["job"] is not None:
        jobs.draw(console, document["job"])
    next_step(console, document["next"])
