"""Steps of a transfer's replication: slot and subscription, what they copy, and the servers they run on."""

from __future__ import annotations

from shardkit.core.move import Event

from . import topologies
from .rules import Rule
from .turn import BACK, Moves, Turn
from .world import ABSENT, Content, World, replaced


def _with_slot(turn: Turn, now: Content, slot: tuple[int, ...] | None) -> Content:
    return now._replace(slots=(*now.slots[: turn.number], slot, *now.slots[turn.number + 1 :]))


def _with_subscription(turn: Turn, now: Content, state: int) -> Content:
    return now._replace(subscriptions=replaced(now.subscriptions, turn.number, state))


def slot_of(turn: Turn) -> tuple[int, ...] | None:
    """What the subscription has yet to apply; None without a slot."""
    return turn.shard(turn.transfer.source).now.slots[turn.number]


def subscription_of(turn: Turn) -> int:
    """0 none, 1 enabled, 2 disabled."""
    return turn.shard(turn.transfer.target).now.subscriptions[turn.number]


def step_on(turn: Turn, shard: int, label: str, now: Content) -> Moves:
    """One transaction of the mover on a shard, which changes its content."""

    def committed() -> Moves:
        world = turn.commit(shard, now, locker=turn.shard(shard).locker)
        yield f"{turn.name} {label} on {shard}", turn.go(world)

    yield from turn.claimed(shard, committed())


def drop_subscription(turn: Turn) -> Moves:
    target = turn.transfer.target
    yield from step_on(
        turn, target, "drops the subscription", _with_subscription(turn, turn.shard(target).now, 0)
    )


def drop_slot(turn: Turn) -> Moves:
    source = turn.transfer.source
    if Rule.SLOT_LOCK in turn.rules and turn.shard(source).maker not in (0, turn.token):
        return
    yield from step_on(turn, source, "drops the slot", _with_slot(turn, turn.shard(source).now, None))


def claim_for_slot(turn: Turn) -> Moves:
    """The token, and the lock of who makes a slot; a slot itself is made in no transaction with a claim."""
    source = turn.transfer.source
    if subscription_of(turn):
        yield f"{turn.name} finds the subscription", turn.go(None, ("copied",))
        return
    state = turn.shard(source)
    if state.maker not in (0, turn.token):
        return
    found = turn.claim(source)
    if found == "superseded":
        yield turn.stopped(f"a newer token on {source}")
    elif found is None:
        world = turn.commit(source, state.now, locker=state.locker)
        state = world.shards[source]._replace(maker=turn.token)
        shards = (*world.shards[:source], state, *world.shards[source + 1 :])
        yield f"{turn.name} is about to make a slot on {source}", turn.go(world._replace(shards=shards))


def copied(turn: Turn) -> Moves:
    """Nothing is left of the way to a subscription."""
    yield from turn.at_once(skip=3)


def make_slot(turn: Turn) -> Moves:
    source = turn.transfer.source
    state = turn.shard(source)
    if state.maker != turn.token:
        yield f"{turn.name} lost its session on {source}", turn.again()
        return
    now = state.now if slot_of(turn) is not None else _with_slot(turn, state.now, ())
    shards = list(turn.world.shards)
    shards[source] = state._replace(now=now, maker=0)
    yield f"{turn.name} makes the slot on {source}", turn.go(turn.world._replace(shards=tuple(shards)))


def guarded(turn: Turn, shard: int) -> bool | None:
    """Whether rows may be changed behind the fence of the catalog's topology; None while it is locked."""
    state = turn.shard(shard)
    if state.locker not in (0, turn.token):
        return None
    if Rule.GUARD not in turn.rules:
        return True
    fence = topologies.facts(turn.world.catalog.current).fences[shard]
    if fence not in state.now.names:
        return False
    return Rule.NEWEST_FENCE not in turn.rules or all(
        topologies.age(name) <= topologies.age(fence) for name in state.now.names
    )


def subscribe(turn: Turn) -> Moves:
    """CREATE SUBSCRIPTION; what it copies is there at once in the model."""
    source, target = turn.transfer.source, turn.transfer.target
    if not guarded(turn, target):
        return
    if slot_of(turn) is None:
        yield f"{turn.name} finds the slot gone", turn.again()
        return

    def subscribed() -> Moves:
        row = turn.shard(source).now.rows[turn.transfer.key_range]
        now = _with_subscription(turn, turn.shard(target).now, 1)
        now = now._replace(rows=replaced(now.rows, turn.transfer.key_range, row))
        world = turn.commit(target, now, locker=turn.shard(target).locker)
        state = world.shards[source]
        shards = list(world.shards)
        shards[source] = state._replace(now=_with_slot(turn, state.now, ()))
        label = f"{turn.name} subscribes and copies {row}"
        yield label, turn.go(world._replace(shards=tuple(shards)))

    yield from turn.claimed(target, subscribed())


