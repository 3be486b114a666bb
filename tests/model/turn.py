"""A mover's turn: what one step of one thread sees and can do to the world, under the rules of the token and lease."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from shardkit.core.move import ROLLBACK, STILL, Event, Phase, step

from . import topologies
from .rules import Rule
from .world import (
    Content,
    Mover,
    Scenario,
    Shard,
    Step,
    Thread,
    World,
    put,
)

Moves = Iterator[tuple[str, World]]

BACK = ROLLBACK | {Phase.STAYING}
"""Phases whose steps go from the target to the source."""

CHANGING = frozenset({"close", "replayed", "decide", "open", "record", "look", "discard"})
"""The steps within a change of the topology: of a mover's threads, one at a time."""


class Turn:
    """One step of a thread. The methods that end in a world take the step off the thread's list."""

    __slots__ = (
        "index", "mover", "name", "number", "rules", "scenario", "seat", "steps", "thread", "token", "transfer", "world"
    )  # fmt: skip

    def __init__(
        self,
        scenario: Scenario,
        world: World,
        seat: int,
        index: int,
        steps: Mapping[str, Callable[..., Moves]],
    ) -> None:
        mover = world.movers[seat]
        assert mover is not None
        self.scenario, self.rules, self.world = scenario, scenario.rules, world
        self.seat, self.index, self.mover, self.steps = seat, index, mover, steps
        self.thread: Thread = mover.threads[index]
        self.number, self.transfer = index, scenario.transfers[index]
        if self.thread.phase in BACK:
            self._turn_round("back")
        self.token = mover.token
        self.name = f"mover {mover.token}" + (f"/{index}" if len(mover.threads) > 1 else "")

    def _turn_round(self, way: str) -> None:
        self.number = self.index + (len(self.scenario.transfers) if way == "back" else 0)
        self.transfer = self.scenario.streams[self.number]

    def along(self, way: str) -> Turn:
        """The same turn along one of the two ways: what is source and target here is exchanged on the way back."""
        turn = self.on(self.world)
        turn._turn_round(way)
        return turn

    def take(self) -> Moves:
        """The thread's next step."""
        name, *about = self.thread.steps[0]
        arguments: list[Any] = about
        return self.steps[str(name)](self, *arguments)

    def on(self, world: World) -> Turn:
        """The same turn in another world."""
        return Turn(self.scenario, world, self.seat, self.index, self.steps)

    def at_once(self, *push: Step, skip: int = 1) -> Moves:
        """Take the step after this one at once: this one was only a look at what nobody else can change meanwhile
        without this mover's next transaction failing."""
        threads = list(self.mover.threads)
        threads[self.index] = self.thread._replace(steps=(*push, *self.thread.steps[skip:]))
        mover = self.mover._replace(threads=tuple(threads))
        return self.on(with_mover(self.world, self.seat, mover)).take()

    # --- where the thread stands -----------------------------------------------------------------------------------

    def others_change(self) -> bool:
        """Whether another thread of this mover is within a change."""
        return any(
            thread.steps and thread.steps[0][0] in CHANGING
            for number, thread in enumerate(self.mover.threads)
            if number != self.index
        )

    def with_thread(self, thread: Thread, world: World) -> World:
        """The world with another state of the thread; a mover with nothing left to do ends."""
        threads = (*self.mover.threads[: self.index], thread, *self.mover.threads[self.index + 1 :])
        if all(not each.steps for each in threads):
            return with_mover(world, self.seat, None)
        return with_mover(world, self.seat, self.mover._replace(threads=threads))

    def go(self, world: World | None = None, *push: Step, **changes: Any) -> World:
        """The step is done; those of ``push`` come next."""
        thread = self.thread._replace(steps=(*push, *self.thread.steps[1:]), **changes)
        return self.with_thread(thread, world or self.world)

    def again(self, world: World | None = None) -> World:
        """A connection was lost: settle what is pending, and begin with the phase that is stored."""
        world = released(world or self.world, self.token)
        phase = world.catalog.phases[self.index]
        return self.with_thread(Thread(phase, (("settle", "entry"), ("act",))), world)

    def stopped(self, why: str) -> tuple[str, World]:
        """The process ends, and with it its locks."""
        return f"{self.name} stops: {why}", with_mover(released(self.world, self.token), self.seat, None)

    # --- shards ----------------------------------------------------------------------------------------------------

    def shard(self, number: int) -> Shard:
        return self.world.shards[number]

    def claim(self, number: int) -> str | None:
        """Write the token: None, "wait" while another holds the row, or "superseded"."""
        if Rule.TOKEN not in self.rules:
            return None
        shard = self.shard(number)
        if shard.locker not in (0, self.token):
            return "wait"
        return "superseded" if shard.now.token > self.token else None

    def commit(
        self,
        number: int,
        now: Content,
        *,
        locker: int = 0,
        synchronous: bool = True,
        world: World | None = None,
    ) -> World:
        """The world after a transaction of the mover on a shard, the token in it."""
        world = world or self.world
        shard = world.shards[number]
        if Rule.TOKEN in self.rules:
            now = now._replace(token=max(now.token, self.token))
        lags = number in self.scenario.standbys or not synchronous
        kept = shard.kept if shard.kept is not None else shard.now if lags else None
        return put(world, number, shard._replace(now=now, locker=locker, kept=kept))

    def claimed(self, number: int, then: Iterator[tuple[str, World]]) -> Moves:
        """What ``then`` yields if the token can be written."""
        found = self.claim(number)
        if found == "superseded":
            yield self.stopped(f"a newer token on {number}")
        elif found is None:
            yield from then

    # --- catalog ---------------------------------------------------------------------------------------------------

    def leased(self) -> bool:
        """Whether the catalog takes writes of this mover."""
        return Rule.LEASE not in self.rules or self.world.catalog.lease == self.token

    def with_catalog(self, **changes: Any) -> World:
        return self.world._replace(catalog=self.world.catalog._replace(**changes))

    def owned_by(self, shard: int) -> bool:
        """Whether the catalog says that a shard owns the range."""
        return topologies.facts(self.world.catalog.current).owners[self.transfer.key_range] == shard

    def marked_on(self, shard: int) -> bool:
        """Whether the catalog says that the range is in transit on a shard."""
        return topologies.facts(self.world.catalog.current).marked[shard][self.transfer.key_range]

    def enters(self, event: Event) -> tuple[str, World]:
        """The event of the phase, by the table; the phase that follows is stored."""
        catalog = self.world.catalog
        known = catalog.phases[self.index]
        if not self.leased() or known is not self.thread.phase:
            return self.stopped("the catalog is another's")
        row = step(self.thread.phase, event)
        phases = (*catalog.phases[: self.index], row.next, *catalog.phases[self.index + 1 :])
        world = self.with_catalog(phases=phases)
        steps: tuple[Step, ...] = () if row.next in STILL else (("act",),)
        thread = Thread(row.next, steps, self.thread.verified)
        return f"{self.name}: {row.phase}, {row.event}: {row.next}", self.with_thread(thread, world)


def with_mover(world: World, seat: int, mover: Mover | None) -> World:
    """The world with another state of a mover."""
    return world._replace(movers=(*world.movers[:seat], mover, *world.movers[seat + 1 :]))


def released(world: World, token: int) -> World:
    """The world after the sessions of a mover have ended."""
    return world._replace(
        shards=tuple(
            shard._replace(
                locker=0 if shard.locker == token else shard.locker,
                maker=0 if shard.maker == token else shard.maker,
            )
            for shard in world.shards
        )
    )
