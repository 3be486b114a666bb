"""The model is made of the table in `core.move`: whatever is added there has to be modelled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product

import pytest

from shardkit.core.move import ACTIONS, TABLE, Action, Event, Phase, can_abort

from . import actions
from .explorer import explore
from .protocol import Protocol
from .rules import ALL, Rule
from .scenarios import SOURCE, WRITER
from .world import Budget, Scenario, World

JOURNEYS = (
    Scenario("moves and aborts", budget=Budget(movers=1, aborts=1, postponements=1)),
    Scenario("goes back", keeps=True, budget=Budget(movers=1, aborts=1, postponements=1, rollbacks=1)),
    Scenario("locked steps", locked=True),
    Scenario("servers change", apps=WRITER, standbys=SOURCE, budget=Budget(failovers=1)),
)


class Travelled(Protocol):
    """Notes the transitions that movers make."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.labels: set[str] = set()

    def successors(self, world: World) -> Iterator[tuple[str, World]]:
        for label, following in super().successors(world):
            if label.startswith("mover"):
                self.labels.add(label.partition(": ")[2])
            yield label, following


def test_every_action_has_its_steps() -> None:
    missing = set(Action) - actions.PROGRAMS.keys()
    assert not missing, f"tests/model/actions.py has to say what these do, in atomic steps: {missing}"


def test_every_step_is_one_that_the_model_can_take() -> None:
    kept = [actions.keeping(action, steps, ALL) for action, steps in actions.PROGRAMS.items()]
    steps = set(chain(chain.from_iterable(actions.LOCKED.values()), chain.from_iterable(kept)))
    names = {step[2] if step[0] == "along" else step[0] for step in steps}
    assert names <= actions.STEPS.keys()


@pytest.mark.parametrize("phase", ACTIONS)
def test_an_action_ends_with_an_event_that_the_table_has_for_its_phase(phase: Phase) -> None:
    for rules, way in product((ALL, frozenset[Rule]()), ("there", "locked", "keeps")):
        last = actions.program(ACTIONS[phase], rules, locked=way == "locked", keeps=way == "keeps")[-1]
        assert last[0] == "enter"
        assert (phase, Event(str(last[1]))) in {(row.phase, row.event) for row in TABLE}


def test_every_row_of_the_table_is_travelled() -> None:
    seen: set[str] = set()
    for scenario in JOURNEYS:
        model = Travelled(scenario)
        assert explore(model).violation is None
        seen |= model.labels
    missing = [row for row in TABLE if f"{row.phase}, {row.event}: {row.next}" not in seen]
    assert not missing, f"no scenario goes here: {missing}"


def test_what_can_be_aborted_is_aborted_in_the_model() -> None:
    """The movers of the model ask the table, as the real ones do, whether the decision lies ahead."""
    model = Travelled(JOURNEYS[1])
    explore(model, progress=False)
    aborted = {label.partition(",")[0] for label in model.labels if f", {Event.ABORT}: " in label}
    assert aborted == {phase for phase in Phase if can_abort(phase)}
