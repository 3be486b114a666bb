"""What an audit of the cluster found, as values: made by `rebalance.audit`, shown by the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from .ownership import Counts

CATALOG = "catalog"


@dataclass(frozen=True)
class Problem:
    """Something wrong: where, which check found it, and what to do about it.

    ``subject`` is the name of a shard, or ``catalog``. ``rows`` counts them, ``keys`` name the first of them, each with
    ``row`` (columns and values), ``owner`` (a shard, or None) and ``state`` (see `ownership.State`). ``repairable``
    says that a repair removes it, or some of it.
    """

    subject: str
    check: str
    detail: str
    next: str
    table: str | None = None
    rows: int | None = None
    keys: Sequence[Mapping[str, Any]] = ()
    repairable: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The problem for ``--json``."""
        return {
            "subject": self.subject,
            "check": self.check,
            "table": self.table,
            "detail": self.detail,
            "rows": self.rows,
            "keys": list(self.keys),
            "repairable": self.repairable,
            "next": self.next,
        }


@dataclass
class Report:
    """All of an audit. ``away`` has a sentence for each shard that did not answer; ``undecided`` what could not be
    compared now; ``moves`` the transfers under way, which explain what would be wrong without them."""

    cluster: str
    started_at: datetime
    topologies: tuple[tuple[int, str], tuple[int, str]]
    """(version, digest) of the catalog's topology at the beginning and at the end."""
    finished_at: datetime
    counts: dict[str, dict[str, Counts]] = field(default_factory=dict)
    references: dict[str, int] = field(default_factory=dict)
    """Rows of each reference table that is the same everywhere."""
    homes: list[str] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    away: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything could be looked at."""
        return not self.away and not self.undecided

    def as_dict(self) -> dict[str, Any]:
        """The report for ``--json``."""
        rows = {name: sum(each.rows for each in tables.values()) for name, tables in self.counts.items()}
        by_table: dict[str, int] = {}
        for tables in self.counts.values():
            for table, counts in tables.items():
                by_table[table] = by_table.get(table, 0) + counts.rows
        result = "wrong" if self.problems else "right" if self.complete else "incomplete"
        return {
            "result": result,
            "certificate": {
                "kind": "verify",
                "format": 1,
                "result": result,
                "cluster_id": self.cluster,
                "started_at": self.started_at.isoformat(),
                "finished_at": self.finished_at.isoformat(),
                "topology": {
                    when: {"version": version, "digest": digest}
                    for when, (version, digest) in zip(("first", "last"), self.topologies, strict=True)
                },
                "rows_checked": sum(rows.values()) + sum(self.references.values()),
                "rows": {**by_table, **self.references},
            },
            "shards": [
                {
                    "name": name,
                    "rows": rows[name],
                    "tables": [
                        {
                            "table": table,
                            "rows": counts.rows,
                            "in_transit": counts.in_transit,
                            "unowned": counts.unowned,
                            "null_keys": counts.null_keys,
                        }
                        for table, counts in tables.items()
                    ],
                }
                for name, tables in self.counts.items()
            ],
            "references": [{"table": table, "rows": rows} for table, rows in self.references.items()],
            "homes": list(self.homes),
            "moves": self.moves,
            "problems": [problem.as_dict() for problem in self.problems],
            "undecided": list(self.undecided),
            "away": [{"shard": name, "reason": reason} for name, reason in self.away.items()],
        }
