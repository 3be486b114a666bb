"""The protocol as a model: what can happen in a state, and what must be so in it.

Applications and movers take their steps (`apps`, `actions`), and the world takes its own: the subscription applies,
a standby catches up, servers crash or fail over, movers are superseded, killed, hung, told to abort.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardkit.core.errors import TopologyInvalid
from shardkit.core.move import FINAL, ROLLBACK, Phase

from . import actions, apps, arrivals, topologies
from .explorer import Violation
from .turn import released
from .world import (
    ABSENT,
    App,
    Mover,
    Scenario,
    Shard,
    Thread,
    Transfer,
    World,
    all_final,
    all_still,
    first,
    holders,
    owner_of,
    put,
    replaced,
)

Moves = Iterator[tuple[str, World]]


class Protocol:
    """A scenario to be explored."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.rules = scenario, scenario.rules

    def first(self) -> World:
        """The beginning."""
        world, phase = first(self.scenario), self.scenario.begins
        if phase in ROLLBACK:
            world = world._replace(budget=world.budget._replace(rollbacks=world.budget.rollbacks + 1))
        while phase is not None and world.catalog.phases[0] is not phase:
            if world.catalog.phases[0] is Phase.KEPT:  # the last that the operator can say
                *_, (_, world) = arrivals.operator(world)
            else:
                _, world = next(iter(actions.take(self.scenario, world, 0, 0)))
            if self.scenario.keeps:  # servers and standbys have had the time to flush
                world = world._replace(shards=tuple(shard._replace(kept=None) for shard in world.shards))
        apps = tuple(app._replace(topology=world.catalog.current) for app in world.apps)
        return world if phase is None else world._replace(apps=apps)

    def successors(self, world: World) -> Moves:
        """Everything that can happen next."""
        for number in range(len(world.apps)):
            yield from apps.moves(self.scenario, world, number)
        for seat, mover in enumerate(world.movers):
            if mover is not None:
                yield from self._mover(world, seat, mover)
        yield from self._applied(world)
        if world.catalog.lease and not all_still(world.catalog):
            yield from arrivals.new_mover(world, self.rules)
        elif not all_final(world.catalog):
            yield from arrivals.operator(world)
        yield from self._servers(world)

    def _mover(self, world: World, seat: int, mover: Mover) -> Moves:
        for index, thread in enumerate(mover.threads):
            if not thread.steps:
                continue
            try:
                yield from actions.take(self.scenario, world, seat, index)
            except TopologyInvalid as error:
                raise Violation(f"mover {mover.token} asks for a topology that cannot be: {error}") from error

    # --- servers ---------------------------------------------------------------------------------------------------

    def _applied(self, world: World) -> Moves:
        """The subscription of each stream applies what its slot has."""
        for index, transfer in enumerate(self.scenario.streams):
            source, target = world.shards[transfer.source], world.shards[transfer.target]
            slot = source.now.slots[index]
            if not slot or target.now.subscriptions[index] != 1:
                continue
            slots = (*source.now.slots[:index], slot[1:], *source.now.slots[index + 1 :])
            after = put(world, transfer.source, source._replace(now=source.now._replace(slots=slots)))
            rows = replaced(target.now.rows, transfer.key_range, slot[0])
            kept = target.kept
            if kept is None and transfer.target in self.scenario.standbys:
                kept = target.now
            now = target.now._replace(rows=rows, slots=self._passed_on(after, transfer, slot[0]))
            after = put(after, transfer.target, target._replace(now=now, kept=kept))
            yield f"{transfer.target} applies {slot[0] if slot[0] != ABSENT else 'a delete'}", after

    def _passed_on(self, world: World, along: Transfer, value: int) -> tuple[tuple[int, ...] | None, ...]:
        """What is applied is written, and goes on along the other way if somebody subscribes to that by now."""
        now = world.shards[along.target].now
        if not self.scenario.keeps:
            return now.slots
        return tuple(
            (*slot, value)
            if slot is not None
            and stream.source == along.target
            and stream.target == along.source
            and world.shards[stream.target].now.subscriptions[number]
            else slot
            for number, (slot, stream) in enumerate(zip(now.slots, self.scenario.streams, strict=True))
        )

    def _servers(self, world: World) -> Moves:
        budget = world.budget
        for number, shard in enumerate(world.shards):
            if shard.kept is not None:
                yield f"all of {number} is flushed", put(world, number, shard._replace(kept=None))
            if budget.failovers and number in self.scenario.standbys and self._may_fail_over(world, number):
                left = world._replace(budget=budget._replace(failovers=budget.failovers - 1))
                yield f"{number} fails over", self._back(left, number, shard, failover=True)
            if self.scenario.standbys:
                yield from self._readmitted(world, number, shard)
            if budget.crashes:
                left = world._replace(budget=budget._replace(crashes=budget.crashes - 1))
                yield f"{number} crashes", self._back(left, number, shard, failover=False)
        if budget.lost_slots:
            yield from self._slot_lost(world)
        if budget.planted:
            yield from self._planted(world)
        if budget.catalog_losses:
            yield from self._catalog_lost(world)

    def _may_fail_over(self, world: World, number: int) -> bool:
        """Up to the clearing that ends a transfer: what a fail-over brings back of that, nobody looks for."""
        for index, phase in enumerate(world.catalog.phases):
            if phase in FINAL or phase in (Phase.ABORTING, Phase.STAYING):
                return False
            back = len(self.scenario.transfers) if phase in ROLLBACK else 0
            transfer = self.scenario.streams[index + back]
            clearing = phase in (Phase.PURGING, Phase.CLEARING)
            if clearing and number == transfer.source:
                return False
            target = world.shards[transfer.target]
            dropped = not any(target.now.subscriptions)
            fence = topologies.facts(world.catalog.current).fences[transfer.target]
            opened = target.kept is None or fence in target.kept.names
            if clearing and number == transfer.target and dropped and opened:
                return False
        return True

    def _back(self, world: World, number: int, shard: Shard, *, failover: bool) -> World:
        """The server is back, with what it kept; its sessions have ended."""
        now = shard.kept or shard.now
        if failover:
            now = now._replace(slots=tuple(None for _ in now.slots))
        epoch = shard.epoch + (1 if failover else 0)
        world = put(world, number, Shard(now, epoch=epoch))
        movers = tuple(self._disconnected(world, mover, number) for mover in world.movers)
        for before, after in zip(world.movers, movers, strict=True):
            if before is not None and before != after:
                world = released(world, before.token)
        return world._replace(
            movers=movers,
            apps=tuple(
                App(app.topology, app.left) if app.held and app.held[number] else app for app in world.apps
            ),
        )

    def _disconnected(self, world: World, mover: Mover | None, number: int) -> Mover | None:
        """A mover after a server was away: it begins again, unless what it does next needs that server no more."""
        if mover is None:
            return None
        return mover._replace(
            threads=tuple(
                thread
                if not thread.steps
                or thread.steps[0][0] in ("record", "enter")
                or (thread.steps[0][0] == "open" and thread.steps[0][3] != number)
                else Thread(phase, (("settle", "entry"), ("act",)))
                for thread, phase in zip(mover.threads, world.catalog.phases, strict=True)
            )
        )

    def _readmitted(self, world: World, number: int, shard: Shard) -> Moves:
        """A shard that failed over and is behind the catalog is brought forward by an operator."""
        catalog = world.catalog
        facts = topologies.facts(catalog.current)
        fence = facts.fences[number]
        if shard.epoch == 0 or catalog.proposed or shard.locker or fence in shard.now.names:
            return
        if holders(world, number, shard.now.names):
            return
        subscriptions = tuple(
            2 if state and transfer.target == number and facts.owners[transfer.key_range] == number else state
            for transfer, state in zip(self.scenario.streams, shard.now.subscriptions, strict=True)
        )
        now = shard.now._replace(names=(fence,), copy=catalog.current, subscriptions=subscriptions)
        yield f"an operator readmits {number}", put(world, number, shard._replace(now=now))

    def _slot_lost(self, world: World) -> Moves:
        """A slot held back too much WAL."""
        left = world._replace(budget=world.budget._replace(lost_slots=world.budget.lost_slots - 1))
        for index, transfer in enumerate(self.scenario.streams):
            source = world.shards[transfer.source]
            if source.now.slots[index]:
                slots = (*source.now.slots[:index], None, *source.now.slots[index + 1 :])
                yield (
                    f"the slot on {transfer.source} is lost",
                    put(left, transfer.source, source._replace(now=source.now._replace(slots=slots))),
                )

    def _planted(self, world: World) -> Moves:
        """Somebody changes a row on the target that is not owned there, before it is compared."""
        many = len(self.scenario.transfers)
        for number, transfer in enumerate(self.scenario.streams):
            index = number % many
            phases = (
                (Phase.KEPT, Phase.ROLLING_BACK) if number >= many else (Phase.COPYING, Phase.CATCHING_UP)
            )
            if world.catalog.phases[index] not in phases:
                continue
            if any(m.threads[index].verified for m in world.movers if m):
                continue
            target = world.shards[transfer.target]
            if target.now.rows[transfer.key_range] != ABSENT:
                rows = replaced(target.now.rows, transfer.key_range, 99)
                left = world._replace(budget=world.budget._replace(planted=0))
                yield (
                    f"somebody changes a row on {transfer.target}",
                    put(left, transfer.target, target._replace(now=target.now._replace(rows=rows))),
                )

    def _catalog_lost(self, world: World) -> Moves:
        """The catalog is restored as it was at some moment before; the movers of then are gone."""
        if world.kept_catalog is None:
            if not all_final(world.catalog):
                yield "the catalog is backed up", world._replace(kept_catalog=world.catalog)
            return
        left = world.budget._replace(catalog_losses=0, movers=max(world.budget.movers, 1))
        # An operator gives the lease a number that no mover had.
        restored = world.kept_catalog._replace(lease=world.catalog.lease)
        gone = world._replace(catalog=restored, kept_catalog=None, movers=(None, None), budget=left)
        gone = gone._replace(shards=tuple(shard._replace(locker=0, maker=0) for shard in gone.shards))
        yield "the catalog is restored from its backup, all movers gone", gone

    # --- what must be so -------------------------------------------------------------------------------------------

    def problem(self, world: World) -> str | None:
        """P1: at most one shard owns a range, and exactly one unless a change is under way."""
        for key_range in range(len(world.acked)):
            owners = owner_of(world, key_range)
            if len(owners) > 1:
                return f"range {key_range} has two owners"
            under_way = world.catalog.proposed or any(shard.locker for shard in world.shards)
            # A shard that failed over without the opening is closed until it is readmitted.
            if not owners and not under_way and self.scenario.must_end and not self.scenario.standbys:
                return f"range {key_range} has no owner"
        for transfer, phase in zip(self.scenario.transfers, world.catalog.phases, strict=True):
            if phase is Phase.KEPT and transfer.source in owner_of(world, transfer.key_range):
                return f"shard {transfer.source} is kept as a source, and owns what it gave"
        return None

    def unfinished(self, world: World) -> str | None:
        """What is left to do, or was left behind."""
        if not self.scenario.must_end:
            return self._lost(world)
        if any(app.kind or app.left for app in world.apps):
            return "an application waits"
        if any(mover is not None for mover in world.movers):
            return "a mover is at work"
        if not all_final(world.catalog):
            return "the job is not at its end"
        return self._left_behind(world) or self._lost(world)

    def _left_behind(self, world: World) -> str | None:
        if world.catalog.proposed:
            return "a change is pending"
        facts = topologies.facts(world.catalog.current)
        if any(map(any, facts.marked)):
            return "a mark is left"
        for number, shard in enumerate(world.shards):
            if facts.fences[number] not in shard.now.names:
                return f"shard {number} has no fence of the topology"
            for what, found in (
                ("subscription", any(shard.now.subscriptions)),
                ("slot", any(slot is not None for slot in shard.now.slots)),
                ("trigger", any(shard.now.triggers)),
                ("lock", shard.locker or shard.maker),
            ):
                if found:
                    return f"a {what} is left on {number}"
        return None

    def _lost(self, world: World) -> str | None:
        """P2: the owner of a range has what was acknowledged, and at the end of the job nobody else has anything."""
        for key_range, acked in enumerate(world.acked):
            for owner in owner_of(world, key_range):
                if (row := world.shards[owner].now.rows[key_range]) != acked:
                    return f"shard {owner} has {row} where {acked} was acknowledged"
            for number, shard in enumerate(world.shards):
                left = shard.now.rows[key_range] != ABSENT and number not in owner_of(world, key_range)
                if left and all_final(world.catalog):
                    return f"a row that it does not own is left on {number}"
        return None
