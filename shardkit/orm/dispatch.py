"""Dispatch: what a session gives SQLAlchemy in place of a connection.

The session's executions end in ``connection.execute(statement, parameters)``, after autoflush, after the events and
options that change a statement. There a `Dispatch` plans the statement, provisions its shards and runs it on them: on
one as it is, on several at the same time. Loading of instances happens above, in the caller's thread, from one result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, CursorResult, Executable
from sqlalchemy.util.concurrency import await_, greenlet_spawn

from shardkit.core.errors import UnmergeableQuery
from shardkit.storage.answers import ANSWER, Answer
from shardkit.storage.dialect import WRITES

from . import byhand, partial, remembered, replicas, replicated, scatterpolicy
from .planning.clock import Times, telling
from .planning.freezing import frozen
from .planning.prepared import ONCE
from .planning.routing import Parameters, Plan, Route, ShardPart
from .planning.whole import EveryShardPlan

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

    from .planning.plan import Plan
    from .session import ShardSession
    from .transaction import ShardTransaction

_Work = Callable[[], CursorResult[Any]]
_CANCEL_SECONDS = 5.0
_CANCEL_PAUSE = 0.02


class Finishing:
    """What a merge may do beside reading results (`merge.Finish`), on one connection of the route, for the statement
    that was given."""

    def __init__(
        self,
        connection: Connection,
        given: ShardPart,
        options: Mapping[str, Any],
        times: Callable[[], Times] | None = None,
    ) -> None:
        """``times`` says what time it is, if the statement asks."""
        self._connection = connection
        self._given = given
        self._options = options
        self._times = times

    def run(self, statement: Executable, parameters: Mapping[str, Any]) -> CursorResult[Any]:
        """Run a statement of the merge's own."""
        return self._connection.execute(statement, parameters)

    def answer(
        self, description: Sequence[Any], rows: Iterable[Any], close: Callable[[], None] | None = None
    ) -> CursorResult[Any]:
        """The result of the given statement."""
        options = {name: value for name, value in self._options.items() if name != "stream_results"}
        options[ANSWER] = Answer(description, rows, close)
        statement, parameters = self._given
        return self._connection.execute(statement, parameters, execution_options=options)

    def times(self) -> Times:
        """What time it is for all shards of the statement."""
        assert self._times is not None
        return self._times()

    def parts(self, route: Route) -> Mapping[int, ShardPart]:
        """The parts of a route, one of them with the rows that any shard can make."""
        if not route.made_once:
            return route.shards
        once = (True, *[False] * len(route.shards))
        return {
            shard_id: part._replace(parameters={**cast(Mapping[str, Any], part.parameters), ONCE: first})
            for (shard_id, part), first in zip(route.shards.items(), once, strict=False)
        }

    def instead(self, statement: Executable) -> CursorResult[Any]:
        """Run the given statement in another form."""
        parameters = self._given.parameters
        with nullcontext() if self._times is None else telling(self._connection, self._times):
            return self._connection.execute(statement, parameters, execution_options=self._options)


