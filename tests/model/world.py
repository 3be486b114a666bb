"""The state of the model: shards, catalog, movers, applications, as tuples; and the setting of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from shardkit.core.move import FINAL, STILL, Phase

from . import topologies
from .rules import ALL, Rule

Step = tuple[str | int, ...]
"""A step that a mover has ahead: its name in `actions.STEPS`, and what it is about."""

ABSENT = -1
"""The value of a range's row where there is none."""


class Content(NamedTuple):
    """What a shard's server holds, and a crash or a fail-over may bring back as it was."""

    names: tuple[int, ...]
    """Its fences, oldest first."""
    copy: int
    """Its copy of the topology."""
    token: int
    rows: tuple[int, ...]
    """Of each range one row that stands for all: a counter."""
    subscriptions: tuple[int, ...]
    """Of each stream, on its target: 0 none, 1 enabled, 2 disabled."""
    slots: tuple[tuple[int, ...] | None, ...]
    """Of each stream, on its source: what the subscription has yet to apply."""
    triggers: tuple[bool, ...]


class Shard(NamedTuple):
    """A server with one shard."""

    now: Content
    locker: int = 0
    """The token of the mover that holds the fences in ACCESS EXCLUSIVE mode; 0 nobody."""
    maker: int = 0
    """The token of the mover that is about to make a slot."""
    kept: Content | None = None
    """What a crash or a fail-over brings back now; None: all of it."""
    epoch: int = 0
    """How often a standby has taken over."""


class Catalog(NamedTuple):
    """The catalog's database."""

    current: int
    proposed: tuple[int, ...]
    version: int
    """The highest number that was given out."""
    lease: int
    phases: tuple[Phase, ...]
    epochs: tuple[tuple[int, ...], ...]
    """Of each transfer, which servers its copy began with."""


class Thread(NamedTuple):
    """A mover's work on one transfer: the phase that it knows, and the steps that lie ahead."""

    phase: Phase
    steps: tuple[Step, ...]
    verified: bool = False


class Mover(NamedTuple):
    """A process that moves."""

    token: int
    abort: bool
    threads: tuple[Thread, ...]


class App(NamedTuple):
    """A client of a session: what it believes, and its transaction."""

    topology: int
    left: int
    """So many transactions it has yet to begin."""
    kind: str = ""
    held: tuple[tuple[int, ...], ...] = ()
    """The fences held on each shard."""
    sent: tuple[bool, ...] = ()
    counted: tuple[int, ...] = ()
    """Of a scatter: how often a row of each range was met."""
    snapshot: tuple[int, ...] | None = None
    """What the target's rows were as REPEATABLE READ took its snapshot there, and what was acknowledged then."""


class Budget(NamedTuple):
    """What may still go wrong, so that a run ends."""

    movers: int = 0
    aborts: int = 0
    postponements: int = 0
    hangs: int = 0
    failovers: int = 0
    crashes: int = 0
    lost_slots: int = 0
    catalog_losses: int = 0
    planted: int = 0
    rollbacks: int = 0


class World(NamedTuple):
    """All of it."""

    shards: tuple[Shard, ...]
    catalog: Catalog
    kept_catalog: Catalog | None
    movers: tuple[Mover | None, ...]
    apps: tuple[App, ...]
    acked: tuple[int, ...]
    """Of each range, the last value that was acknowledged to a writer."""
    budget: Budget


class Transfer(NamedTuple):
    """What moves where."""

    source: int
    target: int
    key_range: int


@dataclass(frozen=True)
class Scenario:
    """What a run has in it."""

    name: str
    transfers: tuple[Transfer, ...] = (Transfer(0, 1, 0),)
    owners: tuple[int, int] = (0, 0)
    shards: int = 2
    apps: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """Of each application: how many transactions, and of which kinds."""
    budget: Budget = Budget()  # noqa: RUF009 (a tuple: it cannot change)
    standbys: frozenset[int] = frozenset()
    """Shards whose standby lags behind what movers commit there."""
    locked: bool = False
    """Without logical replication: the range passes in one step under the fence."""
    history: bool = False
    """Begin after a move of range 0 that was aborted, its names not yet drained."""
    keeps: bool = False
    """The source keeps its rows until an operator finalizes, which he always can, or rolls back."""
    begins: Phase | None = None
    """Begin where an undisturbed mover has come to this phase."""
    must_end: bool = True
    """Whether everything has to come to its end, or a refusal is one."""
    rules: frozenset[Rule] = ALL

    @cached_property
    def streams(self) -> tuple[Transfer, ...]:
        """Where replication can go: along each transfer, and, if sources are kept, back along each."""
        back = tuple(Transfer(there.target, there.source, there.key_range) for there in self.transfers)
        return (*self.transfers, *back) if self.keeps else self.transfers


def first(scenario: Scenario) -> World:
    """The beginning: every shard at rest, one mover at work."""
    start = topologies.first(scenario.owners, scenario.shards)
    names: list[tuple[int, ...]] = [(fence,) for fence in topologies.facts(start).fences]
    current, version = start, 1
    if scenario.history:
        current = topologies.unmarked(topologies.marked(start, 2, 1, 0), 3, 1, 0)
        version = 3
        names[1] = (
            topologies.facts(topologies.marked(start, 2, 1, 0)).fences[1],
            topologies.facts(current).fences[1],
        )
    none, streams = (0,) * len(scenario.transfers), scenario.streams
    shards = tuple(
        Shard(
            Content(
                names[shard],
                current,
                1,
                tuple(0 if owner == shard else ABSENT for owner in scenario.owners),
                tuple(0 for _ in streams),
                tuple(None for _ in streams),
                tuple(False for _ in none),
            )
        )
        for shard in range(scenario.shards)
    )
    phases = (Phase.PLANNED,) * len(none)
    at_rest = tuple(0 for _ in shards)
    return World(
        shards,
        Catalog(current, (), version, 1, phases, (at_rest,) * len(none)),
        None,
        (Mover(1, False, tuple(Thread(phase, (("act",),)) for phase in phases)), None),
        tuple(
            App(topologies.marked(start, 2, 1, 0) if scenario.history else current, left)
            for left, _ in scenario.apps
        ),
        (0,) * len(scenario.owners),
        scenario.budget,
    )


def put(world: World, shard: int, value: Shard) -> World:
    """The world with another state of a shard."""
    return world._replace(shards=(*world.shards[:shard], value, *world.shards[shard + 1 :]))


def replaced(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    """A tuple with another value at a place."""
    return (*values[:at], value, *values[at + 1 :])


def owner_of(world: World, key_range: int) -> list[int]:
    """The shards on which a router with the right topology could write a range now."""
    return [
        number
        for number, shard in enumerate(world.shards)
        if not shard.locker
        and any(topologies.maker(name).owners[key_range] == number for name in shard.now.names)
    ]


def holders(world: World, shard: int, names: tuple[int, ...]) -> bool:
    """Whether a transaction of an application holds one of the fences."""
    return any(app.held and any(name in names for name in app.held[shard]) for app in world.apps)


def all_final(catalog: Catalog) -> bool:
    """Whether the job has come to its end."""
    return all(phase in FINAL for phase in catalog.phases)


def all_still(catalog: Catalog) -> bool:
    """Whether no mover has anything to do."""
    return all(phase in STILL for phase in catalog.phases)
