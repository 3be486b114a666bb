"""What the users of the demo's application do: reads and writes through the session, as an application has them.

Each operation runs in a transaction of its own, which the client commits, and returns the changes that it makes.
Every row that is read is held against what the worker knows; a read that is wrong is noted there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session, joinedload, selectinload

from .book import Change
from .content import Key, columns, row
from .models import MODELS, Base, Comment, Like, Post, User
from .worker import Worker

Operation = Callable[[Worker, Session], list[Change]]

FEED = 10
"""Posts of a feed."""


def next_operation(worker: Worker) -> Operation:
    """What a user does next."""
    (operation,) = worker.random.choices(_OPERATIONS, _WEIGHTS)
    return operation


# --- reads ------------------------------------------------------------------------------------------------------


def profile(worker: Worker, session: Session) -> list[Change]:
    """A user by key: one's own, then somebody's, in one transaction."""
    for user in (worker.book.some_user(worker.random), worker.any_user()):
        worker.check("users", (user,), session.get(User, user))
    return []


def page(worker: Worker, session: Session) -> list[Change]:
    """A post by key with its likes in a join, its comments loaded when they are touched, and who wrote those."""
    key = worker.book.some_key(worker.random, "posts")
    post = None if key is None else session.get(Post, key, options=[joinedload(Post.likes)])
    if key is None:
        return []
    worker.check("posts", key, post)
    if post is not None:
        worker.expect(
            f"likes of {key}", {one.author_id for one in post.likes}, {*worker.book.below("likes", key)}
        )
        for comment in post.comments:
            worker.check("comments", (*key, comment.id), comment)
        worker.expect(
            f"comments of {key}", {one.id for one in post.comments}, {*worker.book.below("comments", key)}
        )
        authors = {comment.author_id for comment in post.comments}
        for user in session.scalars(select(User).where(User.id.in_(authors))):
            worker.check("users", (user.id,), user)
    return []


def feed(worker: Worker, session: Session) -> list[Change]:
    """The newest posts of somebody, with their comments and the number of likes."""
    user = worker.random.choice((worker.book.some_user(worker.random), worker.any_user()))
    likes = (
        select(func.count()).where(Like.owner_id == Post.user_id, Like.post_id == Post.id).scalar_subquery()
    )
    newest = select(Post, likes).where(Post.user_id == user).order_by(Post.id.desc()).limit(FEED)
    found = session.execute(newest.options(selectinload(Post.comments))).all()
    for post, _ in found:
        worker.check("posts", (user, post.id), post)
    if worker.layout.writer(user) == worker.number:
        known = sorted(worker.book.below("posts", (user,)), reverse=True)[:FEED]
        numbers = [(post.id, len(post.comments), count) for post, count in found]
        worker.expect(
            f"feed of {user}",
            numbers,
            [
                (post, *(len(worker.book.below(below, (user, post))) for below in ("comments", "likes")))
                for post in known
            ],
        )
    return []


def lookup(worker: Worker, session: Session) -> list[Change]:
    """A user by name, which is no key: all shards are asked."""
    user = worker.book.some_user(worker.random)
    found = session.scalars(select(User).where(User.handle == f"user{user}")).all()
    worker.expect(f"users named user{user}", [one.id for one in found], [user])
    return []


def statistics(worker: Worker, session: Session) -> list[Change]:
    """Counts over all shards; of the worker's own rows, as those of others change meanwhile."""
    users = session.scalar(select(func.count()).select_from(User).where(User.writer == worker.number))
    worker.expect("count of users", users, worker.book.counts["users"])
    likes = select(func.count()).select_from(Like).join(Like.post).where(Post.writer == worker.number)
    worker.expect("count of likes", session.scalar(likes), worker.book.counts["likes"])
    return []


# --- writes: the unit of work -----------------------------------------------------------------------------------


def sign_up(worker: Worker, session: Session) -> list[Change]:
    """A new user, who posts at once."""
    user = worker.layout.new_user(worker.number, next(worker.serials))
    account, first = _new(worker, "users", (user,))
    post, second = _new(worker, "posts", (user, next(worker.revisions)))
    assert isinstance(account, User)
    assert isinstance(post, Post)
    account.posts.append(post)
    session.add(account)
    session.flush()
    return [first, second]


def publish(worker: Worker, session: Session) -> list[Change]:
    """A new post."""
    post, change = _new(worker, "posts", (worker.book.some_user(worker.random), next(worker.revisions)))
    session.add(post)
    session.flush()
    return [change]


def edit_profile(worker: Worker, session: Session) -> list[Change]:
    """Load a user, change it, flush."""
    return _edit(worker, session, "users", (worker.book.some_user(worker.random),))


def edit_post(worker: Worker, session: Session) -> list[Change]:
    """Load a post, change it, flush."""
    return _edit(worker, session, "posts", worker.book.some_key(worker.random, "posts"))


