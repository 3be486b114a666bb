"""Transfers driven through the real table and the real topologies by movers that crash, sleep, abort and take over.

The machine keeps what a catalog and the shards would: the topology in force, the one that is pending, the names of each
shard's fences, phases and tokens. It plays the movers, one transaction a rule, and leaves every choice of phase to
`core.move` and every choice of owner and fence to `core.topology`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import note, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardkit.core.errors import MoveTableError
from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, Arc, ArcSet
from shardkit.core.move import ACTIONS, FINAL, ROLLBACK, STILL, TABLE, Action, Event, Phase, can_abort, step
from shardkit.core.topology import Fence, Topology

STEP = 2**61
PIECES = tuple(Arc(POSITION_MIN + n * STEP, POSITION_MIN + (n + 1) * STEP - 1) for n in range(8))
"""The ring in eight parts."""

CHANGES = {
    Action.PREPARE: "mark",
    Action.CUT_OVER: "cut over",
    Action.PURGE: "unmark giver",
    Action.UNDO: "unmark taker",
    Action.CUT_BACK: "cut over",
    Action.CLEAR: "unmark giver",
    Action.STAY: "settle",
}
"""The actions that change the topology, or settle a change of it."""
QUIET = frozenset(
    {
        Action.START,
        Action.COPY,
        Action.CATCH_UP,
        Action.VERIFY,
        Action.OPEN,
        Action.CATCH_UP_BACK,
        Action.VERIFY_BACK,
        Action.OPEN_BACK,
    }
)
"""The actions that do not."""


DECIDING = frozenset({Action.CUT_OVER, Action.CUT_BACK})


@dataclass
class Moving:
    """A transfer, as the catalog has it."""

    source: int
    target: int
    arcs: ArcSet
    phase: Phase = Phase.PLANNED

    @property
    def sides(self) -> tuple[int, int]:
        """Who gives and who takes: on the way back the other way round."""
        back = self.phase in ROLLBACK or self.phase is Phase.STAYING
        return (self.target, self.source) if back else (self.source, self.target)


@dataclass
class Pending:
    """The one change that is proposed: of what, in which transfer, by whom."""

    before: Topology
    topology: Topology
    transfer: int
    token: int


@dataclass
class Process:
    """A mover: its token, and what it read and proposed before it slept."""

    token: int
    read: dict[int, Phase] = field(default_factory=dict)
    proposal: Pending | None = None


class Moves(RuleBasedStateMachine):
    """Some shards, some transfers between them, two movers."""

    now: Topology
    pending: Pending | None

    @initialize(
        owners=st.lists(st.integers(0, 3), min_size=8, max_size=8),
        wanted=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), min_size=1, max_size=4),
        keeps=st.booleans(),
        told=st.sampled_from([None, Event.ROLL_BACK, None, Event.FINALIZE]),
    )
    def begin(
        self, owners: list[int], wanted: list[tuple[int, int]], keeps: bool, told: Event | None
    ) -> None:
        self.keeps = keeps
        shards = [(n, f"s{n}", f"postgresql://host/s{n}", 100) for n in range(4)]
        self.now = Topology.first(1, shards, [arc.last for arc in PIECES], owners)
        self.history = [self.now]
        """Every topology that was in force: names of an older one can still stand beside."""
        self.version = 1
        self.names = {shard.id: {shard.fence} for shard in self.now.shards}
        self.tokens = dict.fromkeys(self.names, 1)
        self.pending: Pending | None = None
        self.lease = 1
        self.movers = [Process(1), Process(1)]
        self.transfers: list[Moving] = []
        taken: set[int] = set()
        for piece, target in wanted:
            if piece not in taken and owners[piece] != target:
                taken.add(piece)
                self.transfers.append(Moving(owners[piece], target, ArcSet([PIECES[piece]])))
        self.began_with = self.now
        self.highest = {shard: max(names) for shard, names in self.names.items()}
        if keeps and told is not None:
            self.begin_with_kept_sources(told)

    def begin_with_kept_sources(self, told: Event) -> None:
        """So that the way back is met often: few runs would come so far by chance."""
        for number, transfer in enumerate(self.transfers):
            while transfer.phase is not Phase.KEPT:
                self.carry(0, number, transfer)
        self.decide_what_is_kept(0, told)

    # --- movers come, read, sleep ----------------------------------------------------------------------------------

    @rule(seat=st.integers(0, 1), settles=st.booleans())
    def take_the_lease(self, seat: int, settles: bool) -> None:
        """A crash and a restart, or another mover; the one before may not know. It settles first, or is killed."""
        self.lease += 1
        self.movers[seat] = Process(self.lease)
        if settles and self.pending is not None:
            self.settle(seat)

    @precondition(lambda self: self.transfers)
    @rule(seat=st.integers(0, 1), data=st.data())
    def read_a_phase(self, seat: int, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.transfers) - 1))
        self.movers[seat].read[number] = self.transfers[number].phase

    def awake(self, data: st.DataObject) -> tuple[Process, int, Moving, Phase] | None:
        mover = data.draw(st.sampled_from(self.movers))
        if not mover.read:
            return None
        number = data.draw(st.sampled_from(sorted(mover.read)))
        return mover, number, self.transfers[number], mover.read[number]

    def enter(self, mover: Process, number: int, phase: Phase, event: Event) -> bool:
        """What `Catalog.enter` does: by the lease, and from the phase that was read."""
        row = step(phase, event)
        transfer = self.transfers[number]
        if mover.token != self.lease or transfer.phase is not phase:
            return False
        note(f"transfer {number}: {row.sentence}")
        transfer.phase = mover.read[number] = row.next
        return True

    def claim(self, mover: Process, shard: int) -> bool:
        """What `change.claim` does."""
        if self.tokens[shard] > mover.token:
            return False
        self.tokens[shard] = mover.token
        return True

    # --- the table -------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def act_quietly(self, data: st.DataObject) -> None:
        found = self.awake(data)
        if found is None or ACTIONS.get(found[3]) not in QUIET:
            return
        mover, number, transfer, phase = found
        # Copying in locked steps ends in the decision, which is a change of the topology.
        others = {Event.ABORT} | (set() if self.decided(transfer) else {Event.DECIDED})
        if phase is Phase.CUT_OVER:
            others.add(Event.OPENED if self.keeps else Event.KEPT)
        events = [row.event for row in TABLE if row.phase is phase and row.event not in others]
        self.enter(mover, number, phase, data.draw(st.sampled_from(events)))

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        found = self.awake(data)
        if found is None:
            return
        mover, number, _, phase = found
        if can_abort(phase):
            self.enter(mover, number, phase, Event.ABORT)
        else:
            try:
                step(phase, Event.ABORT)
            except MoveTableError:
                return
            raise AssertionError(f"{phase} took an abort")

    @precondition(
        lambda self: any(can_abort(each.phase) and each.phase in ROLLBACK for each in self.transfers)
    )
    @rule(seat=st.integers(0, 1))
    def rollbacks_are_taken_back(self, seat: int) -> None:
        """Another mover is told to abort; the one before may be about to decide."""
        self.take_the_lease(seat, True)
        for number, transfer in enumerate(self.transfers):
            if can_abort(transfer.phase) and transfer.phase in ROLLBACK:
                self.enter(self.movers[seat], number, transfer.phase, Event.ABORT)

    @rule(data=st.data())
    def cutover_is_put_off(self, data: st.DataObject) -> None:
        found = self.awake(data)
        if found is not None and ACTIONS.get(found[3]) in DECIDING and self.pending is None:
            off = (Event.POSTPONED, Event.SERVER_CHANGED)
            possible = [row.event for row in TABLE if row.phase is found[3] and row.event in off]
            event = data.draw(st.sampled_from(possible))
            if not self.decided(found[2]):
                self.enter(found[0], found[1], found[3], event)

    def decided(self, transfer: Moving) -> bool:
        return self.now.owned(transfer.sides[1]).issuperset(transfer.arcs)

    @rule(data=st.data())
    def end_of_a_changing_action(self, data: st.DataObject) -> None:
        """What the action had to change is changed: its event is due."""
        found = self.awake(data)
        if found is None or ACTIONS.get(found[3]) not in CHANGES or self.pending is not None:
            return
        mover, number, transfer, phase = found
        if transfer.phase is not phase:
            return
        given, taken = (self.now.by_id[side].in_transit for side in transfer.sides)
        decided = Event.DECIDED if self.decided(transfer) else None
        purged = Event.PURGED if not given & transfer.arcs else None
        done: dict[Action, Event | None] = {
            Action.PREPARE: Event.PREPARED if taken.issuperset(transfer.arcs) else None,
            Action.CUT_OVER: decided,
            Action.CUT_BACK: decided,
            Action.PURGE: purged,
            Action.CLEAR: purged,
            Action.UNDO: decided or (Event.UNDONE if not taken & transfer.arcs else None),
            Action.STAY: decided or Event.UNDONE,
        }
        event = done[ACTIONS[phase]]
        if event is not None:
            self.enter(mover, number, phase, event)

    # --- a change of the topology ----------------------------------------------------------------------------------

    @rule(data=st.data())
    def propose(self, data: st.DataObject) -> None:
        if self.pending is not None or not self.transfers:
            return
        mover = next((mover for mover in self.movers if mover.token == self.lease), None)
        number = data.draw(st.integers(0, len(self.transfers) - 1))
        transfer = self.transfers[number]
        kind = CHANGES.get(ACTIONS.get(transfer.phase, Action.START))
        if mover is None or kind is None:
            return
        mover.read[number] = transfer.phase
        topology = self.made(kind, transfer)
        if topology is None:
            return
        self.version = topology.version
        self.pending = mover.proposal = Pending(self.now, topology, number, mover.token)
        assert len(topology.closing_since(self.now)) <= 1

    def made(self, kind: str, transfer: Moving) -> Topology | None:
        """The topology of a change, unless it is in force already."""
        version, arcs = self.version + 1, transfer.arcs
        giver, taker = transfer.sides
        held = self.now.by_id[taker].in_transit
        match kind:
            case "mark" if not held.issuperset(arcs):
                return self.now.marked(version, taker, arcs)
            case "cut over" if not self.decided(transfer):
                return self.now.cut_over(version, giver, taker, arcs)
            case "unmark giver" if self.now.by_id[giver].in_transit & arcs:
                return self.now.unmarked(version, giver, arcs)
            case "unmark taker" if not self.decided(transfer) and held & arcs:
                return self.now.unmarked(version, taker, arcs)
        return None

    @rule(seat=st.integers(0, 1))
    def close(self, seat: int) -> None:
        """The rename on the shard that loses something: the decision. By the mover that proposed it, who may have
        slept since."""
        mover = self.movers[seat]
        if (change := mover.proposal) is None:
            return
        for shard in change.topology.closing_since(change.before):
            expected = {topology.by_id[shard].fence for topology in (change.before, change.topology)}
            if self.claim(mover, shard) and expected & self.names[shard]:
                self.names[shard] = {change.topology.by_id[shard].fence}

    @rule(seat=st.integers(0, 1))
    def open(self, seat: int) -> None:
        """The new name beside the old ones, once it is decided; by who proposed it, or by who settles."""
        mover = self.movers[seat]
        change = mover.proposal or (self.pending if mover.token == self.lease else None)
        if change is None:
            return
        closing = change.topology.closing_since(change.before)
        if any(change.topology.by_id[shard].fence not in self.names[shard] for shard in closing):
            return
        for shard in change.topology.changed_since(change.before):
            if shard not in closing and self.claim(mover, shard):
                self.names[shard].add(change.topology.by_id[shard].fence)

    @precondition(lambda self: self.pending is not None)
    @rule(seat=st.integers(0, 1))
    def record(self, seat: int) -> None:
        assert self.pending is not None
        topology = self.pending.topology
        changed = topology.changed_since(self.now)
        if self.movers[seat].token == self.lease and all(
            topology.by_id[shard].fence in self.names[shard] for shard in changed
        ):
            self.now, self.pending = topology, None
            self.history.append(topology)
            for mover in self.movers:
                if mover.token == self.lease:
                    mover.proposal = None

    @precondition(lambda self: self.pending is not None)
    @rule(seat=st.integers(0, 1))
    def settle(self, seat: int) -> None:
        """Another mover proves the change impossible, or leaves it to be opened."""
        assert self.pending is not None
        mover, topology = self.movers[seat], self.pending.topology
        closing = topology.closing_since(self.now)
        if mover.token != self.lease or mover.token == self.pending.token or not closing:
            return
        if self.claim(mover, closing[0]) and topology.by_id[closing[0]].fence not in self.names[closing[0]]:
            self.pending = None

    @rule(data=st.data())
    def a_mover_sleeps_over_its_decision(self, data: st.DataObject) -> None:
        """It proposes; another takes over and settles; it wakes."""
        self.propose(data)
        for seat, mover in enumerate(self.movers):
            if mover.token == self.lease and mover.proposal is not None:
                self.take_the_lease(1 - seat, True)
                self.close(seat)
                self.open(seat)
                return

    @precondition(lambda self: any(transfer.phase is Phase.KEPT for transfer in self.transfers))
    @rule(seat=st.integers(0, 1), event=st.sampled_from([Event.FINALIZE, Event.ROLL_BACK]))
    def an_operator_decides(self, seat: int, event: Event) -> None:
        if self.transfers:
            self.decide_what_is_kept(seat, event)

    def decide_what_is_kept(self, seat: int, event: Event) -> None:
        """All that are kept take the event at once, if nothing else is under way."""
        if all(transfer.phase in STILL for transfer in self.transfers):
            self.take_the_lease(seat, False)
            for transfer in self.transfers:
                if transfer.phase is Phase.KEPT:
                    transfer.phase = step(Phase.KEPT, event).next

    # --- what is always so -----------------------------------------------------------------------------------------

    def owned_under(self, shard: int, fence: Fence) -> ArcSet:
        """What a shard owns under a fence: the same in every topology that names it."""
        for topology in (*([self.pending.topology] if self.pending else ()), *self.history):
            if topology.by_id[shard].fence == fence:
                owned: ArcSet = topology.owned(shard)
                return owned
        raise AssertionError(f"no topology names {fence}")

    @invariant()
    def a_position_has_one_writable_owner(self) -> None:
        """At most one; exactly one unless a cutover is decided and not yet opened."""
        owned = {
            shard: ArcSet(arc for fence in names for arc in self.owned_under(shard, fence))
            for shard, names in self.names.items()
        }
        for one in owned:
            for other in owned:
                assert one == other or not owned[one] & owned[other], "two shards take writes of a position"
        everywhere = ArcSet(arc for arcs in owned.values() for arc in arcs)
        allowed = ArcSet() if self.pending is None else self.transfers[self.pending.transfer].arcs
        covered: int = (everywhere | allowed).width
        assert covered == 2**64, "a position has no owner outside its cutover"

    @invariant()
    def a_topology_gives_a_position_one_owner(self) -> None:
        for topology in (self.now, *([self.pending.topology] if self.pending else ())):
            widths = [topology.owned(shard.id).width for shard in topology.shards]
            assert sum(widths) == 2**64
            assert sum(ArcSet(topology.owned(s.id)).width for s in topology.shards) == sum(widths)
            assert POSITION_MAX in topology.owned(topology.ring.owner_at(POSITION_MAX))

    @invariant()
    def fences_only_grow(self) -> None:
        for shard, names in self.names.items():
            newest = max(names)
            assert newest >= self.highest[shard]
            self.highest[shard] = newest
            assert self.now.by_id[shard].fence.version <= self.now.version <= self.version

    @invariant()
    def who_keeps_rows_as_a_source_does_not_own_them(self) -> None:
        for transfer in self.transfers:
            if transfer.phase is Phase.KEPT:
                owned = (self.owned_under(transfer.source, fence) for fence in self.names[transfer.source])
                assert not any(arcs & transfer.arcs for arcs in owned)

    @invariant()
    def a_mark_belongs_to_a_transfer_that_is_under_way(self) -> None:
        for shard in self.now.shards:
            marks = [
                transfer.arcs
                for transfer in self.transfers
                if transfer.phase not in FINAL and shard.id in (transfer.source, transfer.target)
            ]
            assert ArcSet(arc for arcs in marks for arc in arcs).issuperset(shard.in_transit)

    # --- the end ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """A last mover carries everything to its end: nothing is left, each transfer is done whole or not at all."""
        if not hasattr(self, "transfers"):
            return
        self.lease += 1
        last = Process(self.lease)
        self.movers = [last, last]
        for number, transfer in enumerate(self.transfers):
            while transfer.phase not in FINAL:
                if transfer.phase is Phase.KEPT:
                    transfer.phase = step(Phase.KEPT, Event.FINALIZE).next
                self.carry(0, number, transfer)
                self.a_position_has_one_writable_owner()
        assert self.pending is None
        assert not any(shard.in_transit for shard in self.now.shards)
        for transfer in self.transfers:
            owner = transfer.target if transfer.phase is Phase.DONE else transfer.source
            assert self.now.owned(owner).issuperset(transfer.arcs)
        moved = ArcSet(arc for transfer in self.transfers for arc in transfer.arcs)
        for shard in self.now.shards:
            before, after = self.began_with.owned(shard.id), self.now.owned(shard.id)
            assert before - moved == after - moved, "what no transfer carries has changed its owner"

    @precondition(lambda self: self.transfers)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """A phase without disturbance, by who has the lease: so that late phases are met often."""
        number = data.draw(st.integers(0, len(self.transfers) - 1))
        for seat, mover in enumerate(self.movers):
            if mover.token == self.lease and self.transfers[number].phase not in STILL:
                self.carry(seat, number, self.transfers[number])
                return

    def carry(self, seat: int, number: int, transfer: Moving) -> None:
        """One phase, without disturbance."""
        mover = self.movers[seat]
        self.finish_pending(seat)
        mover.read[number] = phase = transfer.phase
        action = ACTIONS[phase]
        if action in CHANGES and (topology := self.made(CHANGES[action], transfer)) is not None:
            self.version = topology.version
            self.pending = mover.proposal = Pending(self.now, topology, number, mover.token)
            self.finish_pending(seat)
        undone = Event.DECIDED if self.decided(transfer) else Event.UNDONE
        event = {
            Action.START: Event.STARTED,
            Action.PREPARE: Event.PREPARED,
            Action.COPY: Event.COPIED,
            Action.CATCH_UP: Event.CAUGHT_UP,
            Action.VERIFY: Event.VERIFIED,
            Action.CUT_OVER: Event.DECIDED,
            Action.OPEN: Event.KEPT if self.keeps else Event.OPENED,
            Action.PURGE: Event.PURGED,
            Action.UNDO: undone,
            Action.CATCH_UP_BACK: Event.CAUGHT_UP,
            Action.VERIFY_BACK: Event.VERIFIED,
            Action.CUT_BACK: Event.DECIDED,
            Action.OPEN_BACK: Event.OPENED,
            Action.CLEAR: Event.PURGED,
            Action.STAY: undone,
        }[action]
        assert self.enter(mover, number, phase, event)

    def finish_pending(self, seat: int) -> None:
        if self.pending is not None and self.pending.token != self.lease:
            self.settle(seat)
        if self.pending is not None:
            self.close(seat)
            self.open(seat)
            self.record(seat)
            assert self.pending is None


def test_every_action_is_driven() -> None:
    """An action that is new in the table has to be driven here too."""
    assert CHANGES.keys() | QUIET == set(Action)


Moves.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=60)
TestMoves = Moves.TestCase