class Dispatch:
    """Runs the statements of one session on the shards they belong to."""

    def __init__(self, session: ShardSession, *, by_hand: bool = False) -> None:
        """``by_hand`` says that the application scatters the statement itself (`orm.byhand`)."""
        self._session = session
        self._by_hand = by_hand

    @property
    def dialect(self) -> Dialect:
        """The dialect that all shards share."""
        return self._session.cluster.dialect

    def execute(
        self,
        statement: Executable,
        parameters: Parameters = None,
        *,
        execution_options: Mapping[str, Any] | None = None,
    ) -> CursorResult[Any]:
        """Run a statement where it belongs; as ``Connection.execute``."""
        statement = frozen(statement)
        own = statement._execution_options
        options: Mapping[str, Any] = {**own, **(execution_options or {})} if own else execution_options or {}
        bound = remembered.bound(statement, options) if remembered.REFRESHING in options else None
        if bound is not None:
            result = self._execute(bound, parameters, options)
            rows = [tuple(row) for row in result]
            if rows:
                return result._rewind(rows)
            # The row may have another shard key by now: it was deleted and inserted again.
        return self._execute(statement, parameters, options)

    def _execute(
        self, statement: Executable, parameters: Parameters, options: Mapping[str, Any]
    ) -> CursorResult[Any]:
        session = self._session
        plan: Plan
        if self._by_hand:
            plan = byhand.plan_scattered(statement, parameters or None, options)
        else:
            plan = session.cluster.planner.plan(statement, parameters or None, options)
        if plan.everywhere:
            scatterpolicy.met(statement, plan.reason, options.get(scatterpolicy.SCATTER, session.scatter))
        given = ShardPart(statement, parameters)
        read_from = replicas.wanted(options) if replicas.READ_FROM in options else "primary"
        if read_from == "primary":
            return self._run(plan, given, options, session.shards)
        if statement.is_dml:
            replicas.refuse_write(read_from)
        readers = session.replicas(read_from)
        return readers.repeated(lambda: self._run(plan, given, options, readers))

    def _run(
        self, plan: Plan, given: ShardPart, options: Mapping[str, Any], shards: ShardTransaction
    ) -> CursorResult[Any]:
        session = self._session
        route = session.provision(plan, partial.wanted(options), shards)
        if plan.writes:
            options = {**options, WRITES: True}
        times = shards.times() if plan.asks_the_time else None
        if route.merge is None:
            ((shard_id, part),) = route.shards.items()
            connection = shards.connection(shard_id)
            if times is None or shard_id == shards.first:
                return connection.execute(part.statement, part.parameters, execution_options=options)
            with telling(connection, times):
                return connection.execute(part.statement, part.parameters, execution_options=options)
        if isinstance(plan, EveryShardPlan):
            return replicated.execute(session, plan.target, route, options)
        return self._on_several(route, given, options, shards, times, one_first=plan.one_first)

    def scalar(
        self,
        statement: Executable,
        parameters: Parameters = None,
        *,
        execution_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """The first column of the first row; as ``Connection.scalar``."""
        return self.execute(statement, parameters, execution_options=execution_options).scalar()

    def _on_several(
        self,
        route: Route,
        given: ShardPart,
        options: Mapping[str, Any],
        shards: ShardTransaction,
        times: Callable[[], Times] | None,
        *,
        one_first: bool,
    ) -> CursorResult[Any]:
        session = self._session
        # Connections are had here, one after the other: a session's transaction is not for several threads.
        connections = {shard_id: shards.connection(shard_id) for shard_id in route.shards}
        sent = {name: value for name, value in options.items() if name not in ("stream_results", "yield_per")}
        if route.streamed:
            sent["stream_results"] = True

        def work(shard_id: int) -> _Work:
            part, connection = parts[shard_id], connections[shard_id]
            values = part.parameters if first is None else replicated.with_defaults(part.parameters, first)

            def run() -> CursorResult[Any]:
                return connection.execute(part.statement, values, execution_options=sent)

            return run if times is None else telling(connection, times)(run)

        assert route.merge is not None
        if route.merge.as_text:
            _vet_text(connections.values())
        finish = Finishing(next(iter(connections.values())), given, options, times)
        if times is not None:
            times()  # while its connection is not in use
        parts = finish.parts(route)
        first: CursorResult[Any] | None = None
        before: dict[int, CursorResult[Any]] = {}
        if one_first:
            first_id = next(iter(parts))
            first = before[first_id] = work(first_id)()
        works = {shard_id: work(shard_id) for shard_id in parts if shard_id not in before}
        if session.engines.is_async:
            results = await_(_in_tasks(works))
        else:
            results = _in_threads(works, session.cluster.workers, lambda: _cancel(connections.values()))
        assert route.merge is not None
        return route.merge.merged({**before, **results}, finish)


def _vet_text(connections: Iterable[Connection]) -> None:
    for connection in connections:
        why = getattr(connection.dialect, "rounds", None)
        if why is not None:
            raise UnmergeableQuery(
                f"Values of several shards would have to be compared as text, and {why}.",
                hint="Set it back for the role or database of each shard: ALTER DATABASE ... RESET ...",
                reason="settings",
            )


def _in_threads(
    works: dict[int, _Work], workers: ThreadPoolExecutor, cancel: Callable[[], None]
) -> dict[int, CursorResult[Any]]:
    """Run all but the last in threads; wait for all, even when one fails: their connections are in use until then. What
    the others do is of no use any more when the last has failed or is interrupted, so they are cancelled."""
    *others, (last_id, last) = works.items()
    futures: dict[int, Future[CursorResult[Any]]] = {}
    try:
        for shard_id, one in others:
            futures[shard_id] = workers.submit(one)
        last_result = last()
        wait_for(futures.values())
    except BaseException:
        # Again and again: one of them may only be about to send its statement.
        while wait_for(futures.values(), timeout=_CANCEL_PAUSE).not_done:
            cancel()
        raise
    return {**{shard_id: future.result() for shard_id, future in futures.items()}, last_id: last_result}


def _cancel(connections: Iterable[Connection]) -> None:
    """Ask the servers to end the statements that run on some connections."""
    for connection in connections:
        raw = connection.connection.driver_connection if not connection.invalidated else None
        if raw is not None and raw.pgconn.transaction_status == TransactionStatus.ACTIVE:
            with suppress(psycopg.Error):
                raw.cancel_safe(timeout=_CANCEL_SECONDS)


async def _in_tasks(works: dict[int, _Work]) -> dict[int, CursorResult[Any]]:
    """Run each in a task with a greenlet of its own; cancelled or failed, it returns when all have ended."""
    tasks = {shard_id: asyncio.ensure_future(greenlet_spawn(one)) for shard_id, one in works.items()}
    try:
        await asyncio.wait(tasks.values())
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    return {shard_id: task.result() for shard_id, task in tasks.items()}
