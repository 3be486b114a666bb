"""What stands in the demo's rows: a pure function of table, key and revision.

So a ledger needs to keep revisions only, and the end check compares every column of every row all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

Key = tuple[int, ...]

KEY_COLUMNS: dict[str, tuple[str, ...]] = {
    "users": ("id",),
    "posts": ("user_id", "id"),
    "comments": ("owner_id", "post_id", "id"),
    "likes": ("owner_id", "post_id", "author_id"),
}
"""The primary key of each table, parents first. The first column is the shard key."""

# Bytes that are trouble wherever they are not passed as parameters.
_WORDS = (
    "sunset", "over", "the", "harbour", "café", "morning", "O'Hara", "50%", "🌅", "日の出", "naïve", "friends",
    "back\\slash", '"quoted"', "coffee", "ride", "two\nlines", "tab\there", "golden", "hour", "{curly}", "🐈‍⬛",
    "street", "ελιά", ":colon", "%s", "new", "day", "$1", "--", "winter", "again",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """How the demo's users are numbered: 1 to ``users`` at first; of ``workers`` each writes those that fall to it."""

    users: int
    workers: int

    def writer(self, user: int) -> int:
        """The worker that alone writes a user and everything below."""
        return user % self.workers

    def new_user(self, worker: int, serial: int) -> int:
        """An id that no other worker uses, another for each ``serial`` (0 and up)."""
        first = self.users + 1
        return first + (worker - first) % self.workers + serial * self.workers

    def first_users(self, worker: int) -> range:
        """The users a worker has at first."""
        return range(1 + (worker - 1) % self.workers, self.users + 1, self.workers)


def columns(layout: Layout, table: str, key: Key, revision: int) -> dict[str, Any]:
    """The columns of a row, those of the primary key left out."""
    if table == "users":
        return {
            "handle": f"user{key[0]}",
            "bio": _text(table, key, revision, 6),
            "writer": layout.writer(key[0]),
            "revision": revision,
        }
    if table == "posts":
        text = _text(table, key, revision, 16)
        return {"caption": text, "writer": layout.writer(key[0]), "revision": revision}
    if table == "comments":
        author = 1 + crc32(repr(key).encode()) % layout.users
        return {"author_id": author, "body": _text(table, key, revision, 10), "revision": revision}
    return {"revision": revision}


def row(layout: Layout, table: str, key: Key, revision: int) -> dict[str, Any]:
    """A whole row by column name."""
    return {
        **dict(zip(KEY_COLUMNS[table], key, strict=True)),
        **columns(layout, table, key, revision),
    }


def _text(table: str, key: Key, revision: int, words: int) -> str:
    """About ``words`` words that are others for every other argument."""
    label = f"{table} {key} {revision}"
    number = crc32(label.encode())
    chosen = (_WORDS[(number >> shift) % len(_WORDS)] for shift in range(words))
    return f"{label}: {' '.join(chosen)}"
