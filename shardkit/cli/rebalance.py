"""`shardkit rebalance`: plan, run, status, pause, resume, abort, rollback, finalize, certificate."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console

from shardkit.core.errors import MoveWaiting, NothingToDo
from shardkit.core.move import Mode
from shardkit.rebalance.limits import Limits
from shardkit.rebalance.mover import AT_MOST, Mover, plan_job
from shardkit.storage.catalog import KEPT_HINT, Catalog, Job
from shardkit.storage.connections import ShardConnections

from . import certificates, jobs, plans
from .asking import confirm, refuse_silence
from .options import (
    INTERVAL_AT_LEAST,
    AsJson,
    CatalogUrl,
    KeepSource,
    MaxLag,
    MaxRows,
    MaxWal,
    MoveMode,
    Parallel,
    Patience,
    Yes,
    one_of,
)
from .output import narrate, next_step, result_console, show
from .running import PARALLEL, PATIENCE, carry

Watch = Annotated[
    bool,
    typer.Option(
        "--watch", envvar="SHARDKIT_WATCH", help="Show it again and again while a mover may work on it."
    ),
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
    for command in (plan, run, status, pause, resume, abort, rollback, finalize, certificates.certificate):
        group.command(command.__name__)(command)
    app.add_typer(group, name="rebalance")


def plan(catalog: CatalogUrl, keep_source: KeepSource = False, as_json: AsJson = False) -> None:
    """Show what would move, how much it is about, and what stands in the way. Changes nothing."""
    document = look(catalog, keep_source=keep_source)
    todo = _after_plan(document)

    def draw(console: Console) -> None:
        plans.draw(console, document)
        next_step(console, todo)

    show({**document, "next": todo}, as_json, draw)


def look(catalog: str, mode: Mode = Mode.AUTO, *, keep_source: bool = False) -> dict[str, Any]:
    """The plan of the weights that the topology states; `JobRunning` while a job is unfinished."""
    with Catalog.open(catalog) as opened, ShardConnections("shardkit plan", at_most=AT_MOST) as shards:
        opened.require_no_job()
        topology, placement = plan_job(opened)
        described = plans.describe(topology, placement, shards, mode, back=keep_source)
        return {"version": topology.version, **described}


def _after_plan(plan: dict[str, Any]) -> str | None:
    if plan["problems"]:
        return "remove what is in the way, then `shardkit rebalance run`."
    return "`shardkit rebalance run` moves them." if plan["transfers"] else None


def run(
    catalog: CatalogUrl,
    yes: Yes = False,
    keep_source: KeepSource = False,
    mode: MoveMode = Mode.AUTO,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    max_rows_per_second: MaxRows = None,
    max_lag: MaxLag = None,
    max_wal_retained: MaxWal = None,
    as_json: AsJson = False,
) -> None:
    """Move rows until every shard holds its share by weight.

    Applications go on meanwhile. Can be stopped at any moment; `shardkit rebalance resume` goes on. With
    --keep-source it ends with the rows on both sides, and can be undone by `shardkit rebalance rollback`.
    """
    planned = look(catalog, mode, keep_source=keep_source)
    plans.refuse_problems(planned)
    planned_next = _after_nothing(catalog) if not planned["transfers"] else None
    if not planned["transfers"]:
        show(
            {"plan": planned, "job": None, "next": planned_next},
            as_json,
            lambda console: _draw_plan(console, planned, planned_next),
        )
        return
    refuse_silence(yes)
    confirm(planned, yes)
    job = carry(
        catalog,
        lambda mover: (mover.start("rebalance", mode=mode, keep_source=keep_source), mover.run())[1],
        parallel=parallel,
        patience=patience,
        limits=Limits(max_rows_per_second, max_lag, max_wal_retained),
    )
    show_job(catalog, job, as_json, plan=planned)


def pause(catalog: CatalogUrl, patience: Patience = PATIENCE, as_json: AsJson = False) -> None:
    """Let the mover at work, in whatever terminal, end between two steps; the job stays where it is.

    The servers go on with a copy that they have begun, and follow what is written. `shardkit rebalance resume` goes on.
    """
    with Catalog.open(catalog) as opened:
        job = opened.running_job()
        if job is None:
            raise NothingToDo
        if opened.is_kept(job):
            raise NothingToDo(f"No mover works on job {job.id}, whose sources are kept.", hint=KEPT_HINT)
        opened.pause(job.id)
        _wait_for_end(opened, job.id, patience)
        document = jobs.describe(opened, opened.job(job.id))
    show_job(catalog, document, as_json)


def _wait_for_end(catalog: Catalog, job_id: int, patience: float) -> None:
    """Until the mover that works now does not any more."""
    holder, deadline = catalog.lease_holder(), time.monotonic() + patience
    while holder is not None and catalog.lease_holder() == holder:
        if time.monotonic() > deadline:
            raise MoveWaiting(
                f"The mover was told to pause and is still in its step: {holder}.",
                hint="It ends after that step; `shardkit rebalance status` shows what it waits for.",
            )
        time.sleep(0.1)
        catalog.pause(job_id)  # once more, as a mover that was about to begin has not seen the first


def _after_nothing(catalog: str) -> str | None:
    with Catalog.open(catalog) as opened:
        return jobs.next_step(opened, opened.current())


def _draw_plan(console: Console, planned: dict[str, Any], todo: str | None) -> None:
    plans.draw(console, planned)
    if todo is not None:
        next_step(console, todo)


def resume(
    catalog: CatalogUrl,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    max_rows_per_second: MaxRows = None,
    max_lag: MaxLag = None,
    max_wal_retained: MaxWal = None,
    as_json: AsJson = False,
) -> None:
    """Go on with the unfinished job from the phases that the catalog holds, and settle an interrupted change."""
    with Catalog.open(catalog) as opened:
        pending = opened.proposed() is not None
    limits = Limits(max_rows_per_second, max_lag, max_wal_retained)
    job = carry(
        catalog,
        lambda mover: _go_on(mover, pending),
        parallel=parallel,
        patience=patience,
        limits=limits,
    )
    if job is None:
        _show_settled(catalog, as_json)
    else:
        show_job(catalog, job, as_json)


def _go_on(mover: Mover, pending: bool) -> Job | None:
    """The unfinished job, or what is left to do without one: a change that the mover has settled as it began, shards
    that are drained and have not left."""
    try:
        return mover.run()
    except NothingToDo:
        gone = mover.let_go()
        for name in gone:
            narrate(f"Shard {name} has left.")
        if not gone and not pending:
            raise
        return None


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
    """Take back every transfer, or every rollback, that is not cut over yet; those that are, are finished."""
    job = carry(catalog, lambda mover: mover.abort(), parallel=parallel, patience=patience)
    show_job(catalog, job, as_json)


def rollback(
    catalog: CatalogUrl,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    max_rows_per_second: MaxRows = None,
    max_lag: MaxLag = None,
    as_json: AsJson = False,
) -> None:
    """Bring the arcs of a job back to the sources that keep its rows, with all that was written since.

    Like the move: rows are compared by content, applications go on, and it can be stopped, resumed, and aborted before
    its cutover.
    """
    limits = Limits(max_rows_per_second, max_lag)
    job = carry(catalog, lambda mover: mover.rollback(), parallel=parallel, patience=patience, limits=limits)
    show_job(catalog, job, as_json)


def finalize(
    catalog: CatalogUrl,
    parallel: Parallel = PARALLEL,
    patience: Patience = PATIENCE,
    max_rows_per_second: MaxRows = None,
    max_lag: MaxLag = None,
    as_json: AsJson = False,
) -> None:
    """Delete the moved rows from the sources that kept them. From then on there is no way back."""
    limits = Limits(max_rows_per_second, max_lag)
    job = carry(catalog, lambda mover: mover.finalize(), parallel=parallel, patience=patience, limits=limits)
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
