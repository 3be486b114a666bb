"""Applications that write through the real session, sync and async, and know what was acknowledged.

Each client owns its accounts, so it knows their every state: what it reads has to be what it wrote last, and what is on
the shards in the end has to be exactly what was acknowledged. A write that failed is *in doubt* until it is looked at:
then it is there as a whole, or not at all.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, delete, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import shardkit
from shardkit.core.errors import CommitUnknown, ShardUnreachable
from shardkit.core.keyrange import slot_of
from shardkit.core.ring import position
from shardkit.orm.ids import _uuids
from tests.sharded import affected

THINKING = 0.15
"""Seconds between two writes of a client, on average."""


class Base(DeclarativeBase):
    pass


@shardkit.sharded(by="id")
class Account(Base):
    __tablename__ = "Account"  # a name that has to be quoted
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    n: Mapped[int]
    note: Mapped[str | None]


@shardkit.sharded(by="account_id")
class Entry(Base):
    __tablename__ = "entry"
    account_id: Mapped[int] = mapped_column(ForeignKey(Account.id), primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    text: Mapped[str]


@shardkit.sharded(by="account_id")
class Badge(Base):
    """Its primary key does not hold the shard key: a move gives it another replica identity for a while."""

    __tablename__ = "badge"
    __table_args__ = (Index("badge_account", "account_id"),)
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=shardkit.slot_id())
    account_id: Mapped[int] = mapped_column(ForeignKey(Account.id))


@dataclass(frozen=True, slots=True)
class State:
    """All rows of one account."""

    n: int = 0
    note: str | None = None
    entries: frozenset[tuple[int, str]] = frozenset()
    badges: frozenset[uuid.UUID] = frozenset()

    def changed(self, rng: random.Random, new_badge: Callable[[], uuid.UUID]) -> State:
        """Another state, one transaction away: an increment, and rows that come, change and go."""
        note = rng.choice([None, "ü\t\n\\N", f"{self.n}"])
        number = rng.randrange(4)
        kept = frozenset(entry for entry in self.entries if entry[0] != number)
        # One that was there is deleted half the time, and inserted again later.
        entries = kept if kept != self.entries and rng.random() < 0.5 else kept | {(number, f"{self.n}")}
        badges = self.badges
        if rng.random() < 0.3:
            badges = badges - {rng.choice(sorted(badges))} if len(badges) > 1 else badges | {new_badge()}
        return State(self.n + 1, note, entries, badges)


def read(session: Session, key: int) -> State:
    """The state of an account, by the session."""
    account = session.get_one(Account, key)
    entries = session.scalars(select(Entry).where(Entry.account_id == key))
    badges = session.scalars(select(Badge.id).where(Badge.account_id == key))
    return State(account.n, account.note, frozenset((e.number, e.text) for e in entries), frozenset(badges))


def write(session: Session, key: int, old: State, new: State) -> None:
    """Bring an account from one state to another, in one unit of work of few statements, and commit."""
    account = session.get_one(Account, key)
    if (account.n, account.note) != (old.n, old.note):
        raise WrongRead(f"account {key} is {account.n}, {account.note!r} where {old} was acknowledged")
    account.n, account.note = new.n, new.note
    was, becomes = dict(old.entries), dict(new.entries)
    touched = 0
    for number, text in new.entries - old.entries:
        if number not in was:
            session.add(Entry(account_id=key, number=number, text=text))
        else:
            row = (Entry.account_id == key, Entry.number == number)
            touched += affected(session.execute(update(Entry).where(*row).values(text=text))) - 1
    for number in was.keys() - becomes.keys():
        row = (Entry.account_id == key, Entry.number == number)
        touched += affected(session.execute(delete(Entry).where(*row))) - 1
    session.add_all(Badge(id=badge, account_id=key) for badge in new.badges - old.badges)
    for badge in old.badges - new.badges:
        touched += affected(session.execute(delete(Badge).where(Badge.id == badge))) - 1
    if touched:
        raise WrongRead(f"rows of account {key} were not there: {old} was acknowledged")
    session.commit()


class WrongRead(Exception):
    """The session returned what was not acknowledged: a lost update, or one that came back."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that a client met."""

    at: float
    key: int
    error: BaseException

    @property
    def server_is_away(self) -> bool:
        """Whether it says that a server is away, and nothing else."""
        if isinstance(self.error, ShardUnreachable | CommitUnknown):
            return True
        return isinstance(self.error, DBAPIError) and self.error.connection_invalidated


@dataclass(slots=True)
class Client:
    """What one client knows; it works on one account at a time."""

    states: dict[int, State]
    rng: random.Random
    new_badge: Callable[[int], uuid.UUID]
    doubts: dict[int, State] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    done: int = 0
    idle: bool = False

    def next(self) -> tuple[int, State, State]:
        """An account, its state, and the state to bring it to."""
        key = self.rng.choice(list(self.states))
        old = self.states[key]
        return key, old, old.changed(self.rng, lambda: self.new_badge(key))

    def resolve(self, key: int, found: State) -> None:
        """What a write that failed has done, or not; `WrongRead` where it is neither."""
        doubt = self.doubts.pop(key)
        if found not in (doubt, self.states[key]):
            raise WrongRead(f"account {key} is {found} where {self.states[key]} or {doubt} has to be")
        self.states[key] = found


