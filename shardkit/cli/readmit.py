"""`shardkit shard readmit`: a shard that failed over or was restored to an older state is brought forward."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from shardkit.core.errors import EXIT_REFUSED, RowsGone
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.readmit import readmit as bring_forward
from shardkit.storage import readmission
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections
from shardkit.storage.readmission import Gained, Lag, Where

from . import jobs
from .asking import ask, refuse_silence
from .options import AsJson, CatalogUrl, Patience
from .output import count, narrate, narration_console, next_step, show, table

Name = Annotated[str, typer.Argument(help="The shard.")]
AcceptLoss = Annotated[
    bool,
    typer.Option(
        "--accept-loss",
        envvar="SHARDKIT_ACCEPT_LOSS",
        help="Go on although rows of keys that came to the shard since are not there.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", envvar="SHARDKIT_DRY_RUN", help="Show what would be done; change nothing."),
]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", envvar="SHARDKIT_YES", help="Do not ask before it is brought forward.")
]
VERIFY = "`shardkit verify` looks at every row."
REPAIR = (
    "`shardkit verify --repair` removes the rows that came back which their owners have just the same, and the marks; "
    "it names those that are left."
)


def readmit(
    name: Name,
    catalog: CatalogUrl,
    accept_loss: AcceptLoss = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    patience: Patience = 60.0,
    as_json: AsJson = False,
) -> None:
    """Bring a shard forward that failed over, or was restored, to a state from before the last moves.

    Keep applications away from it until then. It gets the fence, the topology and the arcs that the catalog has; no
    session sees rows that came back and are others' now. Refused, with exit code 3, where rows of keys that came to it
    since are not there. Writes of before that the shard itself has lost nobody can tell.
    """
    with Catalog.open(catalog) as opened, ShardConnections("shardkit readmit") as shards:
        if not dry_run and opened.proposed() is not None:  # by this command itself, perhaps, that was killed
            with Mover(catalog, patience=patience):
                pass  # it settles that before all else
        lag = readmission.look(opened, shards, name)
    refusal = _refusal(lag) if not accept_loss else None
    if dry_run or not lag.is_behind:
        _show(catalog, lag, lag.now.version, as_json, readmitted=False, refusal=refusal)
        if refusal is not None:
            raise typer.Exit(EXIT_REFUSED)
        return
    if refusal is not None:
        raise refusal
    refuse_silence(yes, "Add --yes to bring it forward without asking.")
    _draw_lag(narration_console(), describe(lag))
    if not yes:
        ask(f"Bring shard {name} forward now?")
    done = bring_forward(catalog, name, accept_loss=accept_loss, patience=patience, listener=narrate)
    _show(catalog, done.lag, done.topology.version, as_json, readmitted=done.lag.is_behind, refusal=None)


def _refusal(lag: Lag) -> RowsGone | None:
    try:
        lag.require_rows()
    except RowsGone as error:
        return error
    return None


def describe(lag: Lag) -> dict[str, Any]:
    """The document: ``shard``, ``behind``, the topologies ``held`` and ``in_force``, its ``fences``; ``returned``
    (arcs, rows by table) and ``gained`` (arcs, their ``owner`` of then, ``where`` their rows are)."""
    return {
        "shard": lag.shard.name,
        "behind": lag.is_behind,
        "held": lag.then.version,
        "in_force": lag.now.version,
        "fences": list(lag.fences),
        "returned": {"arcs": len(lag.returned), "rows": dict(lag.outside)},
        "gained": [_gained(each) for each in lag.gained],
    }


def _gained(gained: Gained) -> dict[str, Any]:
    return {
        "owner": gained.owner,
        "arcs": len(gained.arcs),
        "where": gained.where.value,
        "here": dict(gained.here),
        "there": dict(gained.there),
    }


def _show(
    catalog: str, lag: Lag, version: int, as_json: bool, *, readmitted: bool, refusal: RowsGone | None
) -> None:
    todo = _next(catalog, lag, readmitted, refusal)
    document = {
        **describe(lag),
        "readmitted": readmitted,
        "version": version,
        "refusal": None if refusal is None else refusal.message,
        "next": todo,
    }

    def draw(console: Console) -> None:
        _draw_lag(console, document)
        if readmitted:
            console.print(f"Shard {lag.shard.name} has topology {version} now.", soft_wrap=True)
        if refusal is not None:
            console.print(f"Refused: {refusal.message}", soft_wrap=True)
        next_step(console, todo)

    show(document, as_json, draw)


def _draw_lag(console: Console, document: dict[str, Any]) -> None:
    name, held = document["shard"], document["held"]
    if not document["behind"]:
        console.print(
            f"Shard {name} is not behind: it has the fence that the catalog relies on.", soft_wrap=True
        )
        return
    console.print(f"Shard {name} holds topology {held}; in force is {document['in_force']}.", soft_wrap=True)
    returned = document["returned"]
    if returned["arcs"]:
        rows = [f"{count(number, 'row')} of {where}" for where, number in returned["rows"].items()]
        console.print(
            f"{count(returned['arcs'], 'arc')} came back that others own now: {', '.join(rows) or 'no row'}. No "
            "session will see them.",
            soft_wrap=True,
        )
    if document["gained"]:
        came = [[each["owner"], each["arcs"], _WHERE[Where(each["where"])]] for each in document["gained"]]
        console.print(table(("came from", "arcs", "their rows"), came, right=("arcs",)))


_WHERE = {
    Where.HERE: "here, just as there",
    Where.THERE: "there still, and not here, or otherwise",
    Where.GONE: "gone",
}


def _next(catalog: str, lag: Lag, readmitted: bool, refusal: RowsGone | None) -> str | None:
    if refusal is not None:
        return refusal.hint
    if not readmitted:
        return f"`shardkit shard readmit {lag.shard.name}` brings it forward." if lag.is_behind else None
    with Catalog.open(catalog) as opened:
        job = jobs.next_step(opened, opened.current()) if opened.running_job() is not None else None
    return " ".join(
        text for text in (REPAIR if lag.returned else VERIFY, f"Then {job}" if job else "") if text
    )
