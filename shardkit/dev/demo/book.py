"""What one worker has been told is committed: the rows below its users, by key and revision.

A worker writes before it knows, and enters here what the database acknowledged; no one else writes these rows, so
what it reads must be what stands here. Pure: the ledger keeps the same on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import NamedTuple

from .content import Key

_CHILDREN: dict[str, tuple[str, ...]] = {"users": ("posts",), "posts": ("comments", "likes")}


class Change(NamedTuple):
    """A row was written as ``revision``, or deleted (None)."""

    table: str
    key: Key
    revision: int | None


class Book:
    """The acknowledged rows of one worker."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._rows: dict[str, dict[Key, dict[int, int]]] = {}
        self._users: list[int] = []
        self._places: dict[int, int] = {}

    def apply(self, changes: Iterable[Change]) -> None:
        """These changes were committed, in this order."""
        for table, key, revision in changes:
            siblings = self._rows.setdefault(table, {}).setdefault(key[:-1], {})
            known = key[-1] in siblings
            if revision is not None:
                siblings[key[-1]] = revision
                self.counts[table] += not known
            elif known:
                del siblings[key[-1]]
                self.counts[table] -= 1
            if table == "users" and known != (revision is not None):
                self._list_user(key[0], revision is not None)

    def _list_user(self, user: int, there: bool) -> None:
        if there:
            self._places[user] = len(self._users)
            self._users.append(user)
            return
        place, last = self._places.pop(user), self._users.pop()
        if last != user:
            self._users[place], self._places[last] = last, place

    def revision(self, table: str, key: Key) -> int | None:
        """The revision of a row; None if it is not there."""
        return self.below(table, key[:-1]).get(key[-1])

    def below(self, table: str, parent: Key) -> Mapping[int, int]:
        """The rows of ``table`` under a parent: last part of the key to revision."""
        return self._rows.get(table, {}).get(parent, {})

    def deletion(self, table: str, key: Key) -> Iterator[Change]:
        """The changes that deleting a row makes, with everything below it."""
        for child in _CHILDREN.get(table, ()):
            for last in tuple(self.below(child, key)):
                yield from self.deletion(child, (*key, last))
        yield Change(table, key, None)

    def some_user(self, random: Random) -> int:
        """One of the worker's users."""
        return random.choice(self._users)

    def some_key(self, random: Random, table: str) -> Key | None:
        """One of the worker's rows of a table; None where the user that was met has none."""
        key: Key = (self.some_user(random),)
        for level in ("posts", table)[: 1 if table == "posts" else 2]:
            rows = tuple(self.below(level, key))
            if not rows:
                return None
            key = (*key, random.choice(rows))
        return key
