"""`shardkit rebalance`: plan, run, status, resume, abort."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console

from shardkit.core.errors import JobRunning, NothingToDo
from shardkit.core.move import Mode
from shardkit.rebalance.mover import AT_MOST, plan_job
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections

from . import jobs, plans
from .asking import confirm, refuse_silence
from .options import INTERVAL_AT_LEAST, AsJson, CatalogUrl, MoveMode, Parallel, Patience, Yes, one_of
from .output import next_step, result_console, show
from .running import PARALLEL, PATIENCE, carry

Watch = Annotated[
    bool,
    typer.Option("--watch", envvar="SHARDKIT_WATCH", help="Show it again and again until the job has ended."),
]
Interval = Annotated[
    float,
    typer.Option(
        "--interval", min=INTERVAL_AT_LEAST, envvar="SHARDKIT_INTERVAL", help="Seconds between two looks."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Give every shard its share of the keys.", no_args_is_help=True)
    for command in (plan, run, status, resume, abort):
        group.command(command.__name__)(command)
    app.add_typer(group, name="rebalance")


def plan(catalog: CatalogUrl, as_json: AsJson = False) -> None:
    """Show what would move, how much it is about, and what stands in the way. Changes nothing."""
    document = look(catalog)
    todo = _after_plan(document)

    def draw(console: Console) -> None:
        plans.draw(console, document)
        next_step(console, todo)

    show({**document, "next": todo}, as_json, draw)


def look(catalog: str, mode: Mode = Mode.AUTO) -> dict[str, Any]:
    """The plan of the weights that the topology states; `JobRunning` while a job is unfinished."""
    with Catalog.open(catalog) as opened, ShardConnections("shardkit plan", at_most=AT_MOST) as shards:
        if opened.running_job() is not None:
            raise JobRunning
        topology, placement = plan_job(opened)
        return {"version": topology.version, **plans.describe(topology, placement, shards, mode)}


def _after_plan(plan: dict[str, Any]) -> str | None:
    if plan["problems"]:
        return "remove what is in the way, then `shardkit rebalance run`."
    return "`shardkit rebalance run` moves them." if plan["transfers"] else None


def run(
    catalog: CatalogUrl,
    yes: Yes = False,
    mode: MoveMode = Mode.AUTO,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    as_json: AsJson = False,
) -> None:
    """Move rows until every shard holds its share by weight.

    Applications go on meanwhile. Can be stopped at any moment; `shardkit rebalance resume` goes on.
    """
    planned = look(catalog, mode)
    plans.refuse_problems(planned)
    if not planned["transfers"]:
        show(
            {"plan": planned, "job": None, "next": None},
            as_json,
            lambda console: plans.draw(console, planned),
        )
        return
    refuse_silence(yes)
    confirm(planned, yes)
    job = carry(
        catalog,
        lambda mover: (mover.start("rebalance", mode=mode), mover.run())[1],
        parallel=parallel,
        patience=patience,
    )
    show_job(catalog, job, as_json, plan=planned)


def resume(
    catalog: CatalogUrl, parallel: Parallel = PARALLEL, patience: Patience = PATIENCE, as_json: AsJson = False
) -> None:
    """Go on with the unfinished job from the phases that the catalog holds, and settle an interrupted change."""
    with Catalog.open(catalog) as opened:
        pending = opened.proposed() is not None
    try:
        job = carry(catalog, lambda mover: mover.run(), parallel=parallel, patience=patience)
    except NothingToDo:
        if not pending:
            raise
        _show_settled(catalog, as_json)
        return
    show_job(catalog, job, as_json)


def _show_settled(catalog: str, as_json: bool) -> None:
    with Catalog.open(catalog) as opened:
        todo = jobs.next_step(opened, opened.current())

    def draw(console: Console) -> None:
        console.print("The interrupted change of topology is settled.", soft_wrap=True)
        next_step(console, todo)

    show({"job": None, "settled": True, "next": todo}, as_json, draw)


def abort(
    catalog: CatalogUrl, parallel: Parallel = PARALLEL, patience: Patience = PATIENCE, as_json: AsJson = False
) -> None:
    """Take back every transfer that is not cut over yet; those that are, are finished."""
    job = carry(catalog, lambda mover: mover.abort(), parallel=parallel, patience=patience)
    show_job(catalog, job, as_json)


def show_job(catalog: str, job: dict[str, Any], as_json: bool, **more: Any) -> None:
    """The result of a mover's work."""
    with Catalog.open(catalog) as opened:
        todo = jobs.next_step(opened, opened.current())

    def draw(console: Console) -> None:
        jobs.draw(console, job)
        next_step(console, todo)

    show({**more, "job": job, "next": todo}, as_json, draw)


def status(
    catalog: CatalogUrl, watch: Watch = False, interval: Interval = 1.0, as_json: AsJson = False
) -> None:
    """Show the unfinished job, or the last one: its transfers, what they do or wait for, who works on it."""
    one_of(watch=watch, json=as_json)
    with Catalog.open(catalog) as opened:
        document = _status(opened)
        drawn = None
        while watch and document["job"] is not None and not jobs.is_over(document["job"]):
            if document != drawn:
                _draw_again(document)
            drawn = document
            time.sleep(interval)
            document = _status(opened)
    show(document, as_json, lambda console: _draw_status(console, document))


def _status(catalog: Catalog) -> dict[str, Any]:
    job = catalog.latest_job()
    return {
        "job": jobs.describe(catalog, job) if job is not None else None,
        "next": jobs.next_step(catalog, catalog.current()),
    }


def _draw_again(document: dict[str, Any]) -> None:
    console = result_console()
    console.clear()  # nothing happens where the output is no terminal
    _draw_status(console, document)


def _draw_status(console: Console, document: dict[str, Any]) -> None:
    if document["job"] is None:
        console.print("There was no job yet.")
    else:
        jobs.draw(console, document["job"])
    next_step(console, document["next"])
