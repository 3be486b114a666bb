"""A client of the history: ``python -m tests.history.client CONFIGURATION``.

It works through the real session, synchronous and with tasks of a loop, until its stdin ends, and records what it does.
Only one client inserts and deletes a key: its owner. All read and write all keys.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Self

from sqlalchemy import BigInteger, Text, func, select, update
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import shardkit
from shardkit.core.errors import CommitUnknown
from shardkit.orm.retrying import is_retryable
from tests.history.records import WIDTH, Kind, Operation, Outcome, Row, line

BANDS = 8
TAIL = 6 * (WIDTH + 1)
"""Characters of the tail that a row keeps."""
DIGITS = "0123456789abcdefghjklmnopqrstuvwxyz"  # no "i": it tells increments


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    band: Mapped[int]
    born: Mapped[int] = mapped_column(BigInteger)
    version: Mapped[int]
    n: Mapped[int]
    tail: Mapped[str] = mapped_column(Text)

    @property
    def row(self) -> Row:
        return Row(self.born, self.version, self.n, self.tail)


@dataclass(frozen=True)
class Configuration:
    """What a client is told. Of ``keys``, it inserts and deletes those that are ``number`` modulo ``clients``."""

    catalog: str
    file: str
    number: int
    clients: int
    keys: int
    tasks: int
    thinking: float
    seed: str

    def dump(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `dump`."""
        return cls(**json.loads(text))


class Work(NamedTuple):
    """An operation to do: what is recorded of it before, and the function of a session that does it."""

    asked: Operation
    do: Callable[[Session], Operation]


def keys_of_band(band: int, keys: int) -> list[int]:
    """The keys that a COUNT or LIST of a band asks for."""
    return list(range(band, keys, BANDS))


# --- operations: each in a session of its own, which the caller commits --------------------------------------------


def read(key: int) -> Work:
    asked = Operation(Kind.READ, key, time.monotonic_ns(), None, Outcome.UNKNOWN)

    def do(session: Session) -> Operation:
        item = session.get(Item, key)
        return asked._replace(row=item.row if item is not None else None)

    return Work(asked, do)


def write(key: int, token: str, lock: bool) -> Work:
    """An increment or an append, by the statement's own arithmetic or by that of Python under a lock of the row."""
    asked = Operation(Kind.WRITE, key, time.monotonic_ns(), None, Outcome.UNKNOWN, token)
    more = int(token.startswith("i"))

    def do(session: Session) -> Operation:
        if lock:
            item = session.get(Item, key, with_for_update=True)
            if item is None:
                return asked
            item.version, item.n = item.version + 1, item.n + more
            item.tail = f"{item.tail} {token}"[-TAIL:]
            session.flush()
            return asked._replace(row=item.row)
        statement = (
            update(Item)
            .where(Item.id == key)
            .values(version=Item.version + 1, n=Item.n + more, tail=func.right(Item.tail + f" {token}", TAIL))
            .returning(Item.born, Item.version, Item.n, Item.tail)
        )
        found = session.execute(statement).one_or_none()
        return asked._replace(row=Row(*found) if found is not None else None)

    return Work(asked, do)


def insert(key: int, token: str) -> Work:
    born = time.monotonic_ns()
    asked = Operation(Kind.INSERT, key, born, None, Outcome.UNKNOWN, token, born)

    def do(session: Session) -> Operation:
        item = Item(id=key, band=key % BANDS, born=born, version=1, n=0, tail=token)
        session.add(item)
        session.flush()
        return asked._replace(row=item.row)

    return Work(asked, do)


def delete(key: int, born: int) -> Work:
    asked = Operation(Kind.DELETE, key, time.monotonic_ns(), None, Outcome.UNKNOWN, "", born)

    def do(session: Session) -> Operation:
        statement = (
            sql_delete(Item)
            .where(Item.id == key, Item.born == born)
            .returning(Item.born, Item.version, Item.n, Item.tail)
        )
        found = session.execute(statement).one_or_none()
        return asked._replace(row=Row(*found) if found is not None else None)

    return Work(asked, do)


def count(band: int) -> Work:
    asked = Operation(Kind.COUNT, band, time.monotonic_ns(), None, Outcome.UNKNOWN)

    def do(session: Session) -> Operation:
        found = session.scalar(select(func.count()).select_from(Item).where(Item.band == band))
        return asked._replace(rows=found or 0)

    return Work(asked, do)


def listing(band: int) -> Work:
    asked = Operation(Kind.LIST, band, time.monotonic_ns(), None, Outcome.UNKNOWN)

    def do(session: Session) -> Operation:
        found = session.scalars(select(Item.id).where(Item.band == band)).all()
        return asked._replace(keys=tuple(found), rows=len(found))

    return Work(asked, do)


# --- a client ------------------------------------------------------------------------------------------------------


class Client:
    """Chooses what to do, and records it. Its thread, or one of its tasks, is a `Worker`."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self._file = os.open(configuration.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._numbers = itertools.count()
        self.ending = threading.Event()

    def record(self, operation: Operation) -> None:
        """One write, so that a line is there or not, whoever is killed."""
        os.write(self._file, line(operation))

    def token(self, increments: bool) -> str:
        """One that nobody else makes: the client's number and a number of its own."""
        number, digits = next(self._numbers), []
        for _ in range(WIDTH - 4):
            number, digit = divmod(number, len(DIGITS))
            digits.append(DIGITS[digit])
        return ("i" if increments else "a") + f"{self.configuration.number:03}" + "".join(digits)

    def owned(self, worker: int, workers: int) -> list[int]:
        """Keys that a worker inserts and deletes."""
        clients = self.configuration.clients
        mine = range(self.configuration.number % clients, self.configuration.keys, clients)
        return list(mine)[worker::workers]


