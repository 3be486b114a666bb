"""Explaining: where a statement would run and why, what runs there, and how the results become one.

Plans and routes as a session does, and sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Executable
from sqlalchemy.ext.asyncio import async_scoped_session
from sqlalchemy.orm import scoped_session

from .planning.plan import Parameters

if TYPE_CHECKING:
    from .session import ShardAsyncSession, ShardSession

    AnySession = (
        ShardSession
        | ShardAsyncSession
        | scoped_session[ShardSession]
        | async_scoped_session[ShardAsyncSession]
    )


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a session would do with a statement.

    ``shards`` are the names of the shards it runs on; ``reason`` says why there; ``sent`` is the SQL that each of them
    is sent, by name, without the values; ``merged`` says how their results become one, None if there is one shard only.
    """

    shards: tuple[str, ...]
    reason: str
    sent: dict[str, str]
    merged: str | None

    def __str__(self) -> str:
        lines = [f"{', '.join(self.shards)}: {self.reason}"]
        texts: dict[str, list[str]] = {}
        for name, text in self.sent.items():
            texts.setdefault(text, []).append(name)
        lines += [f"  {', '.join(names)}: {text}" for text, names in texts.items()]
        if self.merged is not None:
            lines.append(f"  then {self.merged}")
        return "\n".join(lines)


def explain(session: AnySession, statement: Executable, parameters: Parameters = None) -> Explanation:
    """Where a session would run a statement, and why; nothing is sent.

    ``session`` may be sync or async. Raises what executing the statement would raise before anything is sent:
    `UnroutableQuery`, `KeyTypeError`, `DeclarationError`.
    """
    inner: Any = session.registry() if isinstance(session, scoped_session | async_scoped_session) else session
    cluster = getattr(inner, "sync_session", inner).cluster
    plan = cluster.planner.plan(statement, parameters, getattr(statement, "_execution_options", None))
    topology = cluster.topology
    route = plan.route(topology)
    names = {shard_id: topology.by_id[shard_id].name for shard_id in route.shards}
    sent = {
        names[shard_id]: " ".join(_text(part.statement, cluster.dialect).split())
        for shard_id, part in route.shards.items()
    }
    merged = None if route.merge is None else plan.merging
    return Explanation(tuple(names.values()), plan.reason, sent, merged)


def _text(statement: Any, dialect: Any) -> str:
    compiled = getattr(statement, "compiled", None)
    return str(statement.compile(dialect=dialect) if compiled is None else compiled)
