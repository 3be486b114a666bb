"""Named points in the mover where a test may kill or stop the process; inert unless armed.

``SHARDKIT_FAILPOINT=NAME`` kills the process with SIGKILL when it passes the point NAME; ``NAME:3`` when it passes it
the third time; ``NAME:3=stop`` stops it there with SIGSTOP, so that something else can happen before it goes on.
Nothing else reads the variable, and a name that no code passes does nothing.

Every point is named here. A *step* is a transaction of the mover, and has two: ``STEP.commit``, where all is done and
nothing is committed, and ``STEP.committed``, before anything else happens (`connections.transaction` passes both).
"""

from __future__ import annotations

import os
import signal
from collections import Counter

from shardkit.core.move import STILL, Phase

CATALOG_STEPS = (
    "catalog.create_job", "catalog.propose", "catalog.record", "catalog.discard", "catalog.enter", "catalog.note",
    "catalog.forget", "catalog.waiting", "catalog.failed", "catalog.finish_job", "catalog.begin_job",
)  # fmt: skip
"""Writes of the mover to the catalog."""
SHARD_STEPS = (
    "closing", "opening", "settling", "claim_source", "claim_publisher", "prepare_index", "use_identity",
    "restore_identity", "install_triggers", "remove_notes", "remove_triggers", "clear_triggers", "create_publication",
    "create_subscription", "enable_subscription", "drop_subscription", "drop_publication", "drop_slot", "delete_rows",
    "forget_changes", "take_changes",
)  # fmt: skip
"""Writes of the mover to a shard."""
_BACK = (Phase.ROLLING_BACK, Phase.VERIFYING_BACK, Phase.CUTTING_BACK, Phase.CUT_BACK, Phase.CLEARING, Phase.STAYING)
_PHASES = tuple(phase.value for phase in Phase if phase not in (*STILL, *_BACK))

LOCKED_STEPS = (
    "locked.prepare_index", "locked.install_triggers", "locked.receive", "locked.delete", "locked.remove_triggers",
    "locked.drop_index",
)  # fmt: skip
"""Writes to a shard of a mover that moves rows in locked steps."""

STEPS, STEPS_OF_LOCKED = (
    tuple(f"{step}.{edge}" for step in steps for edge in ("commit", "committed"))
    for steps in ((*CATALOG_STEPS, *SHARD_STEPS), LOCKED_STEPS)
)
ENDS_OF_PHASES = tuple(f"{phase}.{edge}" for phase in _PHASES for edge in ("begin", "end"))
BATCHES = tuple(f"{phase.value}.batch" for phase in (Phase.PREPARING, Phase.PURGING, Phase.ABORTING))
EMPTY_TARGET = (
    *(
        f"{step}.{edge}"
        for step in ("set_aside", "build_set_aside", "drop_unfinished", "put_back")
        for edge in ("commit", "committed")
    ),
    "put_back.before", "put_back.after",
)  # fmt: skip
"""What a move passes besides whose target has nothing yet."""
BETWEEN = (
    "copying.published", "copying.slot", "copying.subscribed", "copying.poll", "drop.subscription", "drop.slot",
    "cutting over.before decision", "cutting over.before opening", "change.proposed", "change.locked",
    "change.decided", "change.opened", "change.recorded", "create_slot.before", "build_index.before",
    "build_index.after", "purge.batch",
)  # fmt: skip
"""Between two steps, or within one."""

MOVE = (*ENDS_OF_PHASES, *BETWEEN, *BATCHES, *STEPS)
"""All that a move or its abort can pass."""
LOCKED = ("locked.step", "locked.before decision", "locked.opened", *STEPS_OF_LOCKED)
"""What it passes besides where rows move in locked steps."""
BACK = (
    *(f"{phase.value}.{edge}" for phase in _BACK for edge in ("begin", "end")),
    "catching up.published", "catching up.slot", "cut over.begun", "cut over.enabled", "cut over.subscribed",
    "clearing.batch", "cutting back.before decision", "cutting back.before opening",
    *(
        f"{step}.{edge}"
        for step in ("install_refusals", "install_triggers_back", "clear_notes", "begin_back", "enable_back", "attend")
        for edge in ("commit", "committed")
    ),
)  # fmt: skip
"""What it passes besides where the source is kept, and a rollback."""
ASIDE = tuple(f"{step}.{edge}" for step in ("catalog.report", "catalog.repair") for edge in ("commit", "committed"))
"""Writes that nothing depends on: what a mover tells of itself; and what a repair of the content does."""
JOIN = (
    "join.claim.commit",
    "join.claim.committed",
    "join.claimed",
    "join.copied_first",
    "join.copied",
    "join.split",
)
"""What a shard that joins passes besides."""
PLACEMENT = (
    "placement.recorded",
    "leave.closed",
    *(f"{step}.{edge}" for step in ("catalog.placement", "catalog.left") for edge in ("commit", "committed")),
)
"""What a change of weights or pins passes, and a shard that leaves."""
READMISSION = tuple(f"catalog.readmitted.{edge}" for edge in ("commit", "committed"))
"""What a shard that is brought forward passes."""
IDS = ("ids.restarted", "ids.altered")
"""What a split of ids passes."""
TWO_PHASE = (
    "two_phase.noted", "two_phase.preparing", "two_phase.prepared", "two_phase.deciding", "two_phase.decided",
    "two_phase.finishing", "two_phase.finished", "two_phase.forgotten",
)  # fmt: skip
"""What a transaction over several shards passes."""
POINTS = frozenset(
    (*MOVE, *EMPTY_TARGET, *LOCKED, *BACK, *ASIDE, *JOIN, *PLACEMENT, *READMISSION, *IDS, *TWO_PHASE)
)

_armed = ""
_times = 1
_signal = signal.SIGKILL
_passed: Counter[str] = Counter()


def arm(text: str) -> None:
    """Arm one point, and no other, as the variable would: ``NAME``, ``NAME:TIMES``, ``NAME:TIMES=stop``."""
    global _armed, _times, _signal
    name, _, action = text.partition("=")
    _armed, _, times = name.partition(":")
    _times = int(times or 1)
    _signal = signal.SIGSTOP if action == "stop" else signal.SIGKILL
    _passed.clear()


def failpoint(name: str) -> None:
    """Pass a named point."""
    if name != _armed:
        return
    _passed[name] += 1
    if _passed[name] == _times:
        os.kill(os.getpid(), _signal)


arm(os.environ.get("SHARDKIT_FAILPOINT", ""))
