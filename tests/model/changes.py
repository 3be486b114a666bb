"""The change of a topology in atomic steps, as `storage.change` runs it: apply, settle, close, open, record."""

from __future__ import annotations

from shardkit.core.move import Phase

from . import topologies
from .rules import Rule
from .turn import Moves, Turn
from .world import Content, Step, holders

PLAIN, ENTRY, OWN = "plain", "entry", "own"
"""Whose subscriptions an opening disables: nobody's; of transfers that are cutting over; of this transfer."""


_FORTH = (Phase.CUTTING_OVER, Phase.ABORTING)
_BACK = (Phase.CUTTING_BACK, Phase.STAYING)


def proposal(turn: Turn, kind: str, version: int) -> int:
    """The topology that a change makes of the current one."""
    current, transfer = turn.world.catalog.current, turn.transfer
    match kind:
        case "mark target":
            return topologies.marked(current, version, transfer.target, transfer.key_range)
        case "cut over":
            return topologies.cut_over(current, version, transfer.source, transfer.target, transfer.key_range)
        case "unmark source":
            return topologies.unmarked(current, version, transfer.source, transfer.key_range)
        case "unmark target":
            return topologies.unmarked(current, version, transfer.target, transfer.key_range)
    raise AssertionError(kind)


def finishing(turn: Turn, change: int, current: int, disable: str) -> tuple[Step, ...]:
    """What is left once a change is decided."""
    opens: tuple[Step, ...] = tuple(
        ("open", change, current, shard, disable) for shard in topologies.opening(change, current)
    )
    return (*opens, ("record", change))


def apply(turn: Turn, kind: str) -> Moves:
    """Settle what is pending, then propose."""
    catalog = turn.world.catalog
    if Rule.ONE_CHANGE in turn.rules:
        if turn.others_change():
            return
        if catalog.proposed:
            yield f"{turn.name} finds a change pending", turn.go(None, ("settle", PLAIN), ("apply", kind))
            return
    if not turn.leased():
        yield turn.stopped("no lease")
        return
    version = catalog.version + 1
    if Rule.FRESH_NUMBERS not in turn.rules:
        version = topologies.facts(catalog.current).version + 1
    change = proposal(turn, kind, version)
    world = turn.with_catalog(proposed=(*catalog.proposed, change), version=max(catalog.version, version))
    closing: list[Step] = [
        ("close", change, catalog.current, shard, kind)
        for shard in topologies.closing(change, catalog.current)
    ]
    if kind == "mark target" and Rule.MARK_CLOSES not in turn.rules:
        closing = [("open", change, catalog.current, shard, PLAIN) for _, _, _, shard, _ in closing]
    disable = OWN if kind == "cut over" else PLAIN
    yield (
        f"{turn.name} proposes {version}: {kind}",
        turn.go(world, *closing, *finishing(turn, change, catalog.current, disable)),
    )


def settle(turn: Turn, disable: str) -> Moves:
    """Finish, or prove impossible, what is pending."""
    if Rule.ONE_CHANGE in turn.rules and turn.others_change():
        return
    catalog = turn.world.catalog
    if not catalog.proposed:
        yield from turn.at_once()
        return
    change = catalog.proposed[0]
    closing = topologies.closing(change, catalog.current)
    if Rule.LOOK not in turn.rules:
        steps: tuple[Step, ...] = (("discard", change),)
    elif closing:
        steps = (("look", change, catalog.current, closing[0], disable),)
    else:
        steps = finishing(turn, change, catalog.current, disable)
    yield f"{turn.name} settles {topologies.facts(change).version}", turn.go(None, *steps)


def look(turn: Turn, change: int, current: int, shard: int, disable: str) -> Moves:
    """Whether the pending change was decided; by the token, it can no longer be if it is not."""
    found = turn.claim(shard) if Rule.TOKEN_BEFORE_LOOKING in turn.rules else None
    if found == "superseded":
        yield turn.stopped(f"a newer token on {shard}")
    elif found is None:
        state = turn.shard(shard)
        if topologies.facts(change).fences[shard] in state.now.names:
            steps, what = finishing(turn, change, current, disable), "is decided"
        else:
            steps, what = (("discard", change),), "is not decided"
        claims = Rule.TOKEN_BEFORE_LOOKING in turn.rules
        world = turn.commit(shard, state.now, locker=state.locker) if claims else turn.world
        yield f"{turn.name} sees that {topologies.facts(change).version} {what}", turn.go(world, *steps)


