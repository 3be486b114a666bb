"""A worker: what one user of the demo's application after another has been told, and whether that was right.

The client that drives it tells it what was committed; `operations` asks it what to do and shows it what was read. A
row of the worker's own must be exactly what was acknowledged, and another's never older than it was seen before.
Never touches a database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from random import Random
from typing import Any

from .book import Book, Change
from .content import KEY_COLUMNS, Key, Layout, columns, row
from .models import Base


class Worker:
    """What one worker knows: ``number`` is below ``layout.workers``, ``stale`` names the wrong reads.

    ``serials`` number its new users, ``revisions`` its writes and all else that it makes.
    """

    def __init__(self, number: int, layout: Layout, seed: int) -> None:
        self.number = number
        self.layout = layout
        self.random = Random(f"{seed}/{number}")
        self.book = Book()
        self.stale: list[str] = []
        self.serials = count()
        self.revisions = count(1)
        self._seen: dict[tuple[str, Key], int] = {}
        self._certain = True

    # --- the beginning ---------------------------------------------------------------------------------------------

    def loads(self, owner: Callable[[int], int], chunk: int) -> Iterator[dict[str, list[dict[str, Any]]]]:
        """The rows the worker starts with, by table, parents first, in transactions of ``chunk`` users of one owner."""
        groups: dict[int, list[int]] = {}
        for user in self.layout.first_users(self.number):
            groups.setdefault(owner(user), []).append(user)
        for users in groups.values():
            for first in range(0, len(users), chunk):
                yield self._load(users[first : first + chunk])

    def _load(self, users: list[int]) -> dict[str, list[dict[str, Any]]]:
        keys: dict[str, list[Key]] = {table: [] for table in KEY_COLUMNS}
        for user in users:
            keys["users"].append((user,))
            for _ in range(self.random.randint(2, 6)):
                post = (user, next(self.revisions))
                keys["posts"].append(post)
                keys["comments"] += [(*post, next(self.revisions)) for _ in range(self.random.randint(0, 3))]
                authors = self.random.sample(range(1, self.layout.users + 1), k=self.random.randint(0, 4))
                keys["likes"] += [(*post, author) for author in authors]
        return {table: [row(self.layout, table, key, 0) for key in keys[table]] for table in keys}

    # --- what it is told -------------------------------------------------------------------------------------------

    def committed(self, changes: list[Change]) -> None:
        """The changes of an operation were acknowledged."""
        self.book.apply(changes)

    def unknown(self, changes: list[Change]) -> None:
        """Whether these were committed is not known: the worker leaves those users alone from now on."""
        for user in {change.key[0] for change in changes}:
            self.book.apply(list(self.book.deletion("users", (user,))))
        self._certain = False

    def any_user(self) -> int:
        """A user of anybody's; some are read far more often than others."""
        return 1 + int(self.layout.users * self.random.random() ** 2)

    # --- checks of what was read -----------------------------------------------------------------------------------

    def check(self, table: str, key: Key, found: Base | None) -> None:
        """A row that was read by its key. ``found`` is none where there was none."""
        seen = None if found is None else found.revision  # type: ignore[attr-defined]
        if self.layout.writer(key[0]) != self.number:
            self._check_progress(table, key, seen)
        elif seen != (known := self.book.revision(table, key)) and (self._certain or known is not None):
            self.stale.append(f"{table} {key} was read at revision {seen} after {known} was acknowledged")
        if found is not None and seen is not None:
            wanted = columns(self.layout, table, key, seen)
            if any(getattr(found, name) != value for name, value in wanted.items()):
                self.stale.append(f"{table} {key} was read with columns that are not of its revision {seen}")

    def _check_progress(self, table: str, key: Key, seen: int | None) -> None:
        """A row that another worker writes never goes back."""
        if seen is None:
            return
        before = self._seen.get((table, key), 0)
        if seen < before:
            self.stale.append(f"{table} {key} was read at revision {seen} after it had been at {before}")
        self._seen[table, key] = seen

    def expect(self, what: str, found: object, wanted: object) -> None:
        """Something that was read of the worker's own rows, and what it must be."""
        if found != wanted and self._certain:
            self.stale.append(f"{what}: {found!r} was read where {wanted!r} was acknowledged")