class Applications(threading.Thread):
    """Some clients: a thread with its session, and one with a loop of two tasks. Start, then `stop`."""

    def __init__(self, cluster: shardkit.ShardCluster, accounts: Iterable[int], seed: int) -> None:
        super().__init__(name="applications")
        self._cluster = cluster
        keys = list(accounts)
        self.clients = [
            Client(dict.fromkeys(keys[number::3], State()), random.Random(f"{seed} {number}"), _badge)
            for number in range(3)
        ]
        self._ending, self._pausing = threading.Event(), threading.Event()

    def load(self) -> None:
        """Insert the accounts."""
        with self._cluster.sessionmaker(mode="best_effort")() as session:
            for client in self.clients:
                session.add_all(Account(id=key, n=0, note=None) for key in client.states)
            session.commit()

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, args=(client,)) for client in self.clients[:1]]
        for thread in threads:
            thread.start()
        asyncio.run(self._tasks())
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """End all clients."""
        self._ending.set()
        self.join()

    def pause(self) -> None:
        """Return when no client is in a transaction, and none begins one until `go_on`."""
        self._pausing.set()
        deadline = time.monotonic() + 30
        while not all(client.idle for client in self.clients):
            assert self.is_alive()
            assert time.monotonic() < deadline, "a client does not come to an end"
            time.sleep(0.002)

    def go_on(self) -> None:
        """The end of a pause."""
        self._pausing.clear()

    @property
    def done(self) -> int:
        """Writes that were acknowledged."""
        return sum(client.done for client in self.clients)

    def take_failures(self) -> list[Failure]:
        """The errors since the last look. During a pause."""
        found = [failure for client in self.clients for failure in client.failures]
        for client in self.clients:
            client.failures = []
        return found

    def check(self, found: dict[int, State]) -> None:
        """Compare what is on the shards with what was acknowledged. During a pause."""
        for client in self.clients:
            for key in list(client.doubts):
                client.resolve(key, found[key])
        expected = {key: state for client in self.clients for key, state in client.states.items()}
        wrong = {key: (found.get(key), state) for key, state in expected.items() if found.get(key) != state}
        assert not wrong, f"(found, acknowledged): {wrong}"
        assert found.keys() == expected.keys()

    # --- clients ---------------------------------------------------------------------------------------------------

    def _may_work(self, client: Client) -> bool:
        client.idle = False
        if self._pausing.is_set():
            client.idle = True
        return not client.idle

    def _work(self, client: Client) -> None:
        sessions = self._cluster.sessionmaker()
        while not self._ending.is_set():
            if self._may_work(client):
                key, old, new = client.next()
                try:
                    if key in client.doubts:
                        with sessions() as session:
                            client.resolve(key, read(session, key))
                        continue
                    with sessions() as session:
                        write(session, key, old, new)
                except Exception as error:
                    _failed(client, key, new, error)
                else:
                    client.states[key] = new
                    client.done += 1
            self._ending.wait(client.rng.expovariate(1 / THINKING))
        client.idle = True

    async def _tasks(self) -> None:
        await asyncio.gather(*(self._task(client) for client in self.clients[1:]))
        await self._cluster.adispose()

    async def _task(self, client: Client) -> None:
        sessions = self._cluster.async_sessionmaker()
        while not self._ending.is_set():
            if self._may_work(client):
                key, old, new = client.next()
                try:
                    if key in client.doubts:
                        async with sessions() as session:
                            client.resolve(key, await session.run_sync(read, key))
                        continue
                    async with sessions() as session:
                        await session.run_sync(write, key, old, new)
                except Exception as error:
                    _failed(client, key, new, error)
                else:
                    client.states[key] = new
                    client.done += 1
            await asyncio.sleep(client.rng.expovariate(1 / THINKING))
        client.idle = True


def _badge(key: int) -> uuid.UUID:
    return _uuids.make(slot_of(position(key)))


def _failed(client: Client, key: int, new: State, error: BaseException) -> None:
    client.failures.append(Failure(time.monotonic(), key, error))
    client.doubts.setdefault(key, new)


def states_of(rows: dict[str, list[Any]]) -> dict[int, State]:
    """States from the rows of the three tables, by table name; asserts that no row is there twice."""
    accounts = {row[0]: State(n=row[1], note=row[2]) for row in rows["Account"]}
    assert len(accounts) == len(rows["Account"]), "an account is there twice"
    entries: dict[int, set[tuple[int, str]]] = {}
    badges: dict[int, set[uuid.UUID]] = {}
    for key, number, text in rows["entry"]:
        entries.setdefault(key, set()).add((number, text))
    for badge, key in rows["badge"]:
        badges.setdefault(key, set()).add(badge)
    assert sum(map(len, entries.values())) == len(rows["entry"]), "an entry is there twice"
    assert sum(map(len, badges.values())) == len(rows["badge"]), "a badge is there twice"
    assert entries.keys() | badges.keys() <= accounts.keys()
    return {
        key: replace(state, entries=frozenset(entries.get(key, ())), badges=frozenset(badges.get(key, ())))
        for key, state in accounts.items()
    }
