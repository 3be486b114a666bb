"""The lifecycle of a transfer: one pure table of transitions.

A transfer carries arcs from a source to a target. Each row of the table says: in this phase, on this event, go to
that phase and do this; the sentence is what the operator reads. The driver (`rebalance.mover`) executes the action of
the phase it is in, persists the phase that follows, and goes on; after a crash it begins again with the action of the
phase that is stored, so every action can be run twice. A failure is no phase: it is stored beside it.

A transfer may be told to keep its source: it rests in KEPT until the operator finalises it or rolls it back. A
rollback is a move of its own, from the target back to the source, along the second half of the table, with a decision
of its own; before that it can be taken back too, to KEPT.

An event that the table does not list for a phase is a bug and raises `MoveTableError`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from .errors import MoveTableError


class Phase(StrEnum):
    """Where a transfer is; stored in the catalog under this value."""

    PLANNED = "planned"
    PREPARING = "preparing"
    COPYING = "copying"
    CATCHING_UP = "catching up"
    VERIFYING = "verifying"
    CUTTING_OVER = "cutting over"
    CUT_OVER = "cut over"
    PURGING = "purging"
    DONE = "done"
    ABORTING = "aborting"
    ABORTED = "aborted"
    KEPT = "kept"
    ROLLING_BACK = "rolling back"
    VERIFYING_BACK = "verifying back"
    CUTTING_BACK = "cutting back"
    CUT_BACK = "cut back"
    CLEARING = "clearing"
    ROLLED_BACK = "rolled back"
    STAYING = "staying"


class Event(StrEnum):
    """What ends a phase."""

    STARTED = "started"
    PREPARED = "prepared"
    COPIED = "copied"
    CAUGHT_UP = "caught up"
    VERIFIED = "verified"
    POSTPONED = "postponed"
    SERVER_CHANGED = "server changed"
    DECIDED = "decided"
    OPENED = "opened"
    PURGED = "purged"
    ABORT = "abort"
    UNDONE = "undone"
    KEPT = "kept"
    FINALIZE = "finalize"
    ROLL_BACK = "roll back"


class Action(StrEnum):
    """What the driver does in a phase."""

    START = "start"
    PREPARE = "prepare"
    COPY = "copy"
    CATCH_UP = "catch up"
    VERIFY = "verify"
    CUT_OVER = "cut over"
    OPEN = "open"
    PURGE = "purge"
    UNDO = "undo"
    CATCH_UP_BACK = "catch up back"
    VERIFY_BACK = "verify back"
    CUT_BACK = "cut back"
    OPEN_BACK = "open back"
    CLEAR = "clear"
    STAY = "stay"


class Mode(StrEnum):
    """How rows are carried; stored in the catalog under this value."""

    AUTO = "auto"
    """Logical where the source can, else locked."""
    LOGICAL = "logical"
    """Logical replication, and one short cutover."""
    LOCKED = "locked"
    """Small steps under the fence, each its own decision."""


class Transition(NamedTuple):
    """One row of the table."""

    phase: Phase
    event: Event
    next: Phase
    sentence: str


_BEFORE_DECISION = (
    Phase.PLANNED,
    Phase.PREPARING,
    Phase.COPYING,
    Phase.CATCHING_UP,
    Phase.VERIFYING,
    Phase.CUTTING_OVER,
)
_BEFORE_DECISION_BACK = (Phase.ROLLING_BACK, Phase.VERIFYING_BACK, Phase.CUTTING_BACK)

TABLE: tuple[Transition, ...] = (
    Transition(
        Phase.PLANNED,
        Event.STARTED,
        Phase.PREPARING,
        "Checking both servers and marking the arcs in transit.",
    ),
    Transition(Phase.PREPARING, Event.PREPARED, Phase.COPYING, "Copying the rows of the arcs to the target."),
    Transition(Phase.COPYING, Event.COPIED, Phase.CATCHING_UP, "Applying the writes made during the copy."),
    Transition(Phase.CATCHING_UP, Event.CAUGHT_UP, Phase.VERIFYING, "Comparing the rows on both sides."),
    Transition(Phase.VERIFYING, Event.VERIFIED, Phase.CUTTING_OVER, "Waiting for a moment to cut over."),
    Transition(
        Phase.CUTTING_OVER, Event.POSTPONED, Phase.CATCHING_UP, "Too much changed; catching up again."
    ),
    Transition(Phase.CUTTING_OVER, Event.DECIDED, Phase.CUT_OVER, "The target owns the arcs; opening it."),
    # Without logical replication rows pass in steps, each of which is decided; the last one decides the transfer.
    Transition(
        Phase.COPYING, Event.DECIDED, Phase.CUT_OVER, "The target owns the arcs, step by step; opening it."
    ),
    Transition(Phase.CUT_OVER, Event.OPENED, Phase.PURGING, "Deleting the moved rows from the source."),
    Transition(
        Phase.PURGING, Event.PURGED, Phase.DONE, "Done: the target owns the arcs, the source is clean."
    ),
    *(
        Transition(
            phase,
            Event.SERVER_CHANGED,
            Phase.PREPARING,
            "A server failed over, or the copy was given up; starting it again.",
        )
        for phase in (Phase.COPYING, Phase.CATCHING_UP, Phase.VERIFYING, Phase.CUTTING_OVER)
    ),
    *(
        Transition(phase, Event.ABORT, Phase.ABORTING, "Taking the copy back; the source keeps the arcs.")
        for phase in _BEFORE_DECISION
    ),
    # An abort that comes after the decision finds it made, and the transfer goes on.
    Transition(
        Phase.ABORTING, Event.DECIDED, Phase.CUT_OVER, "The cutover was decided already; opening the target."
    ),
    Transition(
        Phase.ABORTING, Event.UNDONE, Phase.ABORTED, "Aborted: the source owns the arcs, the target is clean."
    ),
    Transition(
        Phase.CUT_OVER,
        Event.KEPT,
        Phase.KEPT,
        "The source keeps the rows until `rebalance finalize`; `rebalance rollback` brings the arcs back.",
    ),
    Transition(Phase.KEPT, Event.FINALIZE, Phase.PURGING, "Deleting the moved rows from the source."),
    Transition(
        Phase.KEPT,
        Event.ROLL_BACK,
        Phase.ROLLING_BACK,
        "Applying the last writes to the rows that the source kept.",
    ),
    Transition(
        Phase.ROLLING_BACK,
        Event.CAUGHT_UP,
        Phase.VERIFYING_BACK,
        "Comparing the rows on both sides, to go back.",
    ),
    Transition(
        Phase.VERIFYING_BACK,
        Event.VERIFIED,
        Phase.CUTTING_BACK,
        "Waiting for a moment to give the arcs back.",
    ),
    Transition(
        Phase.CUTTING_BACK,
        Event.POSTPONED,
        Phase.ROLLING_BACK,
        "Too much changed; applying the last writes again.",
    ),
    Transition(
        Phase.CUTTING_BACK, Event.DECIDED, Phase.CUT_BACK, "The source owns the arcs again; opening it."
    ),
    Transition(Phase.CUT_BACK, Event.OPENED, Phase.CLEARING, "Deleting the rows from the target."),
    Transition(
        Phase.CLEARING,
        Event.PURGED,
        Phase.ROLLED_BACK,
        "Rolled back: the source owns the arcs again, the target is clean.",
    ),
    *(
        Transition(phase, Event.ABORT, Phase.STAYING, "Taking the rollback back; the target keeps the arcs.")
        for phase in _BEFORE_DECISION_BACK
    ),
    Transition(
        Phase.STAYING, Event.DECIDED, Phase.CUT_BACK, "The way back was decided already; opening the source."
    ),
    Transition(
        Phase.STAYING,
        Event.UNDONE,
        Phase.KEPT,
        "The rollback is taken back; the source keeps the rows as before.",
    ),
)

ACTIONS: dict[Phase, Action] = {
    Phase.PLANNED: Action.START,
    Phase.PREPARING: Action.PREPARE,
    Phase.COPYING: Action.COPY,
    Phase.CATCHING_UP: Action.CATCH_UP,
    Phase.VERIFYING: Action.VERIFY,
    Phase.CUTTING_OVER: Action.CUT_OVER,
    Phase.CUT_OVER: Action.OPEN,
    Phase.PURGING: Action.PURGE,
    Phase.ABORTING: Action.UNDO,
    Phase.ROLLING_BACK: Action.CATCH_UP_BACK,
    Phase.VERIFYING_BACK: Action.VERIFY_BACK,
    Phase.CUTTING_BACK: Action.CUT_BACK,
    Phase.CUT_BACK: Action.OPEN_BACK,
    Phase.CLEARING: Action.CLEAR,
    Phase.STAYING: Action.STAY,
}

FINAL = frozenset({Phase.DONE, Phase.ABORTED, Phase.ROLLED_BACK})
RESTING = frozenset({Phase.KEPT})
"""Phases in which nothing is done until the operator says what."""
STILL = FINAL | RESTING
"""Phases in which no mover has anything to do."""
ROLLBACK = frozenset({*_BEFORE_DECISION_BACK, Phase.CUT_BACK, Phase.CLEARING, Phase.ROLLED_BACK})
"""Phases of a transfer that the operator has told to go back."""

_INDEX = {(row.phase, row.event): row for row in TABLE}


def step(phase: Phase, event: Event) -> Transition:
    """The transition of an event in a phase; `MoveTableError` if the table has none."""
    try:
        return _INDEX[phase, event]
    except KeyError:
        raise MoveTableError(
            f"A transfer that is {phase} cannot take {event!r}.", phase=phase, event=event
        ) from None


def sentence(phase: Phase) -> str:
    """What an operator is told while a transfer is in this phase."""
    if phase is Phase.PLANNED:
        return "Waiting to start."
    return next(row.sentence for row in TABLE if row.next is phase)


def can_abort(phase: Phase) -> bool:
    """Whether a decision lies ahead, so that the arcs can still stay where they are."""
    return (phase, Event.ABORT) in _INDEX
