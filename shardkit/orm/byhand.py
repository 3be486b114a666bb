"""Statements whose shards the application names itself, by ``bind_arguments``: SQL text, which no proof understands.

``{"key": k}`` runs on the shard of a shard key, ``{"shard": name}`` on that shard, ``{"scatter": True}`` on all, whose
rows come one shard's after the other's. The first two see every row of that shard, those in transit too, as
`session.connection` does. A scattered text has to say `shardkit.owned(<key>)` of the rows that it reads, at rest as
well, so that no move can make it fail or see a row twice. Driven by `ShardSession.get_bind`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Executable, Table
from sqlalchemy.sql.visitors import iterate

from shardkit.core.errors import UnroutableQuery
from shardkit.core.topology import Topology
from shardkit.storage.dialect import WRITES

from .places import INFO
from .planning.gather import Rows
from .planning.plan import Parameters, Plan, Route, ShardPart

_OWNED = re.compile(r"\bshardkit\s*\.\s*owned\s*\(")


class TextPlan(Plan):
    """SQL text on every shard that owns keys."""

    __slots__ = ()
    reason = "the application scatters this text"
    everywhere = True

    def route(self, topology: Topology, *, prefer: Collection[int] = ()) -> Route:
        """Every owner."""
        part = ShardPart(self._statement, self._parameters)
        owners = [shard.id for shard in topology.shards if topology.owned(shard.id)]
        return Route(dict.fromkeys(owners, part), Rows() if len(owners) > 1 else None)


def plan_scattered(statement: Executable, parameters: Parameters, options: Mapping[str, Any]) -> Plan:
    """The plan of a statement with ``scatter=True``; `UnroutableQuery` if rows in transit could be in its answer."""
    text = _text(statement)
    if text is None:
        raise UnroutableQuery(
            "Only text() is scattered by hand: what this statement asks of its shards can be proved.",
            hint="Leave out bind_arguments.",
            reason="text",
        )
    if not _OWNED.search(text):
        raise UnroutableQuery(
            "A scattered text() would see rows that are on their way to another shard twice.",
            hint="Add WHERE shardkit.owned(<shard key>) for each sharded table. For SQL that reads none, ask each "
            "shard by session.connection(shard=...).",
            reason="text",
        )
    return TextPlan(statement, parameters, (), bool(options.get(WRITES, True)))


def vet_named(statement: Any) -> None:
    """`UnroutableQuery` if a statement of declared tables is sent to a key or shard that was named: rows in transit
    would be loaded as if they were there."""
    if statement is None or _text(statement) is not None:
        return
    table = next((one for one in iterate(statement) if isinstance(one, Table) and INFO in one.info), None)
    if table is not None:
        raise UnroutableQuery(
            f"A statement of {table.fullname} finds its shards itself; a key or shard is named for text() alone.",
            hint="Compare the shard key in the statement, or execute it on session.connection(key=...), which shows "
            "rows in transit too.",
            reason="bind-arguments",
        )


def _text(statement: Any) -> str | None:
    """The SQL of a statement that is text, for entities (`from_statement`) or columns too; None if it is none."""
    inner = getattr(statement, "element", statement)
    if not getattr(inner, "_is_textual", False):
        return None
    return str(getattr(getattr(inner, "element", inner), "text", ""))
