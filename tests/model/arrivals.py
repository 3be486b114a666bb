"""Movers come and go: they begin, supersede and replace each other, vanish; and operators say what becomes of a source
that is kept."""

from __future__ import annotations

from collections.abc import Iterator

from shardkit.core.move import STILL, Event, Phase, can_abort, step

from .rules import Rule
from .turn import released, with_mover
from .world import Mover, Shard, Thread, World, put

Moves = Iterator[tuple[str, World]]


def new_mover(world: World, rules: frozenset[Rule]) -> Moves:
    """Another process takes the job over; or one that holds a fence vanishes."""
    budget = world.budget
    if budget.movers:
        left = world._replace(budget=budget._replace(movers=budget.movers - 1))
        holder = next(
            (
                seat
                for seat, mover in enumerate(world.movers)
                if mover is not None and mover.token == world.catalog.lease
            ),
            None,
        )
        free = next((seat for seat, mover in enumerate(world.movers) if mover is None), None)
        if free is not None:
            yield from _starts(left, free, "begins")
        if holder is not None:
            killed = released(with_mover(left, holder, None), world.catalog.lease)
            yield from _starts(killed, holder, f"replaces mover {world.catalog.lease}, killed,")
    for number, shard in enumerate(world.shards):
        if shard.locker:
            yield from _hung(world, rules, number, shard)


def _hung(world: World, rules: frozenset[Rule], number: int, shard: Shard) -> Moves:
    """A mover that holds a fence and is heard of no more; its server ends the session, or does not."""
    budget = world.budget
    seat = next((s for s, m in enumerate(world.movers) if m and m.token == shard.locker), None)
    if seat is None:
        if Rule.HUNG_SESSIONS in rules:
            label = f"the server ends the session of mover {shard.locker} on {number}"
            yield label, put(world, number, shard._replace(locker=0))
    elif budget.hangs and budget.movers:
        left = world._replace(budget=budget._replace(hangs=budget.hangs - 1))
        yield f"the machine of mover {shard.locker} vanishes", with_mover(left, seat, None)
        if Rule.HUNG_SESSIONS in rules:
            label = f"the server ends the session of mover {shard.locker}, which sleeps, on {number}"
            yield label, put(left, number, shard._replace(locker=0))


def _starts(world: World, seat: int, how: str) -> Moves:
    catalog = world.catalog
    token = catalog.lease + 1
    leased = world._replace(catalog=catalog._replace(lease=token))
    for abort in (False, True):
        if abort:
            if not world.budget.aborts or not any(map(can_abort, catalog.phases)):
                continue
            leased = leased._replace(budget=world.budget._replace(aborts=world.budget.aborts - 1))
        then = "turn back" if abort else "act"
        threads = tuple(
            Thread(phase, () if phase in STILL else (("settle", "entry"), (then,)))
            for phase in catalog.phases
        )
        yield (
            f"mover {token} {how}" + (" to abort" if abort else ""),
            with_mover(leased, seat, Mover(token, abort, threads)),
        )


def operator(world: World) -> Moves:
    """Sources are kept: the operator lets them go, or has the ranges brought back, where that is possible."""
    free = next((seat for seat, mover in enumerate(world.movers) if mover is None), None)
    if free is None:
        return
    token = world.catalog.lease + 1
    for event in (Event.FINALIZE, Event.ROLL_BACK):
        budget = world.budget
        if event is Event.ROLL_BACK:
            if not budget.rollbacks:
                continue
            budget = budget._replace(rollbacks=budget.rollbacks - 1)
        phases = tuple(
            step(phase, event).next if phase is Phase.KEPT else phase for phase in world.catalog.phases
        )
        threads = tuple(
            Thread(phase, () if phase in STILL else (("settle", "entry"), ("act",))) for phase in phases
        )
        told = world._replace(budget=budget, catalog=world.catalog._replace(lease=token, phases=phases))
        yield (
            f"mover {token}, told by an operator: {Phase.KEPT}, {event}: {step(Phase.KEPT, event).next}",
            with_mover(told, free, Mover(token, False, threads)),
        )
