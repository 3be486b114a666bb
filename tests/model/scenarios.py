"""What is explored: the protocol with all its rules, and with some taken away."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from shardkit.core.move import Phase

from .rules import Rule, without
from .world import Budget, Scenario, Transfer

ALL_KINDS = ("write", "scatter", "beside", "beside old")
WRITER = ((1, ("write",)),)
COUNTER = ((1, ("scatter",)),)
TWICE = ((2, ("write",)),)
SOURCE, TARGET = frozenset({0}), frozenset({1})

WHOLE = (
    Scenario("movers alone", budget=Budget(movers=1, aborts=1, postponements=1)),
    Scenario("an application, two movers", apps=((1, ALL_KINDS),), budget=Budget(movers=1, aborts=1)),
    Scenario("two applications", apps=((1, ("write", "scatter")), (1, ("beside write", "beside old")))),
    Scenario("after a move that was aborted", history=True, transfers=(Transfer(0, 1, 1),), apps=COUNTER),
    Scenario("a mover vanishes", apps=WRITER, budget=Budget(hangs=1, movers=1)),
    Scenario("servers crash", apps=WRITER, budget=Budget(crashes=1)),
    Scenario("a slot is lost", apps=WRITER, budget=Budget(lost_slots=1)),
    Scenario("a row is changed on the target", budget=Budget(planted=1), must_end=False),
    Scenario(
        "the source fails over",
        apps=((1, ("write", "beside write")),),
        standbys=SOURCE,
        budget=Budget(failovers=1),
    ),
    Scenario("the target fails over", apps=WRITER, standbys=TARGET, budget=Budget(failovers=1)),
    Scenario("the catalog is restored", apps=WRITER, budget=Budget(catalog_losses=1), must_end=False),
    Scenario("locked steps", locked=True, apps=WRITER, budget=Budget(movers=1, aborts=1)),
    Scenario(
        "two transfers of one source", transfers=(Transfer(0, 1, 0), Transfer(0, 2, 1)), shards=3, apps=WRITER
    ),
    Scenario("a kept source", keeps=True, budget=Budget(movers=1, aborts=1, rollbacks=1)),
    Scenario("a kept source, a writer", keeps=True, apps=WRITER, budget=Budget(rollbacks=1)),
    Scenario(
        "a rollback, two movers",
        keeps=True,
        begins=Phase.KEPT,
        apps=((1, ("write", "scatter")),),
        budget=Budget(movers=1, aborts=1, rollbacks=1, postponements=1),
    ),
    Scenario(
        "servers crash in a rollback",
        keeps=True,
        begins=Phase.KEPT,
        apps=WRITER,
        budget=Budget(crashes=1, rollbacks=1),
    ),
    Scenario(
        "the source fails over while it is kept",
        keeps=True,
        begins=Phase.KEPT,
        apps=WRITER,
        standbys=SOURCE,
        budget=Budget(failovers=1, rollbacks=1),
        must_end=False,
    ),
    Scenario(
        "the target fails over while the source is kept",
        keeps=True,
        begins=Phase.KEPT,
        apps=WRITER,
        standbys=TARGET,
        budget=Budget(failovers=1, rollbacks=1),
        must_end=False,
    ),
    Scenario(
        "the slot of the way back is lost",
        keeps=True,
        begins=Phase.KEPT,
        apps=WRITER,
        budget=Budget(lost_slots=1, rollbacks=1),
        must_end=False,
    ),
)
"""With all rules; together under half a minute on a slow core."""

DEEP = (
    Scenario("three movers", budget=Budget(movers=2, aborts=1, postponements=1)),
    Scenario("an application, three movers", apps=WRITER, budget=Budget(movers=2, aborts=1)),
    Scenario(
        "two applications, two movers",
        apps=((1, ("write", "scatter")), (1, ("beside write", "beside old"))),
        budget=Budget(movers=1, aborts=1),
    ),
    Scenario("locked steps, servers crash", locked=True, apps=WRITER, budget=Budget(movers=2, crashes=1)),
    Scenario("two writers", apps=((2, ("write",)), (1, ("write", "scatter"))), budget=Budget(movers=1)),
    Scenario(
        "after a move that was aborted, two movers",
        history=True,
        transfers=(Transfer(0, 1, 1),),
        apps=((2, ("scatter",)),),
        budget=Budget(movers=1, aborts=1),
    ),
    Scenario("servers crash, two movers", apps=WRITER, budget=Budget(crashes=2, movers=1, aborts=1)),
    Scenario(
        "the source fails over, two movers",
        apps=((1, ("write", "beside write")),),
        standbys=SOURCE,
        budget=Budget(failovers=1, movers=1),
    ),
    Scenario(
        "the target fails over, two movers",
        apps=WRITER,
        standbys=TARGET,
        budget=Budget(failovers=1, movers=1),
    ),
    Scenario(
        "the catalog is restored, two movers",
        apps=WRITER,
        budget=Budget(catalog_losses=1, movers=1, aborts=1),
        must_end=False,
    ),
    Scenario(
        "two transfers to one target",
        transfers=(Transfer(0, 1, 0), Transfer(2, 1, 1)),
        owners=(0, 2),
        shards=3,
        apps=COUNTER,
    ),
    Scenario(
        "two transfers, two movers",
        transfers=(Transfer(0, 1, 0), Transfer(0, 2, 1)),
        shards=3,
        budget=Budget(movers=1),
    ),
    Scenario(
        "a kept source, two movers, two rollbacks",
        keeps=True,
        apps=WRITER,
        budget=Budget(movers=1, aborts=1, rollbacks=2),
    ),
    Scenario(
        "a kept source, servers crash",
        keeps=True,
        apps=WRITER,
        budget=Budget(crashes=1, movers=1, rollbacks=1),
    ),
    Scenario(
        "a kept source, two writers",
        keeps=True,
        begins=Phase.KEPT,
        apps=((2, ("write",)), (1, ALL_KINDS)),
        budget=Budget(movers=1, aborts=1, rollbacks=1),
    ),
)
"""With all rules, wider; minutes."""


class Mutant(NamedTuple):
    """A protocol without some rules, where that shows, and how."""

    rules: tuple[Rule, ...]
    scenario: Scenario
    shows: str

    @property
    def name(self) -> str:
        """For the list of tests."""
        return " and ".join(f"no {rule.name}" for rule in self.rules)


_LATE = Scenario("late", begins=Phase.CUTTING_OVER, apps=WRITER)
_TWO = replace(_LATE, budget=Budget(movers=1, aborts=1), must_end=False)
_ONE_APP = Scenario("one application", apps=WRITER)
_COUNTING = Scenario("counting", apps=COUNTER)
_RESTORED = Scenario("restored", apps=WRITER, budget=Budget(catalog_losses=1), must_end=False)

_KEPT = Scenario("kept", keeps=True, begins=Phase.KEPT, apps=TWICE, budget=Budget(rollbacks=1))
_BACK = replace(_KEPT, name="back", begins=Phase.ROLLING_BACK, budget=Budget())
_BACK_TWO = replace(
    _BACK, begins=Phase.CUTTING_BACK, apps=WRITER, budget=Budget(movers=1, aborts=1), must_end=False
)

MUTANTS = (
    Mutant(
        (Rule.SLOT_BACK_FIRST, Rule.COMPARE),
        Scenario("slot back", keeps=True, apps=WRITER, budget=Budget(rollbacks=1)),
        "shard 0 has 0 where 1 was acknowledged",
    ),
    Mutant(
        (Rule.ONE_DIRECTION, Rule.DISABLE_AT_OPENING),
        Scenario("circle", keeps=True, begins=Phase.CUT_OVER, apps=TWICE, budget=Budget(rollbacks=1)),
        "where 2 was acknowledged",
    ),
    Mutant(
        (Rule.DROP_BACK,), Scenario("dropped", keeps=True, begins=Phase.KEPT), "a subscription is left on 0"
    ),
    Mutant((Rule.WAIT_FOR_REPLAY,), _KEPT, "was acknowledged"),
    Mutant(
        (Rule.COMPARE,),
        replace(_KEPT, budget=Budget(planted=1, rollbacks=1), must_end=False),
        "value 99 on 0",
    ),
    Mutant((Rule.DISABLE_AT_OPENING, Rule.DROP_BEFORE_PURGE), _BACK, "finds no row on 0"),
    Mutant((Rule.DROP_BEFORE_PURGE,), _KEPT, "a row that it does not own is left on 0"),
    Mutant((Rule.CLOSING_LOCK,), _BACK, "finds value 0 on 0"),
    Mutant((Rule.TOKEN,), _BACK_TWO, "owns what it gave"),
    Mutant((Rule.TOKEN_BEFORE_LOOKING,), _BACK_TWO, "owns what it gave"),
    Mutant((Rule.LOOK,), _BACK_TWO, "owns what it gave"),
    Mutant(
        (Rule.SAME_SERVERS, Rule.COMPARE),
        replace(_KEPT, budget=Budget(rollbacks=1, failovers=1), standbys=SOURCE, must_end=False),
        "was acknowledged",
    ),
    Mutant(
        (Rule.STANDBYS_OF_TARGET,),
        replace(_BACK, standbys=SOURCE, budget=Budget(failovers=1), must_end=False),
        "finds value 0 on 0",
    ),
    Mutant(
        (Rule.STANDBYS_OF_SOURCE,),
        replace(_BACK, standbys=TARGET, budget=Budget(failovers=1), must_end=False),
        "two owners",
    ),
    Mutant((Rule.SYNCHRONOUS_DECISION,), replace(_KEPT, budget=Budget(crashes=1, rollbacks=1)), "two owners"),
    Mutant((Rule.FENCE,), _ONE_APP, "finds no row on 0"),
    Mutant((Rule.CLOSING_LOCK,), _ONE_APP, "finds no row on 0"),
    Mutant((Rule.MARK_CLOSES,), _COUNTING, "counts [2, 1]"),
    Mutant((Rule.MARK_FIRST,), _COUNTING, "counts [2, 1]"),
    Mutant((Rule.PREDICATE,), _COUNTING, "counts [2, 1]"),
    Mutant((Rule.GUARDS_FIRST,), _COUNTING, "counts [0, 1]"),
    Mutant(
        (Rule.RULE_R,),
        replace(_LATE, apps=((1, ("beside write",)),), standbys=SOURCE, budget=Budget(failovers=1)),
        "finds no row on 1",
    ),
    Mutant((Rule.OLD_SNAPSHOTS,), Scenario("old", apps=((1, ("beside old",)),)), "finds no row on 1"),
    Mutant((Rule.OPEN_BESIDE,), Scenario("beside", apps=((1, ("beside",)),)), "an application waits"),
    Mutant(
        (Rule.DRAIN,),
        Scenario("old names", history=True, transfers=(Transfer(0, 1, 1),), apps=COUNTER),
        "counts [1, 2]",
    ),
    Mutant((Rule.TOKEN,), _TWO, "finds no row on 1"),
    Mutant((Rule.TOKEN_BEFORE_LOOKING,), _TWO, "a row that it does not own is left on 0"),
    Mutant((Rule.LOOK,), _TWO, "a row that it does not own is left on 0"),
    Mutant((Rule.LEASE,), Scenario("late writes", budget=Budget(movers=1)), "the job is not at its end"),
    Mutant(
        (Rule.ONE_CHANGE,),
        Scenario("two", transfers=(Transfer(0, 1, 0), Transfer(0, 2, 1)), shards=3),
        "asks for a topology that cannot be",
    ),
    Mutant(
        (Rule.FRESH_NUMBERS,),
        replace(_LATE, standbys=SOURCE, budget=Budget(failovers=1, movers=1, aborts=1)),
        "an application waits",
    ),
    Mutant((Rule.GUARD,), _RESTORED, "finds no row on 1"),
    Mutant((Rule.NEWEST_FENCE,), _RESTORED, "finds no row on 1"),
    Mutant((Rule.EXPECTED_NAME,), _RESTORED, "finds no row on 1"),
    Mutant(
        (Rule.SLOT_LOCK,), Scenario("late slots", budget=Budget(movers=1, aborts=1)), "a slot is left on 0"
    ),
    Mutant((Rule.WAIT_FOR_REPLAY,), _ONE_APP, "shard 1 has 0 where 1 was acknowledged"),
    Mutant((Rule.LOCKED_COPY,), replace(_ONE_APP, locked=True), "shard 1 has 0 where 1 was acknowledged"),
    Mutant((Rule.COMPARE,), Scenario("changed", budget=Budget(planted=1), must_end=False), "shard 1 has 99"),
    Mutant((Rule.DISABLE_AT_OPENING, Rule.DROP_BEFORE_PURGE), _ONE_APP, "finds no row on 1"),
    Mutant(
        (Rule.SAME_SERVERS,),
        Scenario("failed over", apps=WRITER, standbys=TARGET, budget=Budget(failovers=1), must_end=False),
        "shard 1 has 0 where 1 was acknowledged",
    ),
    Mutant(
        (Rule.SAME_SERVERS, Rule.COMPARE),
        Scenario("slot lost", apps=WRITER, budget=Budget(lost_slots=1)),
        "shard 1 has 0 where 1 was acknowledged",
    ),
    Mutant((Rule.SYNCHRONOUS_DECISION,), replace(_LATE, budget=Budget(crashes=1)), "two owners"),
    Mutant((Rule.HUNG_SESSIONS,), Scenario("hung", budget=Budget(hangs=1, movers=1)), "a mover is at work"),
    Mutant(
        (Rule.STANDBYS_OF_TARGET,),
        replace(_LATE, standbys=TARGET, budget=Budget(failovers=1)),
        "finds no row on 1",
    ),
    Mutant(
        (Rule.STANDBYS_OF_SOURCE,), replace(_LATE, standbys=SOURCE, budget=Budget(failovers=1)), "two owners"
    ),
    Mutant(
        (Rule.STANDBYS_BEFORE_PURGE,),
        replace(_LATE, standbys=TARGET, budget=Budget(failovers=1)),
        "a subscription is left on 1",
    ),
)

DOUBLED = (Rule.DISABLE_AT_OPENING, Rule.DROP_BEFORE_PURGE, Rule.ONE_DIRECTION)
"""Rules of which one makes up for another: only without both is something lost."""


def mutated(mutant: Mutant) -> Scenario:
    """The scenario without the rules."""
    return replace(mutant.scenario, rules=without(*mutant.rules))
