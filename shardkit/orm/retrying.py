"""Units of work that are run again: `retrying` makes of a function of a session one that survives what passes.

A unit of work is a function: its session is made for each attempt, committed when it returns, and closed. (Not a ``for
attempt in ...: with attempt:``, as a ``return`` within that would leave it before it is known whether the commit
went well.) Only errors after which nothing was committed lead to another attempt.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, overload

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from shardkit.core.errors import ShardkitError, UsageError

ATTEMPTS = 5
_FIRST = 0.02
_LONGEST = 1.0
_AGAIN = frozenset({"40001", "40P01"})
"""SQLSTATEs of a serialization failure and a deadlock: PostgreSQL has rolled back."""

S = TypeVar("S", bound=Session)
A = TypeVar("A", bound=AsyncSession)
S_co = TypeVar("S_co", bound=Session, covariant=True)
A_co = TypeVar("A_co", bound=AsyncSession, covariant=True)
P = ParamSpec("P")
T = TypeVar("T")

Pause = Callable[[int], float]


class Decorator(Protocol[S_co]):
    """Takes a function of a session, and gives one that brings the session along."""

    def __call__(self, work: Callable[Concatenate[S_co, P], T], /) -> Callable[P, T]:
        """The function that is run again."""
        ...


class AsyncDecorator(Protocol[A_co]):
    """The same for coroutine functions."""

    def __call__(
        self, work: Callable[Concatenate[A_co, P], Awaitable[T]], /
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        """The coroutine function that is run again."""
        ...


def is_retryable(error: BaseException) -> bool:
    """Whether nothing was committed and another attempt may succeed: `ShardkitError.retryable`, a serialization
    failure, a deadlock, a connection lost before COMMIT. `CommitUnknown` is none of them."""
    if isinstance(error, ShardkitError):
        return error.retryable
    if not isinstance(error, DBAPIError):
        return False
    return error.connection_invalidated or getattr(error.orig, "sqlstate", None) in _AGAIN


def backoff(attempt: int) -> float:
    """Seconds to wait after an attempt (the first is 1): any time up to a limit that doubles, so that those who met do
    not meet again."""
    return random.uniform(0, min(_LONGEST, _FIRST * 2.0 ** min(attempt - 1, 10)))


@overload
def retrying(factory: sessionmaker[S], *, attempts: int = ..., pause: Pause = ...) -> Decorator[S]: ...
@overload
def retrying(
    factory: async_sessionmaker[A], *, attempts: int = ..., pause: Pause = ...
) -> AsyncDecorator[A]: ...
def retrying(factory: Any, *, attempts: int = ATTEMPTS, pause: Pause = backoff) -> Any:
    """A decorator for units of work: functions whose first argument is a session of ``factory``.

        @shardkit.retrying(Session)
        def rename(session, user_id, name):
            session.get_one(User, user_id).name = name

        rename(42, "Ada")

    Each call begins, commits and closes a session. After an error that `is_retryable` it is run again, ``attempts``
    times at most, with ``pause(attempt)`` seconds in between; the last error passes through, and so does every
    other at once. Called within another unit of the same factory, it takes part in that one: the outer one commits, and
    is run again. What it does besides the session must bear repetition. With an ``async_sessionmaker``, the function is
    a coroutine function. Raises `UsageError` for other functions.
    """
    if attempts < 1:
        raise UsageError("A unit of work needs one attempt at least.")
    is_async = isinstance(factory, async_sessionmaker)

    def decorate(work: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(work) or inspect.isasyncgenfunction(work):
            raise UsageError("A generator is no unit of work: it ends when its caller likes.")
        if is_async != inspect.iscoroutinefunction(work):
            kind = "async def, for an async_sessionmaker" if is_async else "def, for a sessionmaker"
            raise UsageError(f"This unit of work has to be made by {kind}.")
        run = _run_async if is_async else _run

        @functools.wraps(work)
        def sync(*args: Any, **kwargs: Any) -> Any:
            return run(factory, attempts, pause, lambda session: work(session, *args, **kwargs))

        if not is_async:
            return sync

        @functools.wraps(work)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await sync(*args, **kwargs)

        return coroutine

    return decorate


class _Unit(NamedTuple):
    """A unit of work under way. Other threads and tasks inherit the context and must not share its session."""

    factory: Any
    session: Any
    owner: Any
    outer: _Unit | None


_current: ContextVar[_Unit | None] = ContextVar("shardkit_unit", default=None)


def _joined(factory: Any, owner: Any) -> Any:
    unit = _current.get()
    while unit is not None:
        if unit.factory is factory and unit.owner is owner:
            return unit.session
        unit = unit.outer
    return None


def _run(factory: Any, attempts: int, pause: Pause, work: Callable[[Any], Any]) -> Any:
    owner = threading.current_thread()
    outer = _joined(factory, owner)
    if outer is not None:
        return work(outer)
    for attempt in range(1, attempts + 1):
        try:
            with factory.begin() as session:
                token = _current.set(_Unit(factory, session, owner, _current.get()))
                try:
                    return work(session)
                finally:
                    _current.reset(token)
        except Exception as error:
            if not _again(error, attempt, attempts):
                raise
        time.sleep(pause(attempt))
    raise AssertionError("the last attempt returns or raises")


async def _run_async(factory: Any, attempts: int, pause: Pause, work: Callable[[Any], Any]) -> Any:
    owner = asyncio.current_task()
    outer = _joined(factory, owner)
    if outer is not None:
        return await work(outer)
    for attempt in range(1, attempts + 1):
        try:
            async with factory.begin() as session:
                token = _current.set(_Unit(factory, session, owner, _current.get()))
                try:
                    return await work(session)
                finally:
                    _current.reset(token)
        except Exception as error:
            if not _again(error, attempt, attempts):
                raise
        await asyncio.sleep(pause(attempt))
    raise AssertionError("the last attempt returns or raises")


def _again(error: Exception, attempt: int, attempts: int) -> bool:
    if not is_retryable(error):
        return False
    if attempt == attempts and attempts > 1:
        error.add_note(f"Given up after {attempts} attempts.")
    return attempt < attempts
