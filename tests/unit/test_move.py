"""The table of a transfer's lifecycle: complete, without dead ends, and nothing beside it."""

from __future__ import annotations

from itertools import product

import pytest

from shardkit.core.errors import MoveTableError
from shardkit.core.move import (
    ACTIONS,
    FINAL,
    RESTING,
    ROLLBACK,
    STILL,
    TABLE,
    Event,
    Phase,
    can_abort,
    sentence,
    step,
)


def test_every_phase_has_an_action_or_nothing_is_to_do() -> None:
    assert ACTIONS.keys() | STILL == set(Phase)
    assert not ACTIONS.keys() & STILL
    assert not FINAL & RESTING


def test_nothing_leads_out_of_an_end() -> None:
    assert not any(row.phase in FINAL for row in TABLE)


def test_no_pair_stands_twice() -> None:
    pairs = [(row.phase, row.event) for row in TABLE]
    assert len(set(pairs)) == len(pairs)


def test_what_is_not_listed_raises() -> None:
    listed = {(row.phase, row.event) for row in TABLE}
    for phase, event in product(Phase, Event):
        if (phase, event) not in listed:
            with pytest.raises(MoveTableError) as caught:
                step(phase, event)
            assert caught.value.exit_code == 1


def test_every_phase_is_reached_and_leads_to_an_end() -> None:
    reached = {Phase.PLANNED}
    while new := {row.next for row in TABLE if row.phase in reached} - reached:
        reached |= new
    assert reached == set(Phase)
    ending = set(FINAL)
    while new := {row.phase for row in TABLE if row.next in ending} - ending:
        ending |= new
    assert ending == set(Phase)


def test_the_source_owns_the_arcs_again_only_by_a_decision() -> None:
    """Once the target owns the arcs, the source does not, but for a rollback that was decided."""
    of_the_target = {Phase.CUT_OVER, Phase.KEPT, Phase.PURGING, Phase.DONE, Phase.STAYING, *ROLLBACK}
    of_the_target -= {Phase.CUT_BACK, Phase.CLEARING, Phase.ROLLED_BACK}
    for row in TABLE:
        if row.phase in of_the_target:
            assert row.next in of_the_target or (row.next, row.event) == (Phase.CUT_BACK, Event.DECIDED)
    after = {Phase.CUT_BACK, Phase.CLEARING, Phase.ROLLED_BACK}
    assert {row.next for row in TABLE if row.phase in after} <= after
    assert not any(
        can_abort(phase) for phase in after | {Phase.CUT_OVER, Phase.KEPT, Phase.PURGING, Phase.DONE}
    )


def test_what_was_finalised_is_never_rolled_back() -> None:
    reached = {Phase.PURGING}
    while new := {row.next for row in TABLE if row.phase in reached} - reached:
        reached |= new
    assert reached == {Phase.PURGING, Phase.DONE}


@pytest.mark.parametrize("decided", [Phase.CUT_OVER, Phase.CUT_BACK])
def test_the_only_ways_over_a_decision_are_decided(decided: Phase) -> None:
    assert {row.event for row in TABLE if row.next is decided} == {Event.DECIDED}


def test_each_phase_has_one_sentence() -> None:
    for phase in Phase:
        assert sentence(phase).endswith(".")
