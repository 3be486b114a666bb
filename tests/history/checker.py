"""Whether a history could have been one of a single copy of every row. Pure: it knows nothing of shards and servers.

Each write of a row gives it the next version and puts a token of its own at the end of those of the row, so what was
read tells which writes came before, and in which order: the versions of a key are ordered by (birth of the row,
version), and a deletion is the last version of its row. Then a key is linearizable if and only if no operation that
began after another had ended has an older version, and none has the version of a write that began later. What
remains to be told by search is which absence a read without a row saw, and there the oldest possible is the best.

Counts and lists of many rows are of no single moment. But a row that was there all the time from their beginning to
their end has to be in them once, and one that was not there all that time must not.
"""

from __future__ import annotations

import bisect
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .records import Kind, Operation, Outcome, Row

Version = tuple[int, int]
LAST = 1 << 62
"""The version of a deletion, within its row."""
NEVER: Version = (-1, LAST)
"""The version of what was never inserted."""
SHOWN = 20


class Step(NamedTuple):
    """An operation on the order of versions; ``version`` None: some absence."""

    began: int
    ended: int | None
    version: Version | None
    writes: bool
    what: str


@dataclass
class Report:
    """What is wrong with a history, and what it consists of."""

    problems: list[str] = field(default_factory=list)
    found: int = 0
    operations: int = 0
    unknown: int = 0
    effective: int = 0
    """Of the unknown ones, writes that took place."""
    scatters: int = 0
    rows_scattered: int = 0
    """Rows of scatters that had to be there, or not to be."""

    def add(self, problem: str) -> None:
        """Note a problem; some are kept as text, all are counted."""
        self.found += 1
        if len(self.problems) < SHOWN:
            self.problems.append(problem)


def check(history: Iterable[Operation], bands: Mapping[int, Sequence[int]] | None = None) -> Report:
    """Check a history; ``bands`` are the keys that a COUNT or LIST of each band asks for."""
    report = Report()
    by_key: dict[int, list[Operation]] = defaultdict(list)
    scatters = []
    for operation in history:
        report.operations += 1
        report.unknown += operation.outcome is Outcome.UNKNOWN
        if operation.kind in (Kind.COUNT, Kind.LIST):
            scatters.append(operation)
        else:
            by_key[operation.key].append(operation)
    for key, operations in by_key.items():
        _Key(key, operations, report).check()
    lives = {key: _Life(operations) for key, operations in by_key.items()}
    for scatter in scatters:
        if scatter.outcome is Outcome.DONE:
            report.scatters += 1
            _check_scatter(scatter, (bands or {})[scatter.key], lives, report)
    return report


# --- one key ---------------------------------------------------------------------------------------------------------


class _Key:
    """The operations on one key."""

    def __init__(self, key: int, operations: Sequence[Operation], report: Report) -> None:
        self._key = key
        self._operations = operations
        self._report = report
        self._token_at: dict[Version, str] = {}
        self._n_at: dict[Version, int] = {}

    def check(self) -> None:
        for operation in self._operations:
            if operation.row is not None:
                self._look(operation.row)
        versions = self._versions_of_tokens()
        self._check_origins(versions)
        self._check_answers(versions)
        self._check_increments()
        self._check_deletions()
        _sweep(self._steps(versions), self._absences(), self._problem)

    def _problem(self, text: str) -> None:
        self._report.add(f"key {self._key}: {text}")

    def _look(self, row: Row) -> None:
        """Which token each version has, by what was read: another one is an update that was lost."""
        at = (row.born, row.version)
        if self._n_at.setdefault(at, row.n) != row.n:
            self._problem(f"version {at} has n = {row.n} and n = {self._n_at[at]}")
        for back, token in enumerate(reversed(row.tokens())):
            version = (row.born, row.version - back)
            if self._token_at.setdefault(version, token) != token:
                self._problem(f"version {version} is of {token} and of {self._token_at[version]}")

    def _versions_of_tokens(self) -> dict[str, Version]:
        versions: dict[str, Version] = {}
        for version, token in self._token_at.items():
            if versions.setdefault(token, version) != version:
                self._problem(f"{token} took place twice, as {versions[token]} and {version}")
        return versions

    def _check_origins(self, versions: Mapping[str, Version]) -> None:
        begun = {operation.token: operation for operation in self._operations if operation.token}
        for token, version in versions.items():
            if token not in begun:
                self._problem(f"{token}, version {version}, was written by nobody")
            elif begun[token].outcome is Outcome.FAILED:
                self._problem(f"{token}, version {version}, was written although it failed")

    def _check_answers(self, versions: Mapping[str, Version]) -> None:
        for operation in self._operations:
            if operation.kind is not Kind.WRITE or operation.outcome is not Outcome.DONE:
                continue
            if operation.row is None and operation.token in versions:
                self._problem(f"{operation.token} found no row, and is there")
            if operation.row is not None and operation.row.tokens()[-1:] != [operation.token]:
                self._problem(f"{operation.token} is not the last that it left, {operation.row}")

    def _check_increments(self) -> None:
        for (born, version), n in self._n_at.items():
            before = self._n_at.get((born, version - 1))
            token = self._token_at.get((born, version))
            if before is not None and token is not None and n - before != token.startswith("i"):
                self._problem(f"{token} made n {n} of {before}")

    def _check_deletions(self) -> None:
        newest: dict[int, int] = {}
        for born, version in self._token_at:
            newest[born] = max(newest.get(born, 0), version)
        for operation in self._operations:
            if operation.kind is Kind.DELETE and operation.row is not None:
                row = operation.row
                if newest[row.born] > row.version:
                    self._problem(
                        f"version {(row.born, newest[row.born])} is of a row deleted at {row.version}"
                    )

    def _absences(self) -> list[Version]:
        born = {
            operation.born
            for operation in self._operations
            if operation.kind is Kind.DELETE
            and (operation.outcome is Outcome.UNKNOWN or operation.row is not None)
        }
        return sorted([NEVER, *((each, LAST) for each in born)])

    def _steps(self, versions: Mapping[str, Version]) -> list[Step]:
        steps = []
        doubtful: dict[int, Step] = {}
        for operation in self._operations:
            began, ended = operation.began, operation.ended
            what = f"{operation.kind} {operation.token or operation.row or ''}".strip()
            if operation.outcome is Outcome.FAILED:
                continue
            if operation.kind is Kind.DELETE:
                deletion = Step(began, ended, (operation.born, LAST), True, what)
                if operation.outcome is Outcome.UNKNOWN:
                    first = doubtful.setdefault(operation.born, deletion)
                    doubtful[operation.born] = min(first, deletion)
                elif operation.row is not None:
                    steps.append(deletion)
                else:
                    steps.append(Step(began, ended, None, False, what))
            elif operation.token:
                version = versions.get(operation.token)
                if version is not None:
                    self._report.effective += operation.outcome is Outcome.UNKNOWN
                    steps.append(Step(began, ended, version, True, what))
                elif operation.outcome is Outcome.DONE:
                    steps.append(self._unseen(operation, what))
            elif operation.outcome is Outcome.DONE:
                at = (operation.row.born, operation.row.version) if operation.row else None
                steps.append(Step(began, ended, at, False, what))
        deleted = {step.version for step in steps if step.writes}
        return [*steps, *(step for step in doubtful.values() if step.version not in deleted)]

    def _unseen(self, operation: Operation, what: str) -> Step:
        """A write that was done, and left nothing: an INSERT that nobody has read, or a write that found no row."""
        if operation.kind is Kind.INSERT:
            return Step(operation.began, operation.ended, (operation.born, 1), True, what)
        at = (operation.row.born, operation.row.version) if operation.row is not None else None
        return Step(operation.began, operation.ended, at, at is not None, what)


