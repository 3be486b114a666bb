"""What each action of the table does, in atomic steps: between any two of them a process can die or another come.

`PROGRAMS` maps every `Action` of `core.move` to its steps; the phases between them come from the table itself
(`Turn.enters` takes `core.move.step`). A step does what one transaction of `rebalance` does. To model a new row:
give its action a program here, whose last step brings its event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shardkit.core.move import ACTIONS, STILL, Action, Event, can_abort

from . import changes, copying, deciding
from .rules import Rule
from .turn import Moves, Turn
from .world import Scenario, Step, World

PROGRAMS: dict[Action, tuple[Step, ...]] = {
    Action.START: (("enter", Event.STARTED),),
    Action.PREPARE: (
        ("drop subscription",),
        ("drop slot",),
        ("mark", "before"),
        ("delete", "target"),
        ("triggers", "on"),
        ("note servers",),
        ("enter", Event.PREPARED),
    ),
    Action.COPY: (
        ("same servers",),
        ("claim for slot",),
        ("make slot",),
        ("subscribe",),
        ("enter", Event.COPIED),
    ),
    Action.CATCH_UP: (("same servers",), ("mark", "after"), ("running",), ("enter", Event.CAUGHT_UP)),
    Action.VERIFY: (("same servers",), ("compare",), ("enter", Event.VERIFIED)),
    Action.CUT_OVER: (
        ("settle", changes.OWN),
        ("unless decided",),
        ("same servers",),
        ("if verified",),
        ("apply", "cut over"),
        ("enter", Event.DECIDED),
    ),
    Action.OPEN: (("opened",), ("enter", Event.OPENED)),
    Action.PURGE: (
        ("wait for opening",),
        ("drop subscription",),
        ("drop slot",),
        ("delete", "source"),
        ("triggers", "off"),
        ("apply", "unmark source"),
        ("enter", Event.PURGED),
    ),
    Action.UNDO: (
        ("claim source",),
        ("settle", changes.OWN),
        ("unless decided",),
        ("drop subscription",),
        ("drop slot",),
        ("unmark target",),
        ("triggers", "off"),
        ("enter", Event.UNDONE),
    ),
    # The way back: the same steps with the sides exchanged, which the phase tells; see `Turn`.
    Action.CATCH_UP_BACK: (("same servers",), ("running",), ("enter", Event.CAUGHT_UP)),
    Action.VERIFY_BACK: (("same servers",), ("compare",), ("enter", Event.VERIFIED)),
    Action.CUT_BACK: (
        ("settle", changes.OWN),
        ("unless decided",),
        ("same servers",),
        ("if verified",),
        ("apply", "cut over"),
        ("enter", Event.DECIDED),
    ),
    Action.OPEN_BACK: (("opened",), ("enter", Event.OPENED)),
    Action.STAY: (
        ("claim source",),
        ("settle", changes.OWN),
        ("unless decided",),
        ("enter", Event.UNDONE),
    ),
}
PROGRAMS[Action.CLEAR] = PROGRAMS[Action.PURGE]

_DROP: tuple[Step, ...] = (("drop subscription",), ("drop slot",))
_DROP_BACK: tuple[Step, ...] = (("along", "back", "drop subscription"), ("along", "back", "drop slot"))


def _slot_back(when: str) -> tuple[Step, ...]:
    return ("along", "back", "claim for way back", when), ("along", "back", "make slot")


def keeping(action: Action, steps: tuple[Step, ...], rules: frozenset[Rule]) -> tuple[Step, ...]:
    """What a job that keeps its sources does beside."""
    match action:
        case Action.PREPARE:
            at = steps.index(("mark", "before"))
            return (*steps[:at], *_DROP_BACK, *steps[at:])
        case Action.CATCH_UP:
            return (*steps[:1], *_slot_back("before"), *steps[1:])
        case Action.OPEN:
            begin: tuple[Step, ...] = (("along", "back", "begin back"), ("along", "back", "running"))
            both = (*_DROP, *begin) if Rule.ONE_DIRECTION in rules else (*begin, *_DROP)
            return (("opened",), *_slot_back("after"), *both, ("enter", Event.KEPT))
        case Action.PURGE | Action.UNDO if Rule.DROP_BACK in rules:
            at = steps.index(("drop slot",)) + 1
            return (*steps[:at], *_DROP_BACK, *steps[at:])
        case Action.CLEAR:
            there: Step = ("along", "there", "triggers", "off")
            return tuple(there if step == ("triggers", "off") else step for step in steps)
    return steps


LOCKED: dict[Action, tuple[Step, ...]] = {
    Action.PREPARE: (
        ("mark", "before"),
        ("delete", "target"),
        ("triggers", "on"),
        ("enter", Event.PREPARED),
    ),
    Action.COPY: (("settle", changes.OWN), ("step",), ("enter", Event.DECIDED)),
    Action.PURGE: (
        ("delete", "source"),
        ("triggers", "off"),
        ("apply", "unmark source"),
        ("enter", Event.PURGED),
    ),
    Action.UNDO: (
        ("claim source",),
        ("settle", changes.OWN),
        ("unless decided",),
        ("unmark target",),
        ("triggers", "off"),
        ("enter", Event.UNDONE),
    ),
}
"""Where the copier of the locked mode does something else."""


def program(
    action: Action, rules: frozenset[Rule], *, locked: bool = False, keeps: bool = False
) -> tuple[Step, ...]:
    """The steps of an action under the rules."""
    if locked and action in LOCKED:
        return LOCKED[action]
    steps = PROGRAMS[action]
    if action in (Action.PURGE, Action.CLEAR) and Rule.DROP_BEFORE_PURGE not in rules:
        steps = tuple(step for step in steps if step not in _DROP)
        steps = (*steps[:-1], *_DROP, steps[-1])
    if action in (Action.UNDO, Action.STAY) and Rule.TOKEN_BEFORE_LOOKING not in rules:
        steps = steps[1:]
    return keeping(action, steps, rules) if keeps else steps


def act(turn: Turn) -> Moves:
    """Begin the action of the phase."""
    if turn.thread.phase in STILL:
        yield f"{turn.name} finds nothing to do", turn.go()
        return
    steps = program(
        ACTIONS[turn.thread.phase], turn.rules, locked=turn.scenario.locked, keeps=turn.scenario.keeps
    )
    yield from turn.at_once(*steps)


def turn_back(turn: Turn) -> Moves:
    """Abort where the decision lies ahead; else go on."""
    if can_abort(turn.thread.phase):
        yield turn.enters(Event.ABORT)
    else:
        yield from act(turn)


def along(turn: Turn, way: str, name: str, *about: str) -> Moves:
    """A step of the other way than the phase's."""
    yield from STEPS[name](turn.along(way), *about)