def running(turn: Turn) -> Moves:
    """A subscription that was disabled is enabled again, by whoever has the token."""
    if subscription_of(turn) == 2:
        target = turn.transfer.target
        yield from step_on(
            turn,
            target,
            "enables the subscription",
            _with_subscription(turn, turn.shard(target).now, 1),
        )
    elif subscription_of(turn) == 1:
        yield f"{turn.name} sees the subscription at work", turn.go()
    else:
        yield f"{turn.name} finds the subscription gone", turn.again()


def delete(turn: Turn, side: str) -> Moves:
    """Delete the range's row on the side that does not own it, behind the fence that says so."""
    shard = turn.transfer.target if side == "target" else turn.transfer.source
    if turn.owned_by(shard):
        yield turn.stopped(f"shard {shard} owns what was to be deleted")
        return
    if not guarded(turn, shard):
        return
    state, key_range = turn.shard(shard), turn.transfer.key_range
    now = state.now._replace(rows=replaced(state.now.rows, key_range, ABSENT))
    if state.now.rows[key_range] != ABSENT:
        now = now._replace(
            slots=tuple(
                (*slot, ABSENT)
                if slot is not None and stream.source == shard and stream.key_range == key_range
                else slot
                for slot, stream in zip(now.slots, turn.scenario.streams, strict=True)
            )
        )
    yield from step_on(turn, shard, "deletes the rows", now)


def compare(turn: Turn) -> Moves:
    """The rows of both sides, when what was written meanwhile has been applied."""
    if Rule.COMPARE not in turn.rules:
        yield f"{turn.name} compares nothing", turn.go(verified=True)
        return
    key_range, slot = turn.transfer.key_range, slot_of(turn)
    rows = [turn.shard(side).now.rows[key_range] for side in (turn.transfer.source, turn.transfer.target)]
    if slot is None:
        yield f"{turn.name} finds the slot lost", turn.again()
    elif rows[0] == rows[1]:
        yield f"{turn.name} finds the rows alike", turn.go(verified=True)
    elif not slot and subscription_of(turn) == 1:
        yield turn.stopped("the rows differ")


def _epochs(world: World) -> tuple[int, ...]:
    return tuple(shard.epoch for shard in world.shards)


def same(turn: Turn) -> bool:
    """Whether both servers are those that the copy began with."""
    stored, now = turn.world.catalog.epochs[turn.index], _epochs(turn.world)
    sides = (turn.transfer.source, turn.transfer.target)
    return all(stored[side] == now[side] for side in sides)


def note_servers(turn: Turn) -> Moves:
    """Which servers the copy begins with."""
    if not turn.leased():
        yield turn.stopped("no lease")
    elif same(turn):
        yield from turn.at_once()
    else:
        epochs = turn.world.catalog.epochs
        epochs = (*epochs[: turn.index], _epochs(turn.world), *epochs[turn.index + 1 :])
        yield f"{turn.name} notes the servers", turn.go(turn.with_catalog(epochs=epochs))


def same_servers(turn: Turn) -> Moves:
    """Whether both servers are those the copy began with, and the slot is of use."""
    lost = subscription_of(turn) != 0 and slot_of(turn) is None
    if turn.thread.phase in BACK:
        if possible(turn):
            yield from turn.at_once()
        else:
            yield turn.stopped("the way back is lost")
        return
    if Rule.SAME_SERVERS not in turn.rules:
        if lost:  # made again, from now on
            source = turn.transfer.source
            now = _with_slot(turn, turn.shard(source).now, ())
            yield from step_on(turn, source, "makes the slot again", now)
        else:
            yield from turn.at_once()
    elif lost or not same(turn):
        yield turn.enters(Event.SERVER_CHANGED)
    else:
        yield from turn.at_once()


def possible(turn: Turn) -> bool:
    """Whether the way back has every write: the servers are the same, subscription and slot are there."""
    back = turn.along("back")
    if Rule.SAME_SERVERS in turn.rules and not same(turn):
        return False
    return subscription_of(back) != 0 and slot_of(back) is not None


def claim_for_way_back(turn: Turn, when: str) -> Moves:
    """The slot of the way back, unless it is there: made while nobody waits for the opening."""
    wanted = "before" if Rule.SLOT_BACK_FIRST in turn.rules else "after"
    if when != wanted or slot_of(turn) is not None:
        yield from turn.at_once(skip=2)
    else:
        yield from claim_for_slot(turn)


def begin_back(turn: Turn) -> Moves:
    """Subscribe without a copy. From where the target opened on: what it applied before is not in the slot here."""
    shard = turn.transfer.target
    if subscription_of(turn):
        yield from turn.at_once()
    elif guarded(turn, shard):
        now = _with_subscription(turn, turn.shard(shard).now, 2)
        yield from step_on(turn, shard, "subscribes to the way back", now)


def triggers(turn: Turn, state: str) -> Moves:
    source = turn.transfer.source
    now = turn.shard(source).now
    values = (*now.triggers[: turn.index], state == "on", *now.triggers[turn.index + 1 :])
    if values == now.triggers:
        yield from turn.at_once()
    else:
        yield from step_on(turn, source, f"turns the triggers {state}", now._replace(triggers=values))
