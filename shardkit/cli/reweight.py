"""`shardkit shard reweight`: other weights for shards, and the job that moves keys accordingly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from shardkit.core.errors import UsageError
from shardkit.core.move import Mode
from shardkit.core.topology import Topology
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections

from . import placing, plans
from .asking import confirm, refuse_silence
from .options import AsJson, CatalogUrl, MoveMode, Parallel, Patience, PlanOnly, Yes
from .output import narrate
from .running import PARALLEL, PATIENCE

Changes = Annotated[
    list[str], typer.Argument(metavar="NAME=WEIGHT...", help="Shards and the weights they get.")
]


def reweight(
    changes: Changes,
    catalog: CatalogUrl,
    plan_only: PlanOnly = False,
    yes: Yes = False,
    mode: MoveMode = Mode.AUTO,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    as_json: AsJson = False,
) -> None:
    """Give shards other weights and move keys accordingly, while applications go on.

    A weight counts relative to the others; 0 drains the shard, which stays and owns nothing. The weights are recorded
    first. A run that is stopped goes on with `shardkit rebalance resume`; after an abort, `shardkit rebalance run`
    moves the rest, and `shard reweight` with the weights of before turns back.
    """
    given = weights(changes)
    with Catalog.open(catalog) as opened, ShardConnections("shardkit plan") as shards:
        topology = placing.current(opened)
        wish = _wish(topology, given)
        placement, planned = placing.look(opened, shards, topology, wish, mode)
    job = None
    if not plan_only:
        if placement.transfers:
            plans.refuse_problems(planned)
            refuse_silence(yes)
            confirm(planned, yes)
        job = placing.carry_out(catalog, wish, placement, placing.How(mode, parallel, patience))
        if job is None:
            narrate("The weights are recorded.")
    document = {
        "weights": [{"name": name, "weight": weight} for name, weight in given.items()],
        "plan": planned,
        "job": job,
    }
    placing.show_done(catalog, document, as_json, plan_only=plan_only)


def weights(changes: Iterable[str]) -> dict[str, int]:
    """The weights by name; `UsageError` for what is none."""
    given: dict[str, int] = {}
    for change in changes:
        name, _, number = change.rpartition("=")
        if not name or not (number.isascii() and number.isdigit()):
            raise UsageError(
                f"Not NAME=WEIGHT: {change!r}.", hint="A weight is a whole number from 0 up, as in `s1=50`."
            )
        if name in given:
            raise UsageError(f"Shard {name} is named twice.", hint="Name each shard once.")
        given[name] = int(number)
    return given


def _wish(topology: Topology, given: dict[str, int]) -> placing.Wish:
    by_id = {topology.named(name).id: weight for name, weight in given.items()}
    listed = " ".join(f"{name}={weight}" for name, weight in given.items())
    return placing.Wish(
        f"reweight {listed}",
        "reweight",
        lambda now, version: now.reweighted(version, by_id),
        {"weights": given},
    )