def comment(worker: Worker, session: Session) -> list[Change]:
    """A comment, through the relationship of its post."""
    key = worker.book.some_key(worker.random, "posts")
    post = None if key is None else session.get(Post, key)
    if key is None or post is None:
        return []
    made, change = _new(worker, "comments", (*key, next(worker.revisions)))
    assert isinstance(made, Comment)
    post.comments.append(made)
    session.flush()
    return [change]


def like(worker: Worker, session: Session) -> list[Change]:
    """Somebody likes a post, in a savepoint, or takes it back."""
    post = worker.book.some_key(worker.random, "posts")
    if post is None:
        return []
    key = (*post, worker.any_user())
    if worker.book.revision("likes", key) is not None:
        return _delete(worker, session, "likes", key)
    made, change = _new(worker, "likes", key)
    with session.begin_nested():
        session.add(made)
    return [change]


def delete_comment(worker: Worker, session: Session) -> list[Change]:
    """A comment goes."""
    return _delete(worker, session, "comments", worker.book.some_key(worker.random, "comments"))


def delete_post(worker: Worker, session: Session) -> list[Change]:
    """A post goes, with its comments and likes."""
    return _delete(worker, session, "posts", worker.book.some_key(worker.random, "posts"))


def close_account(worker: Worker, session: Session) -> list[Change]:
    """A user goes, with everything."""
    if worker.book.counts["users"] <= 2:
        return []
    return _delete(worker, session, "users", (worker.book.some_user(worker.random),))


def _new(worker: Worker, table: str, key: Key) -> tuple[Base, Change]:
    revision = next(worker.revisions)
    return MODELS[table](**row(worker.layout, table, key, revision)), Change(table, key, revision)


def _edit(worker: Worker, session: Session, table: str, key: Key | None) -> list[Change]:
    if key is None:
        return []
    found = session.get(MODELS[table], key)
    worker.check(table, key, found)
    if found is None:
        return []
    revision = next(worker.revisions)
    for name, value in columns(worker.layout, table, key, revision).items():
        setattr(found, name, value)
    session.flush()
    return [Change(table, key, revision)]


def _delete(worker: Worker, session: Session, table: str, key: Key | None) -> list[Change]:
    if key is None:
        return []
    found = session.get(MODELS[table], key)
    worker.check(table, key, found)
    if found is None:
        return []
    session.delete(found)
    session.flush()
    return list(worker.book.deletion(table, key))


# --- writes: statements -----------------------------------------------------------------------------------------


def edit_comment(worker: Worker, session: Session) -> list[Change]:
    """An UPDATE of one row."""
    key = worker.book.some_key(worker.random, "comments")
    if key is None:
        return []
    change = Change("comments", key, next(worker.revisions))
    where = [column == part for column, part in zip(Comment.__table__.primary_key, key, strict=True)]
    values = columns(worker.layout, "comments", key, change.revision or 0)
    done: Any = session.execute(update(Comment).where(*where).values(**values))
    worker.expect(f"rows updated of comment {key}", done.rowcount, 1)
    return [change]


def like_by_many(worker: Worker, session: Session) -> list[Change]:
    """A bulk insert: several like a post at once."""
    key = worker.book.some_key(worker.random, "posts")
    if key is None:
        return []
    known = worker.book.below("likes", key)
    authors = sorted({worker.any_user() for _ in range(5)} - known.keys())
    rows = [row(worker.layout, "likes", (*key, author), next(worker.revisions)) for author in authors]
    if rows:
        session.execute(insert(Like), rows)
    return [Change("likes", (*key, one["author_id"]), one["revision"]) for one in rows]


def delete_likes(worker: Worker, session: Session) -> list[Change]:
    """A DELETE of all likes of a post."""
    key = worker.book.some_key(worker.random, "posts")
    if key is None:
        return []
    changes = [Change("likes", (*key, author), None) for author in worker.book.below("likes", key)]
    done: Any = session.execute(delete(Like).where(Like.owner_id == key[0], Like.post_id == key[1]))
    worker.expect(f"likes deleted of {key}", done.rowcount, len(changes))
    return changes


_MIX: dict[Operation, int] = {
    profile: 18,
    page: 12,
    feed: 18,
    lookup: 2,
    statistics: 1,
    sign_up: 2,
    publish: 8,
    edit_profile: 5,
    edit_post: 8,
    comment: 8,
    edit_comment: 4,
    like: 8,
    like_by_many: 3,
    delete_comment: 3,
    delete_likes: 1,
    delete_post: 2,
    close_account: 1,
}
"""How often each happens, among a hundred or so."""
_OPERATIONS = tuple(_MIX)
_WEIGHTS = tuple(_MIX.values())
