"""The flags that several commands share, each with its environment twin.

A flag given before the command (``shardkit --catalog URL status``) stands for its environment variable; one given
after the command comes first.
"""

from __future__ import annotations

import re
from typing import Annotated

import typer

from shardkit.core.errors import UsageError
from shardkit.core.move import Mode
from shardkit.storage.urls import redacted, sqlalchemy_url

CATALOG_VARIABLE = "SHARDKIT_CATALOG"
JSON_VARIABLE = "SHARDKIT_JSON"
INTERVAL_AT_LEAST = 0.1

CatalogUrl = Annotated[
    str,
    typer.Option("--catalog", metavar="URL", envvar=CATALOG_VARIABLE, help="The catalog's database."),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", envvar=JSON_VARIABLE, help="Print one JSON document instead of a table."),
]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", envvar="SHARDKIT_YES", help="Do not ask before rows are moved.")
]
PlanOnly = Annotated[
    bool,
    typer.Option("--plan-only", envvar="SHARDKIT_PLAN_ONLY", help="Show what would move; change nothing."),
]
Parallel = Annotated[
    int,
    typer.Option(
        "--parallel", min=1, max=64, envvar="SHARDKIT_PARALLEL", help="Transfers that run side by side."
    ),
]
Patience = Annotated[
    float,
    typer.Option(
        "--patience",
        min=0.0,
        envvar="SHARDKIT_PATIENCE",
        help="Seconds to wait for a lock, a moment to cut over, or a server that is away.",
    ),
]
KeepSource = Annotated[
    bool,
    typer.Option(
        "--keep-source",
        envvar="SHARDKIT_KEEP_SOURCE",
        help="Let the sources keep the moved rows, as they are written, until `rebalance finalize` or `rollback`.",
    ),
]

def database_url(url: str) -> str:
    """The URL; `UsageError` if it names no database."""
    if sqlalchemy_url(url).database is None:
        raise UsageError(
            f"The URL names no database: {redacted(url)}",
            hint="It looks like postgresql://user@host:5432/database.",
        )
    return url


MoveMode = Annotated[
    Mode,
    typer.Option(
        "--mode",
        envvar="SHARDKIT_MODE",
        help="How rows move: by logical replication, or in small steps during which applications wait; auto takes the "
        "second only where a source has no wal_level=logical.",
    ),
]


def byte_count(text: str | int) -> int:
    """Bytes, of a number with a unit as PostgreSQL's settings have it: 512MB, 10GB."""
    found = re.fullmatch(r"\s*(\d+)\s*(B|kB|MB|GB|TB)?\s*", str(text))
    if found is None:
        raise UsageError(
            f"Not a size: {text!r}.", hint="It looks like 512MB or 10GB; units are kB, MB, GB and TB."
        )
    return int(found[1]) << 10 * ("B", "kB", "MB", "GB", "TB").index(found[2] or "B")


MaxRows = Annotated[
    float | None,
    typer.Option(
        "--max-rows-per-second",
        min=1.0,
        envvar="SHARDKIT_MAX_ROWS_PER_SECOND",
        help="Rows that each transfer may delete in a second when it purges.",
    ),
]
MaxLag = Annotated[
    int | None,
    typer.Option(
        "--max-lag",
        metavar="SIZE",
        parser=byte_count,
        envvar="SHARDKIT_MAX_LAG",
        help="Delete no rows on a shard while a physical standby is further behind.",
    ),
]
MaxWal = Annotated[
    int | None,
    typer.Option(
        "--max-wal-retained",
        metavar="SIZE",
        parser=byte_count,
        envvar="SHARDKIT_MAX_WAL_RETAINED",
        help="Give a copy up before its source has to keep more WAL for it.",
    ),
]


def one_of(**given: bool) -> None:
    """Refuse flags that exclude each other; the keywords are their names with underscores."""
    used = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if len(used) > 1:
        raise UsageError(f"{' and '.join(used)} exclude each other.", hint="Give one of them.")
