"""Partial answers: a scatter that leaves out shards which do not answer, and says which.

Only by the execution option ``partial``, of a statement or a call. ``partial=True`` warns whenever something is
missing; ``partial=missing``, with a `MissingShards`, notes it there for the program. Driven by the session.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from shardkit.core.errors import UsageError

OPTION = "partial"


class PartialResultWarning(UserWarning):
    """A statement with ``partial=True`` was answered without the rows of some shards."""


class MissingShards(Collection[str]):
    """The names of the shards whose rows are missing in the answers of the statements it was given to; false if
    there are none."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        return f"MissingShards({sorted(self._names)})"

    def note(self, names: Collection[str]) -> None:
        """Shards that did not answer."""
        self._names.update(names)


Missing = MissingShards | Literal[True] | None
"""How shards that were left out are reported; None where none may be."""


def wanted(options: Mapping[str, Any]) -> Missing:
    """The option of a statement or call; `UsageError` for what it cannot be."""
    given = options.get(OPTION)
    if given is None or given is False:
        return None
    if given is True or isinstance(given, MissingShards):
        return given
    raise UsageError(
        f"The execution option partial cannot be {given!r}.",
        hint="It is True, or a shardkit.MissingShards() that notes the shards which did not answer.",
    )


def report(missing: Missing, names: Collection[str]) -> None:
    """Tell what is missing."""
    if isinstance(missing, MissingShards):
        missing.note(names)
        return
    warnings.warn(
        f"The answer lacks the rows of {', '.join(sorted(names))}: not reachable.",
        PartialResultWarning,
        stacklevel=2,
    )
