"""Counts what became of the statements that are drawn: how they were answered, and which were refused and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest


class Outcomes:
    """The statements of one module."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()

    def answered(self, plan: Any) -> None:
        """One statement was answered by a plan."""
        self.answers[type(plan).__name__.removesuffix("Plan").lower()] += 1

    def refused(self, error: Any) -> None:
        """One statement was refused."""
        self.refusals[str(error.fields.get("reason"))] += 1

    @property
    def refused_share(self) -> float:
        """The refused ones among all."""
        refused = self.refusals.total()
        return refused / max(1, refused + self.answers.total())

    def __str__(self) -> str:
        total = self.answers.total() + self.refusals.total()
        answers = ", ".join(f"{name} {count:,}" for name, count in self.answers.most_common())
        reasons = ", ".join(f"{name} {count:,}" for name, count in self.refusals.most_common()) or "none"
        return f"{total:,} statements ({answers}), {self.refused_share:.1%} refused ({reasons})"


_PROPERTY = "oracle"


@pytest.fixture(scope="module")
def oracle_outcomes() -> Outcomes:
    """What became of the statements of this module; told at the end of the run."""
    return Outcomes()


@pytest.fixture(autouse=True)
def _told(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "oracle_outcomes" in request.fixturenames:
        name = request.module.__name__.rpartition(".")[2]
        outcomes: Outcomes = request.getfixturevalue("oracle_outcomes")
        # With the report of the test, as it may run in another process than the one that tells.
        request.node.user_properties.append((_PROPERTY, f"{name}: {outcomes}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found: dict[str, str] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, told in getattr(report, "user_properties", ()):
                if name == _PROPERTY:
                    found[report.nodeid.partition("::")[0]] = told
    for told in found.values():
        terminalreporter.write_line(told)