def _sweep(steps: list[Step], absences: Sequence[Version], problem: Callable[[str], None]) -> None:
    """Whether no step has an older version than one that had ended when it began, nor one that was written later."""
    steps.sort(key=lambda step: step.began)
    running: list[tuple[int, Version, str]] = []
    newest, by = NEVER, "the beginning"
    for step in steps:
        while running and running[0][0] < step.began:
            _, version, what = heapq.heappop(running)
            if version > newest:
                newest, by = version, what
        at = step.version
        if at is None:
            place = bisect.bisect_left(absences, newest)
            if place == len(absences):
                problem(f"{step.what} found no row, after {by} had version {newest}")
                continue
            at = absences[place]
        elif at < newest or (step.writes and at == newest):
            problem(f"{step.what} has version {at}, and began after {by} had ended with {newest}")
        if step.ended is not None:
            heapq.heappush(running, (step.ended, at, step.what))


# --- many rows -------------------------------------------------------------------------------------------------------


class _Life:
    """When a row was there, by the operations of its one owner, who inserts and deletes it one after the other."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._changes = sorted(
            (operation.began, operation.ended, operation.kind is Kind.INSERT, operation.outcome)
            for operation in operations
            if operation.kind in (Kind.INSERT, Kind.DELETE) and operation.outcome is not Outcome.FAILED
        )
        self._began = [change[0] for change in self._changes]

    def there(self, began: int, ended: int) -> bool | None:
        """Whether the row was there all the time, or not at all; None where that is not known."""
        after = bisect.bisect_right(self._began, ended)  # those behind began later
        if after == 0:
            return False
        _, done, inserts, outcome = self._changes[after - 1]
        if outcome is Outcome.UNKNOWN or done is None or done >= began:
            return None
        return inserts


def _check_scatter(
    scatter: Operation, keys: Sequence[int], lives: Mapping[int, _Life], report: Report
) -> None:
    assert scatter.ended is not None
    there, unsure = set(), set()
    for key in keys:
        life = lives.get(key)
        found = life.there(scatter.began, scatter.ended) if life is not None else False
        if found is None:
            unsure.add(key)
        elif found:
            there.add(key)
    report.rows_scattered += len(keys) - len(unsure)
    what = f"{scatter.kind} of band {scatter.key} at {scatter.began}"
    if not len(there) <= scatter.rows <= len(there) + len(unsure):
        report.add(f"{what}: {scatter.rows} rows, of {len(there)} to {len(there) + len(unsure)}")
    if scatter.kind is Kind.LIST:
        seen = set(scatter.keys)
        if len(seen) < len(scatter.keys):
            report.add(f"{what}: rows twice: {sorted(scatter.keys)}")
        if missed := there - seen:
            report.add(f"{what}: rows missed: {sorted(missed)}")
        if extra := seen - there - unsure:
            report.add(f"{what}: rows that were not there: {sorted(extra)}")