def discard(turn: Turn, change: int) -> Moves:
    """The proposal is proved impossible."""
    if not turn.leased():
        yield turn.stopped("no lease")
        return
    left = tuple(each for each in turn.world.catalog.proposed if each != change)
    yield (
        f"{turn.name} discards {topologies.facts(change).version}",
        turn.go(turn.with_catalog(proposed=left)),
    )


def close(turn: Turn, change: int, current: int, shard: int, kind: str) -> Moves:
    """Lock the fences of the shard that loses something. A cutover does more before it renames them."""
    state = turn.shard(shard)
    names = state.now.names if Rule.DRAIN in turn.rules else state.now.names[-1:]
    if state.locker not in (0, turn.token):
        return
    if Rule.CLOSING_LOCK in turn.rules and holders(turn.world, shard, names):
        return
    if turn.claim(shard) == "superseded":
        yield turn.stopped(f"a newer token on {shard}")
        return
    expected = {topologies.facts(topology).fences[shard] for topology in (current, change)}
    newest = max(map(topologies.age, state.now.names))
    if Rule.EXPECTED_NAME in turn.rules and (
        not expected & set(names) or newest > topologies.facts(change).version
    ):
        yield turn.stopped(f"shard {shard} has another fence than the catalog says")
        return
    if kind == "cut over":
        world = turn.commit(shard, state.now, locker=turn.token)
        first = "carry" if turn.scenario.locked else "replayed"
        then = ((first, shard), ("decide", change, shard))
        yield f"{turn.name} locks {shard}", turn.go(world, *then)
    else:
        world = turn.commit(shard, renamed(turn, state.now, change, shard))
        yield f"{turn.name} closes {shard}: {topologies.facts(change).version}", turn.go(world)


def renamed(turn: Turn, now: Content, change: int, shard: int) -> Content:
    """A shard after its fences were renamed."""
    new = topologies.facts(change).fences[shard]
    older = () if Rule.DRAIN in turn.rules else tuple(name for name in now.names[:-1] if name != new)
    return now._replace(names=(*older, new), copy=newer(now.copy, change))


def newer(copy: int, change: int) -> int:
    """A copy of the topology is never replaced by an older one."""
    return max(copy, change, key=lambda each: topologies.facts(each).version)


def open_(turn: Turn, change: int, current: int, shard: int, disable: str) -> Moves:
    """The new fence beside the old ones, on a shard that only gains."""
    if Rule.STANDBYS_OF_SOURCE in turn.rules:
        for closed in topologies.closing(change, current):
            if closed not in turn.scenario.standbys or closed == shard:
                continue
            state = turn.shard(closed)
            if topologies.facts(change).fences[closed] not in state.now.names:
                yield f"{turn.name} sees that {closed} lost the decision", turn.again()
                return
            if state.kept is not None:
                return
    yield from turn.claimed(shard, _open(turn, change, current, shard, disable))


def _open(turn: Turn, change: int, current: int, shard: int, disable: str) -> Moves:
    state, new = turn.shard(shard), topologies.facts(change).fences[shard]
    names = state.now.names if new in state.now.names else (*state.now.names, new)
    if Rule.OPEN_BESIDE not in turn.rules:
        if holders(turn.world, shard, state.now.names):
            return
        names = (new,)
    now = state.now._replace(names=names, copy=newer(state.now.copy, change))
    if Rule.DISABLE_AT_OPENING in turn.rules:
        now = now._replace(subscriptions=disabled(turn, now, change, shard, disable))
    version = topologies.facts(change).version
    yield f"{turn.name} opens {shard}: {version}", turn.go(turn.commit(shard, now, locker=state.locker))


def disabled(turn: Turn, now: Content, change: int, shard: int, disable: str) -> tuple[int, ...]:
    """The subscriptions of a shard after the opening."""
    owners, many = topologies.facts(change).owners, len(turn.scenario.transfers)
    return tuple(
        2
        if state
        and transfer.target == shard
        and (
            (disable == OWN and number == turn.number)
            or (
                disable == ENTRY
                and turn.world.catalog.phases[number % many] in (_BACK if number >= many else _FORTH)
                and owners[transfer.key_range] == shard
            )
        )
        else state
        for number, (transfer, state) in enumerate(zip(turn.scenario.streams, now.subscriptions, strict=True))
    )


def record(turn: Turn, change: int) -> Moves:
    """The change is in force."""
    catalog = turn.world.catalog
    if not turn.leased() or change not in catalog.proposed:
        yield turn.stopped("another recorded it")
        return
    left = tuple(each for each in catalog.proposed if each != change)
    yield (
        f"{turn.name} records {topologies.facts(change).version}",
        turn.go(turn.with_catalog(current=change, proposed=left)),
    )
