"""Steps of a transfer's changes of the topology: the mark, the decision, the opening, and the way back."""

from __future__ import annotations

from shardkit.core.move import Event

from . import changes, topologies
from .copying import guarded, same, slot_of, step_on, subscription_of
from .rules import Rule
from .turn import Moves, Turn
from .world import Step, replaced


def mark(turn: Turn, when: str) -> Moves:
    """Mark the range in transit on the target, unless it is."""
    wanted = "before" if Rule.MARK_FIRST in turn.rules else "after"
    if when != wanted or turn.marked_on(turn.transfer.target):
        yield from turn.at_once()
    else:
        yield from turn.at_once(("apply", "mark target"))


def unmark_target(turn: Turn) -> Moves:
    """Take the copy back, if there can be one."""
    steps: tuple[Step, ...] = ()
    if turn.marked_on(turn.transfer.target):
        steps = (("delete", "target"), ("apply", "unmark target"))
    yield from turn.at_once(*steps)


def claim_source(turn: Turn) -> Moves:
    source = turn.transfer.source
    yield from step_on(turn, source, "writes its token", turn.shard(source).now)


def unless_decided(turn: Turn) -> Moves:
    """What a lost connection left pending may have been the decision."""
    if turn.owned_by(turn.transfer.target):
        yield turn.enters(Event.DECIDED)
    else:
        yield from turn.at_once()


def if_verified(turn: Turn) -> Moves:
    """This process has to have compared the rows; or a table was altered since."""
    if not turn.thread.verified:
        yield turn.enters(Event.POSTPONED)
        return
    yield from turn.at_once()
    budget = turn.world.budget
    if budget.postponements:
        world = turn.world._replace(budget=budget._replace(postponements=budget.postponements - 1))
        yield turn.on(world).enters(Event.POSTPONED)


def replayed(turn: Turn, shard: int) -> Moves:
    """While the source is locked: everything is applied on the target."""
    if turn.shard(shard).locker != turn.token:
        yield f"{turn.name} lost its session on {shard}", turn.again()
        return
    if Rule.SAME_SERVERS in turn.rules and not same(turn):
        yield f"{turn.name} lost its connection to a server that failed over", turn.again()
        return
    slot = slot_of(turn)
    if Rule.WAIT_FOR_REPLAY not in turn.rules:
        yield f"{turn.name} waits for nothing", turn.go()
    elif slot is None or subscription_of(turn) != 1:
        yield f"{turn.name} postpones, as nothing is replicated", turn.again()
    elif not slot:
        yield f"{turn.name} sees that all is applied", turn.go()


def step(turn: Turn) -> Moves:
    """The one step of a locked transfer: clear what an interrupted one left, copy and decide, delete."""
    if turn.owned_by(turn.transfer.target):
        yield from turn.at_once(("delete", "source"))
    elif Rule.LOCKED_COPY in turn.rules:
        yield from turn.at_once(("delete", "target"), ("apply", "cut over"), ("delete", "source"))
    else:
        early: Step = ("carry", turn.transfer.source)
        yield from turn.at_once(("delete", "target"), early, ("apply", "cut over"), ("delete", "source"))


def carry(turn: Turn, shard: int) -> Moves:
    """While the source is locked: copy its row, in a transaction of the target that is behind its newest fence."""
    if Rule.LOCKED_COPY not in turn.rules and turn.shard(shard).locker == turn.token:
        yield from turn.at_once()
        return
    if Rule.LOCKED_COPY in turn.rules and turn.shard(shard).locker != turn.token:
        yield f"{turn.name} lost its session on {shard}", turn.again()
        return
    target, key_range = turn.transfer.target, turn.transfer.key_range
    if not guarded(turn, target):
        return
    row, now = turn.shard(shard).now.rows[key_range], turn.shard(target).now
    yield from step_on(turn, target, f"copies {row}", now._replace(rows=replaced(now.rows, key_range, row)))


def decide(turn: Turn, change: int, shard: int) -> Moves:
    """The commit of the source's rename."""
    state = turn.shard(shard)
    if state.locker != turn.token:
        yield f"{turn.name} lost its session on {shard}", turn.again()
        return
    if Rule.STANDBYS_OF_TARGET in turn.rules and turn.shard(turn.transfer.target).kept is not None:
        return
    world = turn.commit(
        shard,
        changes.renamed(turn, state.now, change, shard),
        synchronous=Rule.SYNCHRONOUS_DECISION in turn.rules,
    )
    yield f"{turn.name} DECIDES {topologies.facts(change).version} on {shard}", turn.go(world)


def opened(turn: Turn) -> Moves:
    """The opening came with the change; the catalog has to know of it."""
    if turn.owned_by(turn.transfer.target):
        yield from turn.at_once()
    else:
        yield turn.stopped("the catalog does not hold what was decided")


def wait_for_opening(turn: Turn) -> Moves:
    """Until the target's standbys have the opening; one that took over without it is readmitted before."""
    target = turn.transfer.target
    state = turn.shard(target)
    behind = topologies.facts(turn.world.catalog.current).fences[target] not in state.now.names
    if Rule.STANDBYS_BEFORE_PURGE in turn.rules and (behind or state.kept is not None):
        return
    yield from turn.at_once()
