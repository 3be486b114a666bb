"""What the commands that want keys elsewhere have in common: show what would move, ask, record the wish, carry it out.

A wish (other weights, a shard that is to leave, a pin) is a next topology in which no row has moved. It is recorded
first; then the job brings the rows where it wants them. Killed between the two, `rebalance run` makes that job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rich.console import Console

from shardkit.core.errors import JobRunning, NothingToDo, RetryLater
from shardkit.core.move import Mode
from shardkit.core.placement import Placement, plan
from shardkit.core.topology import Topology
from shardkit.rebalance.mover import Mover, weights_of
from shardkit.storage import leaving
from shardkit.storage.catalog import Catalog, Job
from shardkit.storage.connections import ShardConnections

from . import jobs, plans
from .output import next_step, show
from .running import carry


@dataclass(frozen=True)
class Wish:
    """Where keys are wanted: the kind of its job, its name in the audit trail and what that tells, and what makes the
    next topology of the one before and a version."""

    kind: str
    event: str
    make: Callable[[Topology, int], Topology]
    told: Mapping[str, Any] = field(default_factory=dict)

    def next(self, topology: Topology) -> Topology:
        """The topology with the wish in it."""
        return self.make(topology, topology.version + 1)

    def is_recorded(self, topology: Topology) -> bool:
        """Whether the topology says so already."""
        return replace(self.next(topology), version=topology.version) == topology

    def placement(self, topology: Topology) -> Placement:
        """What would move for it."""
        wanted = self.next(topology)
        return plan(wanted, weights_of(wanted))


class How(NamedTuple):
    """How a job is to be carried out: by which mode, with how many transfers side by side, and with what patience."""

    mode: Mode
    parallel: int
    patience: float


def current(catalog: Catalog) -> Topology:
    """The topology in force; `NothingToDo` before the first shard."""
    topology = catalog.current()
    if topology is None:
        raise NothingToDo("There is no shard yet.", hint="Add the first with `shardkit shard add NAME URL`.")
    return topology


def look(
    catalog: Catalog, shards: ShardConnections, topology: Topology, wish: Wish, mode: Mode
) -> tuple[Placement, dict[str, Any]]:
    """What would move, for the program and as a document; `JobRunning` while a job is unfinished."""
    if catalog.running_job() is not None:
        raise JobRunning
    placement = wish.placement(topology)
    return placement, plans.describe(wish.next(topology), placement, shards, mode)


def carry_out(catalog_url: str, wish: Wish, placement: Placement, how: How) -> dict[str, Any] | None:
    """Record the wish and move what ``placement`` says; the job's document, or None if nothing had to move.

    `RetryLater`, with nothing changed, if another placement is due by now.
    """

    def act(mover: Mover) -> Job | None:
        catalog = mover.catalog
        if catalog.running_job() is not None:
            raise JobRunning
        topology = current(catalog)
        if wish.placement(topology) != placement:
            raise RetryLater(
                "The topology changed meanwhile, and another plan is due; nothing was changed.",
                hint="Run the same command again.",
            )
        if not wish.is_recorded(topology):
            with ShardConnections() as shards:
                leaving.record(catalog, shards, wish.make, event=wish.event, told=wish.told)
        if placement.transfers:
            mover.start(wish.kind, mode=how.mode)
            return mover.run()
        mover.let_go()
        return None

    return carry(catalog_url, act, parallel=how.parallel, patience=how.patience)


def show_done(
    catalog: str, document: dict[str, Any], as_json: bool, *, plan_only: bool, says: str | None = None
) -> None:
    """The result: ``document`` with its ``plan`` and ``job``, and the next step; ``says`` is one line more."""
    if plan_only:
        todo: str | None = "the same command without --plan-only."
    else:
        with Catalog.open(catalog) as opened:
            todo = jobs.next_step(opened, opened.current())

    def draw(console: Console) -> None:
        if document["job"] is not None:
            jobs.draw(console, document["job"])
        elif document["plan"] is not None:
            plans.draw(console, document["plan"])
        if says:
            console.print(says, soft_wrap=True)
        next_step(console, todo)

    show({**document, "next": todo}, as_json, draw)
