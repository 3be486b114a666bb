"""What each action of the table does, in atomic steps: between any two of them a process can die or another come.

`PROGRAMS` maps every `Action` of `core.move` to its steps; the phases between them come from the table itself
(`Turn.enters` takes `core.move.step`). A step does what one transaction of `rebalance` does. To model a new row:
give its action a program here, whose last step brings its event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shardkit.core.move import ACTIONS, FINAL, Action, Event, can_abort

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
}


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


UNMODELLED = frozenset(
    {
        Action.CATCH_UP_BACK,
        Action.VERIFY_BACK,
        Action.CUT_BACK,
        Action.OPEN_BACK,
        Action.CLEAR,
        Action.STAY,
    }
)
"""The way back of a source that was kept: not modelled yet. It uses the steps of the way there, with the shards' parts
exchanged; what tests it is `tests/crash/test_rollback_killed.py` and `tests/race/test_rollback_under_writers.py`."""


def program(action: Action, rules: frozenset[Rule], *, locked: bool = False) -> tuple[Step, ...]:
    """The steps of an action under the rules."""
    if locked and action in LOCKED:
        return LOCKED[action]
    steps = PROGRAMS[action]
    if action is Action.PURGE and Rule.DROP_BEFORE_PURGE not in rules:
        drops: tuple[Step, ...] = (("drop subscription",), ("drop slot",))
        steps = tuple(step for step in steps if step not in drops)
        steps = (*steps[:-1], *drops, steps[-1])
    if action is Action.UNDO and Rule.TOKEN_BEFORE_LOOKING not in rules:
        steps = steps[1:]
    return steps


def act(turn: Turn) -> Moves:
    """Begin the action of the phase."""
    if turn.thread.phase in FINAL:
        yield f"{turn.name} finds nothing to do", turn.go()
        return
    steps = program(ACTIONS[turn.thread.phase], turn.rules, locked=turn.scenario.locked)
    yield from turn.at_once(*steps)


def turn_back(turn: Turn) -> Moves:
    """Abort where the decision lies ahead; else go on."""
    if can_abort(turn.thread.phase):
        yield turn.enters(Event.ABORT)
    else:
        yield from act(turn)


def enter(turn: Turn, event: str) -> Moves:
    """The phase ends."""
    yield turn.enters(Event(event))


STEPS: Mapping[str, Callable[..., Moves]] = {
    "act": act,
    "turn back": turn_back,
    "enter": enter,
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
