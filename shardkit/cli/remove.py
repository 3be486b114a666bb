"""`shardkit shard remove`: drain shards to zero, then let them leave the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from shardkit.core.errors import JobRunning, UsageError
from shardkit.core.move import Mode
from shardkit.core.topology import Topology
from shardkit.storage import leaving
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections
from shardkit.storage.urls import redacted

from . import placing, plans
from .asking import confirm, refuse_silence
from .options import AsJson, CatalogUrl, MoveMode, Parallel, Patience, PlanOnly, Yes
from .output import narrate
from .running import PARALLEL, PATIENCE, carry

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="The shards that are to leave.")]


@dataclass(frozen=True)
class Leaving:
    """Shards that are to leave: those that are in the topology still, and the names of those that left already."""

    topology: Topology
    names: Sequence[str]
    gone: Sequence[str]

    @property
    def wish(self) -> placing.Wish:
        """Weight 0, and the wish to leave."""
        ids = [self.topology.named(name).id for name in self.names]
        return placing.Wish(
            f"remove {' '.join(self.names)}",
            "remove",
            lambda now, version: now.reweighted(version, dict.fromkeys(ids, 0), ids),
            {"shards": list(self.names)},
        )


def remove(
    names: Names,
    catalog: CatalogUrl,
    plan_only: PlanOnly = False,
    yes: Yes = False,
    mode: MoveMode = Mode.AUTO,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    as_json: AsJson = False,
) -> None:
    """Move all keys away from shards, while applications go on, and let them leave the cluster.

    Their databases stay, with empty sharded tables and the rows of reference tables. A run that is stopped goes on when
    the same command is given again, wherever it stopped, or with `shardkit rebalance resume`.
    """
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"Shard {min(twice)} is named twice.", hint="Name each shard once.")
    planned = job = None
    with Catalog.open(catalog) as opened, ShardConnections("shardkit plan") as shards:
        going = _found(opened, names)
        shown = _entries(going)
        goes_on = _goes_on(opened, going)
        if going.names and not goes_on:
            leaving.refuse(leaving.problems(going.topology, shards, going.names), going.names)
            placement, planned = placing.look(opened, shards, going.topology, going.wish, mode)
    if not plan_only:
        if goes_on:
            narrate("The job that drains it is unfinished: going on with it.")
            job = carry(catalog, lambda mover: mover.run(), parallel=parallel, patience=patience)
        elif planned is not None:
            plans.refuse_problems(planned)
            refuse_silence(yes)
            confirm(planned, yes, f"Let {' and '.join(going.names)} leave the cluster now?")
            job = placing.carry_out(catalog, going.wish, placement, placing.How(mode, parallel, patience))
        _tell_left(catalog, shown)
    document = {"shards": shown, "plan": planned, "job": job}
    placing.show_done(catalog, document, as_json, plan_only=plan_only, says=_says(shown))


def _found(catalog: Catalog, names: Sequence[str]) -> Leaving:
    """The named shards; those that left before are no mistake, so that the same command can be given again."""
    topology = placing.current(catalog)
    there = {shard.name for shard in topology.shards}
    missing = [name for name in names if name not in there]
    if missing:
        ever = set(catalog.shards_ever().values())
        for name in missing:
            if name not in ever:
                topology.named(name)  # NoSuchShard, with the names that there are
    return Leaving(topology, [name for name in names if name in there], missing)


def _goes_on(catalog: Catalog, going: Leaving) -> bool:
    """Whether the unfinished job is the one that drains these; `JobRunning` if it is another."""
    if catalog.running_job() is None:
        return False
    if not going.names or not all(going.topology.named(name).leaving for name in going.names):
        raise JobRunning
    return True


def _entries(going: Leaving) -> list[dict[str, Any]]:
    there = [
        {"name": name, "url": redacted(going.topology.named(name).url), "left": False} for name in going.names
    ]
    return there + [{"name": name, "url": None, "left": True} for name in going.gone]


def _tell_left(catalog: str, shown: list[dict[str, Any]]) -> None:
    with Catalog.open(catalog) as opened:
        there = {shard.name for shard in placing.current(opened).shards}
    for entry in shown:
        entry["left"] = entry["name"] not in there


def _says(shown: Sequence[dict[str, Any]]) -> str | None:
    left = [entry["name"] for entry in shown if entry["left"]]
    if not left:
        return None
    return (
        f"{' and '.join(left)} left the cluster. The database stays, with the rows of reference tables: drop it, or "
        "add it again."
    )
