"""The protocol of a move, in every order of its steps, keeps its promises; without one of its rules it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from .explorer import Outcome, explore
from .protocol import Protocol
from .rules import Rule, without
from .scenarios import DEEP, DOUBLED, MUTANTS, WHOLE, Mutant, mutated
from .world import Scenario


def explored(scenario: Scenario) -> Outcome:
    """A scenario to its end; where a refusal is an end, only what is wrong is looked for."""
    outcome = explore(Protocol(scenario), progress=scenario.must_end)
    print(f"{scenario.name}: {outcome}")
    return outcome


@pytest.mark.parametrize("scenario", WHOLE, ids=lambda scenario: scenario.name)
def test_no_promise_is_broken(scenario: Scenario) -> None:
    outcome = explored(scenario)
    assert outcome.violation is None, str(outcome)
    assert outcome.exhausted


@pytest.mark.slow
@pytest.mark.parametrize("scenario", DEEP, ids=lambda scenario: scenario.name)
def test_no_promise_is_broken_in_wider_bounds(scenario: Scenario) -> None:
    outcome = explored(scenario)
    assert outcome.violation is None, str(outcome)
    assert outcome.exhausted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_without_a_rule_a_promise_is_broken(mutant: Mutant) -> None:
    outcome = explored(mutated(mutant))
    assert outcome.violation is not None, f"nothing shows that this is needed: {mutant.name}"
    assert mutant.shows in outcome.violation, str(outcome)
    assert outcome.trace


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_where_it_is_broken_the_rules_keep_it(mutant: Mutant) -> None:
    outcome = explored(replace(mutant.scenario, name=f"{mutant.scenario.name}, all rules"))
    assert outcome.violation is None, str(outcome)


@pytest.mark.parametrize("rule", DOUBLED)
def test_of_two_rules_with_one_purpose_either_is_enough(rule: Rule) -> None:
    for mutant in MUTANTS:
        if rule in mutant.rules and len(mutant.rules) > 1:
            outcome = explored(replace(mutant.scenario, rules=without(rule)))
            assert outcome.violation is None, str(outcome)


def test_every_rule_is_taken_away_somewhere() -> None:
    assert {rule for mutant in MUTANTS for rule in mutant.rules} == set(Rule)
