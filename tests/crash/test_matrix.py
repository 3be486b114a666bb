"""The crash matrix: every failpoint of a move, and everything that can happen there, under live applications.

A mover is killed, or stopped while something else fails; then it goes on, or another one resumes or aborts. Whatever it
was: every acknowledged write is there once, nothing that was deleted is back, no client has seen an error but those of
a server that was down, nothing of the move is left behind, and catalog and shards tell the same.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from shardkit.core.move import Mode, Phase
from shardkit.storage import failpoints, replication
from shardkit.storage.connections import connect
from tests.applications import Failure
from tests.movers import REFUSED, RETRY_LATER
from tests.outages import BLOCKED, LONG, SERVERS, World
from tests.proxy import PEER


@dataclass(frozen=True)
class Event:
    """Something that happens while a mover stands at a point; ``kills`` instead of stopping it there."""

    name: str
    happen: Callable[[World, str, str], None] = lambda world, source, target: None
    kills: bool = False
    ends: tuple[int, ...] = (0, RETRY_LATER)
    """Exit codes of the mover that are in order afterwards."""
    then: str = "resume"
    downs: str | None = None
    """The role of the server that is down for a moment."""


def interrupt(number: signal.Signals) -> Callable[[World, str, str], None]:
    def happen(world: World, source: str, target: str) -> None:
        world.movers.signal(number)
        world.movers.signal(signal.SIGCONT)

    return happen


def peers_of(fail: Callable[..., None]) -> Callable[[World, str, str], None]:
    return lambda world, source, target: fail(world, source, kind=PEER)


KILL = Event("SIGKILL, resume", kills=True)
KILL_ABORT = Event("SIGKILL, abort", kills=True, then="abort")
CRASH_SOURCE = Event("source killed", lambda w, source, _: w.crash(source), downs="source")
MUTE = Event("answers lost", lambda w, *_: w.mute())
EVENTS = (
    KILL,
    KILL_ABORT,
    Event("SIGINT", interrupt(signal.SIGINT)),
    Event("SIGTERM", interrupt(signal.SIGTERM), then="abort"),
    CRASH_SOURCE,
    Event("target killed", lambda w, _, target: w.crash(target), downs="target"),
    Event("catalog killed", lambda w, *_: w.crash("catalog"), downs="catalog"),
    Event("source cut off", lambda w, source, _: w.cut(source)),
    Event("target cut off", lambda w, _, target: w.cut(target)),
    Event("catalog cut off", lambda w, *_: w.cut("catalog")),
    Event("network silent", lambda w, *_: w.blackhole(*SERVERS)),
    MUTE,
    Event("target cut off source", peers_of(World.cut)),
    Event("target hears nothing of source", peers_of(World.blackhole)),
)
SILENT_LONG = Event("network silent for long", lambda w, *_: w.blackhole(*SERVERS, seconds=BLOCKED))
PEERS_LONG = Event("target long cut off source", lambda w, source, _: w.cut(source, kind=PEER, seconds=LONG))
ALL_EVENTS = (*EVENTS, SILENT_LONG, PEERS_LONG)
BY_NAME = {event.name: event for event in ALL_EVENTS}

AGAIN = {
    **dict.fromkeys(("catalog.propose", "catalog.record"), (2, 3)),
    **dict.fromkeys(("closing", "drop_subscription", "drop_publication", "drop_slot", "delete_rows"), (2,)),
    "catalog.note": (2, 3, 4),
    "catalog.enter": (2, 3, 4, 5, 6, 7, 8),
}
"""Steps that a move makes several times: so each pass of them is a point as well, for some events."""
AGAIN_EVENTS = (KILL, KILL_ABORT, CRASH_SOURCE, MUTE)
HOLDING = (
    "change.locked", "cutting over.before decision", "cutting over.before opening", "closing.commit:2",
    "opening.commit", "claim_publisher.commit", "delete_rows.commit", "install_triggers.commit",
)  # fmt: skip
"""Points in transactions that others wait for: there the network is silent for longer than a server puts up with."""
IN_STEPS = "in steps: "
"""Before points that are passed in other moves too."""
LOCKED_TOO = (
    "change.locked:3", "closing.commit:2", "closing.committed:2", "opening.commit:2", "opening.committed:2",
    "catalog.propose.committed:3", "catalog.record.commit:3", "copying.begin", "copying.end", "aborting.begin",
    "aborting.end", "purging.begin",
)  # fmt: skip
ON_KEEPING = ("catching up.", "cut over.", "install_refusals.", "begin_back.", "enable_back.")
"""Beginnings of the points that a move passes which keeps its sources; the others of `failpoints.BACK` its rollback."""
STREAMING = (
    "create_subscription.committed", "copying.poll", "catching up.begin", "verifying.begin", "cutting over.begin",
    "closing.committed:2",
)  # fmt: skip
"""Points at which the target needs its source: there it is without for longer than a subscription is patient."""
SAME = frozenset(
    ("change.proposed", "change.decided", "change.opened", "change.recorded", "drop.subscription", "drop.slot",
     "purge.batch", "purging.batch", "copying.published", "copying.subscribed")
)  # fmt: skip
"""Points right behind the commit of a step, which is one itself: killed there, and nothing else."""


def _cells() -> Iterator[tuple[str, Event]]:
    for point in failpoints.MOVE:
        for event in (KILL, KILL_ABORT) if point in SAME else EVENTS:
            yield point, event
    for step, times in AGAIN.items():
        for edge in ("commit", "committed"):
            for time in times:
                for event in AGAIN_EVENTS:
                    yield f"{step}.{edge}:{time}", event
    for point in HOLDING:
        yield point, SILENT_LONG
    for point in STREAMING:
        yield point, PEERS_LONG
    for point in (*failpoints.BACK, *failpoints.EMPTY_TARGET):
        for event in EVENTS:
            yield point, event
    for point in (*failpoints.LOCKED, *LOCKED_TOO):
        for event in EVENTS:
            yield (point if point in failpoints.LOCKED else f"{IN_STEPS}{point}"), event


CELLS = tuple(_cells())
USUAL = (
    ("closing.commit:2", "SIGKILL, resume"),
    ("closing.committed:2", "answers lost"),
    ("opening.commit", "target killed"),
    ("create_subscription.committed", "SIGTERM"),
    ("catalog.record.commit:2", "catalog killed"),
    ("take_changes.committed", "target cut off source"),
    ("delete_rows.commit", "source cut off"),
    ("cutting back.before opening", "target killed"),
    ("locked.receive.committed:2", "SIGKILL, abort"),
    ("put_back.after", "target killed"),
)


def test_every_point_of_a_move_is_in_the_matrix() -> None:
    points = {point.removeprefix(IN_STEPS).partition(":")[0] for point, _ in CELLS}
    assert points == {*failpoints.MOVE, *failpoints.EMPTY_TARGET, *failpoints.LOCKED, *failpoints.BACK}
    elsewhere = (failpoints.ASIDE, failpoints.JOIN, failpoints.PLACEMENT, failpoints.READMISSION, failpoints.IDS)
    assert points.union(*elsewhere, failpoints.TWO_PHASE) == failpoints.POINTS


# --- one case --------------------------------------------------------------------------------------------------------


class Worlds:
    """A world for many cases, made again after one that failed; counts what passed. ``run`` is one case."""

    def __init__(self, make: Callable[[], World], run: Callable[[World, str, Event], None]) -> None:
        self._make = make
        self._run = run
        self._world: World | None = None
        self.passed: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.writes = 0

    def run(self, point: str, event: Event) -> None:
        if self._world is None:
            self._world = self._make()
            self._world.begin()
        before = self._world.applications.done
        try:
            self._run(self._world, point, event)
        except BaseException:
            self.failed[event.name] += 1
            self.close()
            raise
        self.passed[event.name] += 1
        self.writes += self._world.applications.done - before

    def close(self) -> None:
        if self._world is not None:
            world, self._world = self._world, None
            world.close()

    def end(self, request: pytest.FixtureRequest) -> None:
        """Close it, and print the counts."""
        self.close()
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line("\n" + self.table())

    def table(self) -> str:
        """How many cases passed, by event."""
        lines = [f"{'event':<32} {'passed':>7} {'failed':>7}"]
        lines += [
            f"{event.name:<32} {self.passed[event.name]:>7} {self.failed[event.name]:>7}"
            for event in ALL_EVENTS
        ]
        lines.append(f"{'all':<32} {self.passed.total():>7} {self.failed.total():>7}")
        return "\n".join([*lines, f"{self.writes} writes were acknowledged meanwhile"])


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(lambda: World(tmp_path_factory.mktemp("matrix")), run)
    yield made
    made.end(request)


def run(world: World, point: str, event: Event) -> None:
    """Bring a mover to the point, let the event happen, see to it that the job ends, and look."""
    weights, source, target = world.next_weights()
    if point in failpoints.EMPTY_TARGET:
        drain(world, target)
    before = world.topology
    mode = Mode.LOCKED if point.startswith((IN_STEPS, "locked.")) else Mode.LOGICAL
    point = point.removeprefix(IN_STEPS)
    goal: dict[str, Any] = {"weights": weights, "mode": mode}
    act = bring_near(world, point, target, goal)
    options = goal if act in ("move", "keep") else {}
    with obstacle(world, point, source, target) as remove:
        if event.kills:
            world.until_killed(act, point, **options)
            remove()
        else:
            world.until_stopped(act, point, **options)
            remove()
            event.happen(world, source, target)
            code = world.wait()
            ends = (*event.ends, REFUSED) if point.startswith("catalog.failed") else event.ends
            assert code in ends, f"the mover ended with {code}: {world.movers.said}"
    if world.has_work():
        world.act("abort" if act == "abort" else event.then)
    elif world.topology.owned(0) == before.owned(0) and act == "move":
        # It was not stored yet that there is a job.
        assert point.startswith("catalog.create_job"), point
        world.act("move", **goal)
    if world.keeps_sources():
        world.act("rollback" if act == "keep" else "finalize")
    check_outcome(world)
    world.check(of_outage(event, source, target))


def drain(world: World, name: str) -> None:
    """Leave nothing on a shard; an abort may have left it so."""
    topology = world.topology
    drained = topology.named(name).id
    if topology.owned(drained):
        world.act("move", weights={shard.id: int(shard.id != drained) for shard in topology.shards})


def of_outage(event: Event, source: str, target: str) -> Callable[[Failure], bool]:
    """Whether an error that a client met is of the server which the event takes down: it says that one is away, and
    names that one or none."""
    # Clients go on without the catalog.
    downs = {"source": source, "target": target}.get(event.downs or "")

    def allowed(failure: Failure) -> bool:
        named = getattr(failure.error, "shard", None)
        return downs is not None and failure.server_is_away and named in (None, downs)

    return allowed


def check_outcome(world: World) -> None:
    state, moves = world.moves_of_last_job()
    topology = world.topology
    assert state in ("done", "aborted", "rolled back")
    for target, arcs, phase in moves:
        assert phase in (Phase.DONE, Phase.ABORTED, Phase.ROLLED_BACK)
        assert topology.owned(target).issuperset(arcs) == (phase is Phase.DONE)


def bring_near(world: World, point: str, target: str, goal: dict[str, Any]) -> str:
    """What a mover has to do to pass the point, after what others did before it."""
    if point in failpoints.BACK:
        if point.startswith(ON_KEEPING):
            return "keep"
        world.act("keep", **goal)
        if point.startswith(("staying.", "clear_notes.")):
            world.until_killed("rollback", "verifying back.end")
            return "abort"
        return "rollback"
    if point.startswith(("aborting.", "claim_source.")):
        half_way = "locked.opened:2" if goal["mode"] is Mode.LOCKED else "verifying.begin"
        world.until_killed("move", half_way, **goal)
        return "abort"
    if point.startswith(("settling.", "catalog.discard.")):
        world.until_killed("move", "change.proposed:2", **goal)
        return "resume"
    if point.startswith("drop_unfinished."):
        world.until_killed("move", "put_back.after", **goal)
        world.shards.on(target).execute(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'public.badge_account'::regclass"
        )
        return "resume"
    if point.startswith("enable_subscription."):
        world.until_killed("move", "copying.subscribed", **goal)
        with connect(f"postgresql:///app?service={target}") as connection:
            row = connection.execute("SELECT subname FROM pg_subscription").fetchone()
            assert row is not None
            replication.set_enabled(connection, row[0], False)
        return "resume"
    return "move"


@contextmanager
def obstacle(world: World, point: str, source: str, target: str) -> Iterator[Callable[[], None]]:
    """What a mover has to meet to pass some points: a long transaction, a table that it refuses. Yields its end."""
    if point.startswith("catalog.waiting."):
        with world.holding_table(source) as end:
            yield end
    elif point.startswith("catalog.failed."):
        world.shards.on(target).execute("ALTER TABLE public.entry ADD COLUMN extra int")

        def drop() -> None:
            world.shards.on(target).execute("ALTER TABLE public.entry DROP COLUMN extra")

        yield drop
    else:
        yield lambda: None


# --- the cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("point", "event"), USUAL)
def test_nothing_is_lost_after(worlds: Worlds, point: str, event: str) -> None:
    worlds.run(point, BY_NAME[event])


# In another order, so that the first hour has tried some of everything.
SHUFFLED = random.Random(2).sample([(point, event.name) for point, event in CELLS], len(CELLS))


@pytest.mark.slow
@pytest.mark.parametrize(("point", "event"), SHUFFLED)
def test_nothing_is_lost_at_any_point_after(worlds: Worlds, point: str, event: str) -> None:
    worlds.run(point, BY_NAME[event])