class Worker:
    """One sequence of operations."""

    def __init__(self, client: Client, number: int, workers: int) -> None:
        configuration = client.configuration
        self._client = client
        self._rng = random.Random(f"{configuration.seed} {configuration.number} {number}")
        self._keys = configuration.keys
        self._owned = client.owned(number, workers)
        self._mine = frozenset(self._owned)
        self._born: dict[int, int | None] = {}
        """Of owned keys, where it is known: when the row was inserted, None if it is not there."""
        self._to_learn = list(self._owned)

    def next(self) -> Work:
        """The next operation. First what became of every key of one's own, which another may have owned before."""
        rng = self._rng
        if self._to_learn:
            return read(self._to_learn[-1])
        key = rng.randrange(self._keys)
        match rng.choices(("read", "write", "own", "count", "list"), (40, 38, 14, 5, 3))[0]:
            case "read":
                return read(key)
            case "write":
                return write(key, self._client.token(rng.random() < 0.5), lock=rng.random() < 0.4)
            case "count":
                return count(rng.randrange(BANDS))
            case "list":
                return listing(rng.randrange(BANDS))
        own = rng.choice(self._owned)
        born = self._born[own]
        if born is None:
            return insert(own, self._client.token(increments=False))
        # Half of the keys stay for good, so that scatters always have rows that were there all the time.
        if own // BANDS % 2:
            return read(own)
        return delete(own, born)

    def learn(self, operation: Operation) -> None:
        """What an operation tells of a key of one's own."""
        if operation.key not in self._mine or operation.kind in (Kind.COUNT, Kind.LIST, Kind.WRITE):
            return
        if operation.outcome is not Outcome.DONE:
            if operation.kind is not Kind.READ:
                self._to_learn.append(operation.key)
            return
        if operation.kind is Kind.DELETE:
            self._born[operation.key] = None
        else:
            self._born[operation.key] = operation.row.born if operation.row is not None else None
        if operation.kind is Kind.READ and operation.key in self._to_learn:
            self._to_learn.remove(operation.key)

    def thinking(self) -> float:
        """Seconds until the next."""
        mean = self._client.configuration.thinking
        return self._rng.expovariate(1 / mean) if mean else 0.0

    def begin(self) -> Work:
        """The next operation, recorded."""
        work = self.next()
        if work.asked.kind in (Kind.WRITE, Kind.INSERT, Kind.DELETE):
            self._client.record(work.asked)
        return work

    def end(self, asked: Operation, done: Operation | None, error: Exception | None) -> None:
        """Record what became of it. An error is told on stderr: a move is no reason for any."""
        ended = time.monotonic_ns()
        if error is None:
            assert done is not None
            operation = done._replace(ended=ended, outcome=Outcome.DONE)
        else:
            print(f"{asked}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            sure = is_retryable(error) and not isinstance(error, CommitUnknown)
            operation = asked._replace(
                ended=ended if sure else None, outcome=Outcome.FAILED if sure else Outcome.UNKNOWN
            )
        self._client.record(operation)
        self.learn(operation)


def work(cluster: shardkit.ShardCluster, client: Client, worker: Worker) -> None:
    """A worker that is a thread."""
    sessions = cluster.sessionmaker()
    while not client.ending.wait(worker.thinking()):
        todo = worker.begin()
        done, problem = None, None
        try:
            with sessions() as session:
                done = todo.do(session)
                session.commit()
        except Exception as error:
            problem = error
        worker.end(todo.asked, done, problem)


async def work_async(cluster: shardkit.ShardCluster, client: Client, worker: Worker) -> None:
    """A worker that is a task."""
    sessions = cluster.async_sessionmaker()
    while not client.ending.is_set():
        todo = worker.begin()
        done, problem = None, None
        try:
            async with sessions() as session:
                done = await session.run_sync(todo.do)
                await session.commit()
        except Exception as error:
            problem = error
        worker.end(todo.asked, done, problem)
        await asyncio.sleep(worker.thinking())


async def tasks(cluster: shardkit.ShardCluster, client: Client, workers: Iterable[Worker]) -> None:
    """All workers that are tasks."""
    await asyncio.gather(*(work_async(cluster, client, worker) for worker in workers))
    await cluster.adispose()


def main(configuration: Configuration) -> None:
    """Work until the end of stdin."""
    client = Client(configuration)
    cluster = shardkit.connect(configuration.catalog)
    number = 1 + configuration.tasks
    first, *others = (Worker(client, index, number) for index in range(number))
    thread = threading.Thread(target=work, args=(cluster, client, first))
    loop = threading.Thread(target=lambda: asyncio.run(tasks(cluster, client, others)))
    thread.start()
    loop.start()
    sys.stdin.read()
    client.ending.set()
    thread.join()
    loop.join()
    cluster.dispose()


def file_of(folder: Path, number: int) -> Path:
    """Where a client records."""
    return folder / f"client-{number:03}.jsonl"


if __name__ == "__main__":
    main(Configuration.parse(sys.argv[1]))
