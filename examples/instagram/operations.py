"""What users do, as plain functions over a session.

The session is SQLAlchemy's: on one database or over shards, and inside an asynchronous one by ``run_sync``. Nothing
here knows which, and nothing here commits: whoever calls owns the transaction, as ``with Session.begin() as session``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from .models import Comment, Like, Post, User, Username

PAGE = 20


class NameTaken(Exception):
    """Somebody has this name already."""


class NotFound(Exception):
    """There is no such user, or no such post."""


class PostView(NamedTuple):
    """A post as a page shows it."""

    post: Post
    author: str
    comments: int
    likes: int


class CommentView(NamedTuple):
    """A comment with the name of who wrote it."""

    comment: Comment
    author: str


# --- users ---------------------------------------------------------------------------------------------------------


def add_user(session: Session, name: str, password: str) -> User:
    """A new user, with the password hashed already. Raises `NameTaken`.

    Two rows that mostly live on two shards: a session over shards needs the mode "two_phase" for it, which writes both
    or none. Of two who want a name at the same time, the second waits at the primary key until the first is done.
    """
    user = User(name=name, password=password)
    session.add(user)
    session.flush()  # gives the id
    session.add(Username(name=name, user_id=user.id))
    try:
        session.flush()
    except IntegrityError as error:
        raise NameTaken(name) from error
    return user


def user_named(session: Session, name: str) -> User:
    """Asks the shard of the name, then that of the user. Raises `NotFound`."""
    taken = session.get(Username, name)
    user = None if taken is None else session.get(User, taken.user_id)
    if user is None:
        raise NotFound(f"there is no user {name}")
    return user


def profile(session: Session, name: str) -> tuple[User, int]:
    """A user, and how many posts there are of his."""
    user = user_named(session, name)
    posts = session.scalar(select(func.count()).select_from(Post).where(Post.user_id == user.id))
    return user, posts or 0


def edit_bio(session: Session, user_id: UUID, bio: str) -> User:
    """Raises `NotFound`."""
    user = session.get(User, user_id)
    if user is None:
        raise NotFound("this user is gone")
    user.bio = bio
    return user


# --- posts ---------------------------------------------------------------------------------------------------------


def add_post(session: Session, user_id: UUID, text: str) -> Post:
    post = Post(user_id=user_id, text=text)
    session.add(post)
    session.flush()
    return post


def get_post(session: Session, post_id: UUID) -> Post:
    """One shard: the id says which. Raises `NotFound`."""
    post = session.get(Post, post_id)
    if post is None:
        raise NotFound(f"there is no post {post_id}")
    return post


def view_post(session: Session, post_id: UUID) -> PostView:
    """A post with its numbers. Raises `NotFound`."""
    found = _views(session, Post.id == post_id, limit=1)
    if not found:
        raise NotFound(f"there is no post {post_id}")
    return found[0]


def posts_by_user(session: Session, user_id: UUID, before: UUID | None = None) -> Sequence[PostView]:
    """A page of somebody's posts, the newest first. One shard."""
    return _views(session, Post.user_id == user_id, before=before)


def feed(session: Session, before: UUID | None = None) -> Sequence[PostView]:
    """A page of everybody's posts, the newest first: each shard gives its newest, and the newest of these are taken."""
    return _views(session, before=before)


def _views(
    session: Session, *conditions: Any, before: UUID | None = None, limit: int = PAGE
) -> Sequence[PostView]:
    comments = (
        select(func.count())
        .where(Comment.owner_id == Post.user_id, Comment.post_id == Post.id)
        .scalar_subquery()
    )
    likes = (
        select(func.count()).where(Like.owner_id == Post.user_id, Like.post_id == Post.id).scalar_subquery()
    )
    statement = (
        select(Post, User.name, comments, likes)
        .join(Post.user)
        .where(*conditions)
        .order_by(Post.id.desc())
        .limit(limit)
    )
    if before is not None:
        statement = statement.where(Post.id < before)
    return [PostView(*row) for row in session.execute(statement)]


# --- comments ------------------------------------------------------------------------------------------------------


def comment(session: Session, author_id: UUID, post_id: UUID, text: str) -> Comment:
    """Lives with the post, whoever wrote it. Raises `NotFound`."""
    made = Comment(author_id=author_id, text=text, post=get_post(session, post_id))
    session.add(made)
    session.flush()
    return made


def comments_by_post(session: Session, post_id: UUID) -> Sequence[CommentView]:
    """All of them, the oldest first: one shard, and then those of the authors. Raises `NotFound`."""
    comments = get_post(session, post_id).comments
    names = _names(session, (comment.author_id for comment in comments))
    return [CommentView(comment, names[comment.author_id]) for comment in comments]


# --- likes ---------------------------------------------------------------------------------------------------------


def like(session: Session, user_id: UUID, post_id: UUID) -> None:
    """As often as one likes; it counts once. Raises `NotFound`."""
    post = get_post(session, post_id)
    session.execute(
        insert(Like)
        .values(owner_id=post.user_id, post_id=post.id, user_id=user_id)
        .on_conflict_do_nothing(index_elements=["owner_id", "post_id", "user_id"])
    )


def unlike(session: Session, user_id: UUID, post_id: UUID) -> None:
    """Raises `NotFound`."""
    post = get_post(session, post_id)
    session.execute(
        delete(Like).where(Like.owner_id == post.user_id, Like.post_id == post.id, Like.user_id == user_id)
    )


def likes_by_post(session: Session, post_id: UUID) -> Sequence[str]:
    """The names of those who like it. Raises `NotFound`."""
    return sorted(_names(session, (like.user_id for like in get_post(session, post_id).likes)).values())


def _names(session: Session, ids: Iterable[UUID]) -> dict[UUID, str]:
    """Of users, each by the shard that he lives on."""
    found = session.execute(select(User.id, User.name).where(User.id.in_(set(ids))))
    return {row.id: row.name for row in found}
