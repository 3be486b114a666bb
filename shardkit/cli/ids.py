"""`shardkit ids`: split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from shardkit.core.residues import STRIDE_MAX
from shardkit.storage import idplan, idsplit
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections
from shardkit.storage.idplan import Planned

from . import jobs
from .asking import ask, refuse_silence
from .options import AsJson, CatalogUrl, Patience
from .output import Document, count, narrate, narration_console, next_step, show, table
from .running import PATIENCE

Tables = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TABLE]...",
        help="Tables, with their schema if need be; else all that need it.",
        show_default=False,
    ),
]
ShardsMax = Annotated[
    int | None,
    typer.Option(
        "--shards",
        min=2,
        max=STRIDE_MAX,
        envvar="SHARDKIT_SHARDS",
        help="How many shards there can be: 1024, 64 of an integer, 8 of a smallint column. A multiple can follow.",
    ),
]
PlanOnly = Annotated[
    bool, typer.Option("--plan-only", envvar="SHARDKIT_PLAN_ONLY", help="Show the plan; change nothing.")
]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", envvar="SHARDKIT_YES", help="Do not ask before sequences are altered.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Primary keys that servers number.", no_args_is_help=True)
    group.command("split")(split)
    app.add_typer(group, name="ids")


def split(
    catalog: CatalogUrl,
    tables: Tables = None,
    shards: ShardsMax = None,
    plan_only: PlanOnly = False,
    yes: Yes = False,
    patience: Patience = PATIENCE,
    as_json: AsJson = False,
) -> None:
    """Make the sequences of serial and identity primary keys disjoint over the shards, while applications go on.

    Each shard then gives numbers that no other gives, above all that were given before; a shard that joins later does
    as well. Rows stay as they are. Run again, it sets sequences right that were altered by hand.
    """
    names = tuple(tables or ())
    with (
        Catalog.open(catalog, application="shardkit ids") as opened,
        ShardConnections("shardkit ids") as reached,
    ):
        topology = opened.require_current()
        planned = idplan.plan(topology, reached, names, shards)
        changes = not plan_only and not all(each.done for each in planned)
        if changes:
            refuse_silence(yes, "Add --yes to alter them without asking.")
            _draw(narration_console(), planned)
            if not yes:
                ask("Alter these sequences now?")
            opened.take_lease()
            planned = idsplit.split(opened, reached, names, shards, patience=patience, report=_Told())
        todo = (
            "the same command without --plan-only." if plan_only else jobs.next_step(opened, opened.current())
        )
    document: Document = {
        "changed": changes,
        "tables": [_entry(each) for each in planned],
        "next": todo,
    }
    show(document, as_json, lambda console: _show(console, planned, todo))


class _Told:
    """Says what is waited for, once each."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, reason: str | None) -> None:
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            narrate(f"waiting: {reason}")


def _entry(planned: Planned) -> dict[str, Any]:
    return {
        "schema": planned.table.schema,
        "name": planned.table.name,
        "column": planned.column,
        "shards_max": planned.stride,
        "floor": planned.floor,
        "split": planned.done,
        "shards": [
            {"name": part.shard, "sequence": part.sequence, "next": part.first, "left": part.left}
            for part in planned.parts
        ],
    }


def _show(console: Console, planned: Sequence[Planned], todo: str | None) -> None:
    _draw(console, planned)
    next_step(console, todo)


def _draw(console: Console, planned: Sequence[Planned]) -> None:
    if not planned:
        console.print("No sharded table has a primary key that a server alone numbers.", soft_wrap=True)
        return
    rows = [
        [f"{each.table}.{each.column}", part.shard, part.sequence, part.first, each.stride, part.left]
        for each in planned
        for part in each.parts
    ]
    headers = ("column", "shard", "sequence", "next", "step", "left")
    console.print(table(headers, rows, right=("next", "step", "left")))
    waiting = [each for each in planned if not each.done]
    console.print(
        f"{count(len(waiting), 'table')} to split, {count(len(planned) - len(waiting), 'table')} split."
    )
