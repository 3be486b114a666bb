"""`shardkit verify`: whether the content of the cluster is right, and the removal of what is nobody's."""

from __future__ import annotations

import threading
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from shardkit.core.errors import EXIT_RETRY, EXIT_VERIFY
from shardkit.rebalance.audit import audit
from shardkit.rebalance.findings import Report
from shardkit.rebalance.repair import Outcome, repair

from .asking import ask, refuse_silence
from .options import AsJson, CatalogUrl, Patience
from .output import count, narrate, next_step, show, table

SHOWN = 10
QUIET_SECONDS, SECONDS_BETWEEN_LINES = 2.0, 5.0
RepairFlag = Annotated[
    bool,
    typer.Option(
        "--repair", envvar="SHARDKIT_REPAIR", help="Remove what is provably nobody's, after it was shown."
    ),
]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", envvar="SHARDKIT_YES", help="Do not ask before anything is removed.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify")(verify)


def verify(
    catalog: CatalogUrl,
    repair_: RepairFlag = False,
    yes: Yes = False,
    patience: Patience = 60.0,
    as_json: AsJson = False,
) -> None:
    """Check that every row is on its owner, reference tables are equal, and no move left anything.

    Looks at every row of every shard, at any time: applications and moves go on, and raise no false alarm. Exit code 4
    if anything is wrong, else 5 if a shard did not answer. `--repair` removes rows that their owner has just the same,
    and what finished moves left; everything else is named with the next step.
    """
    if repair_:
        refuse_silence(yes, "Add --yes to remove without asking.")
    report = audit(catalog, _Lines())
    outcome = None
    if repair_ and any(problem.repairable for problem in report.problems):
        _show_plan(report)
        if not yes:
            ask("Remove them now?")
        outcome = repair(catalog, patience=patience, listener=narrate)
        report = audit(catalog, _Lines())
    document = {**report.as_dict(), "repaired": _repaired(outcome), "next": _next(report)}
    show(document, as_json, lambda console: _draw(console, document))
    if report.problems:
        raise typer.Exit(EXIT_VERIFY)
    if not report.complete:
        raise typer.Exit(EXIT_RETRY)


class _Lines:
    """Progress as lines on stderr, of what takes long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = time.monotonic() + QUIET_SECONDS

    def __call__(self, rows: int, expected: int) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + SECONDS_BETWEEN_LINES
        narrate(f"{rows:,} of about {expected:,} rows looked at.")


def _show_plan(report: Report) -> None:
    narrate(
        "To be removed, unless it turns out otherwise when it is looked at again under the mover's lease:"
    )
    for problem in report.problems:
        if problem.repairable:
            which = "; those go that their owners have just the same" if problem.rows else ""
            narrate(f"  {problem.subject}: {problem.detail}{which}")


def _repaired(outcome: Outcome | None) -> dict[str, Any] | None:
    return None if outcome is None else {"removed": outcome.removed, "kept": outcome.kept}


def _next(report: Report) -> str | None:
    if any(problem.repairable for problem in report.problems):
        return "`shardkit verify --repair` removes what is provably nobody's; the rest is said above."
    if report.problems:
        return "what is said above, then `shardkit verify` again."
    if not report.complete:
        return "`shardkit verify` again, when every shard answers and writers have ended."
    return None


def _draw(console: Console, document: dict[str, Any]) -> None:
    rows = [
        [shard["name"], each["table"], each["rows"], each["in_transit"], each["unowned"] + each["null_keys"]]
        for shard in document["shards"]
        for each in shard["tables"]
    ]
    numbers = ("rows", "in transit", "not owned")
    console.print(table(("shard", "table", *numbers), rows, right=numbers))
    for each in document["references"]:
        console.print(
            f"{each['table']}: {count(each['rows'], 'row')}, the same on every shard", soft_wrap=True
        )
    for move in document["moves"]:
        where = f"{move['source']} -> {move['target']}, {move['phase']}: " if move["transfer"] else ""
        console.print(f"Under way: {where}{move['sentence']}", soft_wrap=True)
    for problem in document["problems"]:
        _draw_problem(console, problem)
    for text in document["undecided"]:
        console.print(f"Not decided: {text}", soft_wrap=True)
    for each in document["away"]:
        console.print(f"Away: {each['reason']}", soft_wrap=True)
    for text in (document["repaired"] or {"kept": []})["kept"]:
        console.print(f"Kept: {text}", soft_wrap=True)
    made = document["certificate"]
    console.print(
        f"{made['result'].capitalize()}: {count(made['rows_checked'], 'row')} of topology "
        f"{made['topology']['last']['version']}, {made['finished_at']}",
        soft_wrap=True,
    )
    next_step(console, document["next"])


def _draw_problem(console: Console, problem: dict[str, Any]) -> None:
    console.print(f"WRONG {problem['subject']}, {problem['check']}: {problem['detail']}", soft_wrap=True)
    for key in problem["keys"][:SHOWN]:
        which = " ".join(f"{name}={value}" for name, value in key["row"].items())
        owner = f", owner {key['owner']}" if key["owner"] else ""
        console.print(f"  {problem['table']} {which}{owner}: {_state(key['state'])}", soft_wrap=True)
    if problem["rows"] and problem["rows"] > SHOWN:
        console.print(f"  and {problem['rows'] - SHOWN:,} more", soft_wrap=True)
    console.print(f"  Next: {problem['next']}", soft_wrap=True)


def _state(state: str) -> str:
    return {
        "same": "the owner has the same row",
        "differs": "the owner's row differs",
        "only here": "the owner has no such row",
        "gone": "gone by now",
        "unknown": "the owner could not be asked",
    }[state]
