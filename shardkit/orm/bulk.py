"""Bulk operations of the ORM: rows split by their keys, each shard's rows given to SQLAlchemy as one operation.

Driven by `ShardSession.execute`. SQLAlchemy's bulk insert and bulk update by primary key take their connection from
the session's transaction, so each shard is pinned in turn; sync and async alike. What SQLAlchemy adds to the rows, the
defaults of columns, has one clock on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import Executable
from sqlalchemy.engine import Result

from shardkit.core.errors import ReferenceDiffers

from . import replicas, replicated
from .planning.clock import telling
from .planning.freezing import frozen
from .planning.gather import Interleaved, Rows, Same, gather
from .planning.whole import EveryShardPlan

if TYPE_CHECKING:
    from .session import ShardSession


def is_bulk(statement: Executable, parameters: Any) -> bool:
    """Whether SQLAlchemy runs this as a bulk operation: an ORM insert with rows, or update with a list of rows."""
    if not parameters or not statement.is_dml or "plugin_subject" not in statement._propagate_attrs:
        return False
    if statement.is_insert:
        return True
    return bool(statement.is_update) and isinstance(parameters, list)


def execute(
    session: ShardSession,
    run: Callable[..., Result[Any]],
    statement: Executable,
    parameters: Any,
    options: Mapping[str, Any],
) -> Result[Any]:
    """Run a bulk operation on every shard that has rows of it; one result, in the order of the rows."""
    execution_options = options.get("execution_options") or {}
    if execution_options.get("autoflush", True):
        session._autoflush()
    statement = frozen(statement)
    plan = session.cluster.planner.plan(statement, parameters, execution_options)
    replicas.refuse_write(replicas.wanted({**statement._execution_options, **execution_options}))
    route = session.provision(plan)
    if isinstance(plan, EveryShardPlan):
        replicated.lock(session, plan.target, route.shards)
    results: dict[int, Result[Any]] = {}
    times = session.shards.times()
    for shard_id, part in route.shards.items():
        one_clock = telling(session.shards.connection(shard_id), times)
        with session.pinned(session.shards.engine(shard_id)), one_clock:
            results[shard_id] = run(part.statement, part.parameters, **options)
    first = next(iter(results.values()))
    if route.merge is None or not statement._returning:  # type: ignore[attr-defined]
        return first
    assert isinstance(route.merge, Rows | Interleaved | Same)
    try:
        return gather(results, route.merge)
    except ReferenceDiffers:
        replicated.fail(session, next(iter(route.shards)))
        raise
