"""A worker: one user of the demo's application at a time, reading and writing through a session.

Each operation runs in a transaction of its own and returns the changes that it makes; the client that drives the
worker commits, and only then tells ledger and book. Reads are held against the book: a row of the worker's own must
be exactly what was acknowledged, and another's must never be older than it was seen before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from random import Random
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from .book import Book, Change
from .content import KEY_COLUMNS, Key, Layout, columns, row
from .models import MODELS, Base, Comment, Like, Post, User

FEED = 10
"""Posts on a page."""


class Worker:
    """What one worker knows and does: ``number`` is below ``layout.workers``, ``stale`` names the wrong reads."""

    def __init__(self, number: int, layout: Layout, seed: int) -> None:
        self.number = number
        self.layout = layout
        self.random = Random(f"{seed}/{number}")
        self.book = Book()
        self.stale: list[str] = []
        self._serial = count()
        self._revision = count(1)
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
                post = (user, next(self._revision))
                keys["posts"].append(post)
                keys["comments"] += [(*post, next(self._revision)) for _ in range(self.random.randint(0, 3))]
                authors = self.random.sample(range(1, self.layout.users + 1), k=self.random.randint(0, 4))
                keys["likes"] += [(*post, author) for author in authors]
        return {table: [row(self.layout, table, key, 0) for key in keys[table]] for table in keys}

    # --- what it does ----------------------------------------------------------------------------------------------

    def next_operation(self) -> Callable[[Session], list[Change]]:
        """What the user does next."""
        (operation,) = self.random.choices(_OPERATIONS, _WEIGHTS)
        return lambda session: list(operation(self, session))

    def committed(self, changes: list[Change]) -> None:
        """The changes of an operation were acknowledged."""
        self.book.apply(changes)

    def unknown(self, changes: list[Change]) -> None:
        """Whether these were committed is not known: the worker leaves those users alone from now on."""
        for user in {change.key[0] for change in changes}:
            self.book.apply(list(self.book.deletion("users", (user,))))
        self._certain = False

    def _any_user(self) -> int:
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

    def _expect(self, what: str, found: object, wanted: object) -> None:
        if found != wanted and self._certain:
            self.stale.append(f"{what}: {found!r} was read where {wanted!r} was acknowledged")

    # --- reads -----------------------------------------------------------------------------------------------------

    def profile(self, session: Session) -> Iterator[Change]:
        """A user by key: one's own, then somebody's, in one transaction."""
        for user in (self.book.some_user(self.random), self._any_user()):
            self.check("users", (user,), session.get(User, user))
        yield from ()

    def page(self, session: Session) -> Iterator[Change]:
        """A post by key, with its comments and likes."""
        key = self.book.some_key(self.random, "posts")
        if key is None:
            return
        post = session.get(Post, key)
        self.check("posts", key, post)
        if post is not None:
            self._expect(
                f"comments of {key}", {c.id for c in post.comments}, set(self.book.below("comments", key))
            )
            self._expect(
                f"likes of {key}", {like.author_id for like in post.likes}, set(self.book.below("likes", key))
            )
        yield from ()

    def feed(self, session: Session) -> Iterator[Change]:
        """The newest posts of somebody."""
        user = self.random.choice((self.book.some_user(self.random), self._any_user()))
        newest = select(Post).where(Post.user_id == user).order_by(Post.id.desc()).limit(FEED)
        posts = session.scalars(newest).all()
        for post in posts:
            self.check("posts", (user, post.id), post)
        if self.layout.writer(user) == self.number:
            known = sorted(self.book.below("posts", (user,)), reverse=True)[:FEED]
            self._expect(f"feed of {user}", [post.id for post in posts], known)
        yield from ()

    def lookup(self, session: Session) -> Iterator[Change]:
        """A user by name, which is no key: all shards are asked."""
        user = self.book.some_user(self.random)
        found = session.scalars(select(User).where(User.handle == f"user{user}")).all()
        self._expect(f"users named user{user}", [one.id for one in found], [user])
        yield from ()

    def statistics(self, session: Session) -> Iterator[Change]:
        """Counts over all shards; of the worker's own rows, as those of others change meanwhile."""
        users = session.scalar(select(func.count()).select_from(User).where(User.writer == self.number))
        self._expect("count of users", users, self.book.counts["users"])
        likes = select(func.count()).select_from(Like).join(Like.post).where(Post.writer == self.number)
        self._expect("count of likes", session.scalar(likes), self.book.counts["likes"])
        yield from ()

    # --- writes ----------------------------------------------------------------------------------------------------

    def _new(self, table: str, key: Key) -> tuple[Base, Change]:
        revision = next(self._revision)
        made = MODELS[table](**row(self.layout, table, key, revision))
        return made, Change(table, key, revision)

    def sign_up(self, session: Session) -> Iterator[Change]:
        """A new user, who posts at once."""
        user = self.layout.new_user(self.number, next(self._serial))
        account, change = self._new("users", (user,))
        yield change
        post, change = self._new("posts", (user, next(self._revision)))
        yield change
        account.posts.append(post)  # type: ignore[attr-defined]
        session.add(account)
        session.flush()

    def publish(self, session: Session) -> Iterator[Change]:
        """A new post."""
        post, change = self._new("posts", (self.book.some_user(self.random), next(self._revision)))
        session.add(post)
        session.flush()
        yield change

    def edit_profile(self, session: Session) -> Iterator[Change]:
        """Load a user, change it, flush."""
        key = (self.book.some_user(self.random),)
        yield from self._edit(session, "users", key)

    def edit_post(self, session: Session) -> Iterator[Change]:
        """Load a post, change it, flush."""
        key = self.book.some_key(self.random, "posts")
        if key is not None:
            yield from self._edit(session, "posts", key)

    def _edit(self, session: Session, table: str, key: Key) -> Iterator[Change]:
        found = session.get(MODELS[table], key)
        self.check(table, key, found)
        if found is None:
            return
        revision = next(self._revision)
        for name, value in columns(self.layout, table, key, revision).items():
            setattr(found, name, value)
        session.flush()
        yield Change(table, key, revision)

    def comment(self, session: Session) -> Iterator[Change]:
        """A comment under a post, through the relationship, and the post's answer to it."""
        key = self.book.some_key(self.random, "posts")
        post = None if key is None else session.get(Post, key)
        if key is None or post is None:
            return
        comment, change = self._new("comments", (*key, next(self._revision)))
        assert isinstance(comment, Comment)
        post.comments.append(comment)
        session.flush()
        yield change

    def edit_comment(self, session: Session) -> Iterator[Change]:
        """An UPDATE statement for one row."""
        key = self.book.some_key(self.random, "comments")
        if key is None:
            return
        revision = next(self._revision)
        where = [column == part for column, part in zip(Comment.__table__.primary_key, key, strict=True)]
        values = columns(self.layout, "comments", key, revision)
        done: Any = session.execute(update(Comment).where(*where).values(**values))
        self._expect(f"rows updated of comment {key}", done.rowcount, 1)
        yield Change("comments", key, revision)

    def like(self, session: Session) -> Iterator[Change]:
        """Somebody likes a post, in a savepoint, or takes it back."""
        key = self.book.some_key(self.random, "posts")
        if key is None:
            return
        key = (*key, self._any_user())
        if self.book.revision("likes", key) is not None:
            yield from self._delete(session, "likes", key)
            return
        like, change = self._new("likes", key)
        with session.begin_nested():
            session.add(like)
        yield change

    def like_by_many(self, session: Session) -> Iterator[Change]:
        """A bulk insert: several like a post at once."""
        key = self.book.some_key(self.random, "posts")
        if key is None:
            return
        known = self.book.below("likes", key)
        authors = [a for a in {self._any_user() for _ in range(5)} if a not in known]
        rows = [row(self.layout, "likes", (*key, author), next(self._revision)) for author in authors]
        if rows:
            session.execute(insert(Like), rows)
        yield from (Change("likes", (*key, one["author_id"]), one["revision"]) for one in rows)

    def delete_comment(self, session: Session) -> Iterator[Change]:
        """A comment is deleted through the unit of work."""
        key = self.book.some_key(self.random, "comments")
        if key is not None:
            yield from self._delete(session, "comments", key)

    def delete_likes(self, session: Session) -> Iterator[Change]:
        """A DELETE statement for all likes of a post."""
        key = self.book.some_key(self.random, "posts")
        if key is None:
            return
        changes = [Change("likes", (*key, author), None) for author in self.book.below("likes", key)]
        done: Any = session.execute(delete(Like).where(Like.owner_id == key[0], Like.post_id == key[1]))
        self._expect(f"likes deleted of {key}", done.rowcount, len(changes))
        yield from changes

    def delete_post(self, session: Session) -> Iterator[Change]:
        """A post goes, with its comments and likes."""
        key = self.book.some_key(self.random, "posts")
        if key is not None:
            yield from self._delete(session, "posts", key)

    def close_account(self, session: Session) -> Iterator[Change]:
        """A user goes, with everything."""
        if self.book.counts["users"] > 2:
            yield from self._delete(session, "users", (self.book.some_user(self.random),))

    def _delete(self, session: Session, table: str, key: Key) -> Iterator[Change]:
        found = session.get(MODELS[table], key)
        self.check(table, key, found)
        if found is not None:
            session.delete(found)
            session.flush()
            yield from self.book.deletion(table, key)


_MIX: dict[Callable[[Worker, Session], Iterator[Change]], int] = {
    Worker.profile: 18,
    Worker.page: 12,
    Worker.feed: 18,
    Worker.lookup: 2,
    Worker.statistics: 1,
    Worker.sign_up: 2,
    Worker.publish: 8,
    Worker.edit_profile: 5,
    Worker.edit_post: 8,
    Worker.comment: 8,
    Worker.edit_comment: 4,
    Worker.like: 8,
    Worker.like_by_many: 3,
    Worker.delete_comment: 3,
    Worker.delete_likes: 1,
    Worker.delete_post: 2,
    Worker.close_account: 1,
}
"""What users do, out of a hundred and a few."""
_OPERATIONS = tuple(_MIX)
_WEIGHTS = tuple(_MIX.values())
