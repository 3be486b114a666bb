"""The table of a transfer's lifecycle: complete, without dead ends, and nothing beside it."""

from __future__ import annotations

from itertools import product

import pytest

from shardkit.core.errors import MoveTableError
from shardkit.core.move import ACTIONS, FINAL, TABLE, Event, Phase, can_abort, sentence, step


def test_every_phase_has_an_action_or_is_final() -> None:
    assert ACTIONS.keys() | FINAL == set(Phase)
    assert not ACTIONS.keys() & FINAL


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


def test_nothing_leads_back_over_the_decision() -> None:
    """Once the target owns the arcs, the source never does again."""
    after = {Phase.CUT_OVER, Phase.PURGING, Phase.DONE}
    assert {row.next for row in TABLE if row.phase in after} <= after
    assert not any(can_abort(phase) for phase in after)


def test_the_only_ways_over_the_decision_are_decided() -> None:
    assert {row.event for row in TABLE if row.next is Phase.CUT_OVER} == {Event.DECIDED}


def test_each_phase_has_one_sentence() -> None:
    for phase in Phase:
        assert sentence(phase).endswith(".")
