"""`shardkit doctor`: what is wrong, and what to do about it."""

from __future__ import annotations

import typer
from rich.console import Console

from shardkit.core.errors import EXIT_REFUSED

from .checkup import Finding, Level, examine
from .options import AsJson, CatalogUrl
from .output import Document, count, show, table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(catalog: CatalogUrl, as_json: AsJson = False) -> None:
    """Examine the catalog and every shard. Exit code 3 if something is wrong; each problem with its next step.

    Looks at: servers (version, wal_level, hash), whose shard each database is, fences and copies of the topology,
    marks of arcs in transit, leftovers of earlier moves, transactions in doubt, the declared tables and their keys,
    sequences that number primary keys, and whether reference tables are the same on all shards. Changes nothing.
    """
    findings = examine(catalog)
    problems = [finding for finding in findings if finding.level is Level.PROBLEM]
    document: Document = {"healthy": not problems, "findings": [finding.as_dict() for finding in findings]}
    show(document, as_json, lambda console: _draw(console, findings, len(problems)))
    if problems:
        raise typer.Exit(EXIT_REFUSED)


def _draw(console: Console, findings: list[Finding], problems: int) -> None:
    rows = [[found.subject, found.check, found.level.value, found.detail] for found in findings]
    console.print(table(("subject", "check", "result", "detail"), rows))
    for found in findings:
        if found.next is not None:
            console.print(f"{found.subject}, {found.check}: {found.next}", soft_wrap=True)
    console.print("Healthy." if not problems else f"{count(problems, 'problem')}.")
