"""`shardkit shard`: add, list; the other commands are in modules of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from sqlalchemy import MetaData

from shardkit.core.errors import MoveWaiting, RetryLater, UsageError
from shardkit.core.keyrange import SLOTS
from shardkit.core.move import Mode
from shardkit.core.placement import Placement, plan
from shardkit.core.topology import SHARD_NAME, Topology
from shardkit.rebalance.limits import Limits
from shardkit.rebalance.mover import plan_job, weights_of
from shardkit.storage import membership
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, ShardConnections, connect_shard
from shardkit.storage.urls import redacted, sqlalchemy_url, without_password

from . import jobs, plans
from .asking import confirm, refuse_silence
from .models import METAVAR, Provisional, load
from .options import (
    AsJson,
    CatalogUrl,
    KeepSource,
    MaxLag,
    MaxRows,
    MaxWal,
    MoveMode,
    Parallel,
    Patience,
    PlanOnly,
    Yes,
    database_url,
    one_of,
)
from .output import narrate, next_step, percent, show, table
from .pin import pin, unpin
from .reach import Lent
from .readmit import readmit
from .remove import remove
from .replica import replica
from .reweight import reweight
from .running import PARALLEL, PATIENCE, carry
from .seturl import set_url


def _shard_name(name: str) -> str:
    if not SHARD_NAME.fullmatch(name):
        raise UsageError(
            f"Not a shard name: {name!r}.",
            hint="Letters, digits, '_', '.' and '-', the first a letter or digit, 63 at most.",
        )
    return name


Name = Annotated[str, typer.Argument(callback=_shard_name, help="What to call the shard.")]
Url = Annotated[
    str,
    typer.Argument(
        callback=database_url,
        help="Its database. The password is not stored: it comes from PGPASSFILE, PGPASSWORD or a service file.",
    ),
]
Weight = Annotated[
    int,
    typer.Option(
        "--weight",
        min=0,
        envvar="SHARDKIT_WEIGHT",
        help="Its share of the keys, relative to the other shards.",
    ),
]
Models = Annotated[
    str | None,
    typer.Option(
        "--models",
        metavar=METAVAR,
        envvar="SHARDKIT_MODELS",
        help="Create the missing tables of these models there first.",
    ),
]
NoRun = Annotated[
    bool,
    typer.Option("--no-run", envvar="SHARDKIT_NO_RUN", help="Let it join, owning nothing; move no row yet."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="The PostgreSQL databases that hold the keys.", no_args_is_help=True)
    group.command("add")(add)
    group.command("remove")(remove)
    group.command("reweight")(reweight)
    # A negative number is a key and no flag.
    group.command("pin", context_settings={"ignore_unknown_options": True})(pin)
    group.command("unpin", context_settings={"ignore_unknown_options": True})(unpin)
    group.command("list")(list_)
    group.command("replica")(replica)
    group.command("set-url")(set_url)
    group.command("readmit")(readmit)
    app.add_typer(group, name="shard")


# --- add -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Newcomer:
    """The database that is to become a shard, and the tables it gets first."""

    name: str
    url: str
    weight: int
    metadata: MetaData | None


def add(
    name: Name,
    url: Url,
    catalog: CatalogUrl,
    weight: Weight = 100,
    models: Models = None,
    plan_only: PlanOnly = False,
    no_run: NoRun = False,
    keep_source: KeepSource = False,
    yes: Yes = False,
    mode: MoveMode = Mode.AUTO,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    max_rows_per_second: MaxRows = None,
    max_lag: MaxLag = None,
    max_wal_retained: MaxWal = None,
    as_json: AsJson = False,
) -> None:
    """Make a database a shard and move its share of the keys there, while applications go on.

    The first shard owns every key. Everything is checked before anything is changed. A run that is stopped goes on
    with `shardkit rebalance resume` once rows move, and before that by the same command.
    """
    one_of(plan_only=plan_only, no_run=no_run)
    newcomer = Newcomer(name, _told_of_password(url), weight, load(models) if models else None)
    with Catalog.open(catalog) as opened:
        placement, planned = _look(opened, newcomer, mode, keep_source)
        runs = bool(planned["transfers"]) and not no_run and not plan_only
        if runs:
            plans.refuse_problems(planned)
            refuse_silence(yes)
            confirm(planned, yes)
        if not plan_only:
            _join(opened, newcomer)
            narrate(f"Shard {name} has joined.")
        if runs and plan_job(opened)[1] != placement:
            raise RetryLater(
                f"Shard {name} has joined, but the topology changed meanwhile and another plan is due.",
                hint="`shardkit rebalance plan` shows it, `shardkit rebalance run` carries it out.",
            )
    job = None
    if runs:
        job = carry(
            catalog,
            lambda mover: (
                mover.start(f"add shard {name}", mode=mode, keep_source=keep_source),
                mover.run(),
            )[1],
            parallel=parallel,
            patience=patience,
            limits=Limits(max_rows_per_second, max_lag, max_wal_retained),
        )
    _show_added(catalog, newcomer, planned, job, as_json, joined=not plan_only)


def _told_of_password(url: str) -> str:
    bare = without_password(url)
    if sqlalchemy_url(bare) != sqlalchemy_url(url):
        narrate("note: the password in the URL is not used and not stored: set PGPASSFILE or PGPASSWORD.")
    return bare


def _look(
    catalog: Catalog, newcomer: Newcomer, mode: Mode, keep_source: bool
) -> tuple[Placement, dict[str, Any]]:
    """Check everything, and tell what would move; changes nothing."""
    with Lent("shardkit plan") as shards, _tables_of(newcomer) as (connection, _):
        topology = _checked(catalog, shards, connection, newcomer)
        shards.lend(topology.named(newcomer.name).id, connection)
        placement = plan(topology, weights_of(topology))
        return placement, plans.describe(topology, placement, shards, mode, back=keep_source)


def _checked(
    catalog: Catalog, shards: ShardConnections, connection: Connection, newcomer: Newcomer
) -> Topology:
    return membership.check_join(
        catalog, shards, connection, name=newcomer.name, url=newcomer.url, weight=newcomer.weight
    )


@contextmanager
def _tables_of(newcomer: Newcomer) -> Iterator[tuple[Connection, Provisional | None]]:
    """A connection to the new database that sees its tables; those just made are rolled back unless committed."""
    with connect_shard(newcomer.url, newcomer.name, application="shardkit create") as connection:
        if newcomer.metadata is None:
            yield connection, None
            return
        with Provisional(newcomer.metadata) as provisional:
            yield provisional.create(newcomer.url, newcomer.name), provisional


def _join(catalog: Catalog, newcomer: Newcomer) -> None:
    with ShardConnections("shardkit join") as shards:
        catalog.take_lease()
        with _tables_of(newcomer) as (connection, provisional):
            if provisional is not None:
                _checked(catalog, shards, connection, newcomer)
                provisional.commit()
        try:
            membership.join(catalog, shards, name=newcomer.name, url=newcomer.url, weight=newcomer.weight)
        except MoveWaiting as error:
            current = catalog.current()
            if current is None or all(shard.name != newcomer.name for shard in current.shards):
                raise MoveWaiting(
                    error.message, hint="End what holds the fence, then run it again."
                ) from error
            raise MoveWaiting(
                f"Shard {newcomer.name} has joined and owns nothing yet. {error.message}",
                hint="End what holds the fence, then `shardkit rebalance run`.",
            ) from error


def _show_added(
    catalog: str,
    newcomer: Newcomer,
    plan: dict[str, Any],
    job: dict[str, Any] | None,
    as_json: bool,
    *,
    joined: bool,
) -> None:
    if joined:
        with Catalog.open(catalog) as opened:
            todo = jobs.next_step(opened, opened.current())
    else:
        todo = "the same command without --plan-only."
    entry = {"name": newcomer.name, "url": newcomer.url, "weight": newcomer.weight}

    def draw(console: Console) -> None:
        if job is None:
            plans.draw(console, plan)
        else:
            jobs.draw(console, job)
        next_step(console, todo)

    show({"shard": entry, "joined": joined, "plan": plan, "job": job, "next": todo}, as_json, draw)


# --- list ----------------------------------------------------------------------------------------------------------


def list_(catalog: CatalogUrl, as_json: AsJson = False) -> None:
    """Show the shards: weight, share of the ring, arcs, database, and their replicas."""
    with Catalog.open(catalog) as opened:
        topology = opened.current()
        todo = jobs.next_step(opened, topology)
    entries = describe(topology) if topology is not None else []
    pins = plans.pins(topology) if topology is not None else []

    def draw(console: Console) -> None:
        numbers = ("weight", "slots", "share", "arcs")
        rows = []
        for e in entries:
            weight = "leaving" if e["leaving"] else e["weight"]
            rows.append([e["name"], weight, e["slots"], percent(e["slots"], SLOTS), e["arcs"], e["url"]])
            rows += [["", None, None, None, None, f"replica {url}"] for url in e["replicas"]]
        console.print(table(("shard", *numbers, "database"), rows, right=numbers))
        plans.draw_pins(console, pins)
        next_step(console, todo)

    version = topology.version if topology is not None else None
    show({"version": version, "shards": entries, "pins": pins, "next": todo}, as_json, draw)


def describe(topology: Topology) -> list[dict[str, Any]]:
    """The shards as documents: ``id``, ``name``, ``url``, ``weight``, ``slots``, ``arcs``, ``arcs_in_transit``,
    ``replicas``, ``leaving``."""
    return [
        {
            "id": shard.id,
            "name": shard.name,
            "url": redacted(shard.url),
            "weight": shard.weight,
            "slots": plans.slots(topology.owned(shard.id)),
            "arcs": len(topology.owned(shard.id)),
            "arcs_in_transit": len(shard.in_transit),
            "replicas": [redacted(url) for url in shard.replicas],
            "leaving": shard.leaving,
        }
        for shard in topology.shards
    ]