def enter(turn: Turn, event: str) -> Moves:
    """The phase ends."""
    yield turn.enters(Event(event))


STEPS: Mapping[str, Callable[..., Moves]] = {
    "act": act,
    "turn back": turn_back,
    "enter": enter,
    "along": along,
    "claim for way back": copying.claim_for_way_back,
    "begin back": copying.begin_back,
    "apply": changes.apply,
    "settle": changes.settle,
    "look": changes.look,
    "discard": changes.discard,
    "close": changes.close,
    "open": changes.open_,
    "record": changes.record,
    "replayed": deciding.replayed,
    "step": deciding.step,
    "carry": deciding.carry,
    "decide": deciding.decide,
    "drop subscription": copying.drop_subscription,
    "drop slot": copying.drop_slot,
    "claim for slot": copying.claim_for_slot,
    "copied": copying.copied,
    "make slot": copying.make_slot,
    "subscribe": copying.subscribe,
    "running": copying.running,
    "delete": copying.delete,
    "compare": copying.compare,
    "mark": deciding.mark,
    "unmark target": deciding.unmark_target,
    "claim source": deciding.claim_source,
    "unless decided": deciding.unless_decided,
    "if verified": deciding.if_verified,
    "opened": deciding.opened,
    "wait for opening": deciding.wait_for_opening,
    "note servers": copying.note_servers,
    "same servers": copying.same_servers,
    "triggers": copying.triggers,
}


def take(scenario: Scenario, world: World, seat: int, index: int) -> Moves:
    """The next step of a mover's thread."""
    return Turn(scenario, world, seat, index, STEPS).take()
