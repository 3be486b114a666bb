"""Who posts what, and who says what to that.

Everything of a user lives on the shard of the user: his posts, and the comments and likes that others leave there. So a
page is read on one shard, whoever wrote on it. The four classes say so by their shard keys, which are all the id of
that user. On a plain database the decorators mean nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import DateTime, ForeignKey, ForeignKeyConstraint, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from shardkit import sharded, slot_id


def now() -> datetime:
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Ids are UUIDs that sort by the time they were made and carry where their row lives, so that
    ``session.get(Post, id)`` asks one shard."""

    type_annotation_map = {datetime: DateTime(timezone=True)}  # noqa: RUF012


@sharded(by="name")
class Username(Base):
    """A name that is taken.

    It lives where its name says and not with its user, so that there is one place where a name can be taken: the
    primary key on the shard of the name. It is written in one transaction with the user.
    """

    __tablename__ = "usernames"

    name: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[UUID]


@sharded(by="id")
class User(Base):
    __tablename__ = "users"

    id: Mapped[UUID] = mapped_column(primary_key=True, default=slot_id())
    name: Mapped[str]
    password: Mapped[str]
    """As `passwords.hashed` made it."""
    bio: Mapped[str] = mapped_column(default="")
    joined: Mapped[datetime] = mapped_column(default=now)

    posts: Mapped[list[Post]] = relationship(back_populates="user", order_by="Post.id.desc()")


@sharded(by="user_id")
class Post(Base):
    __tablename__ = "posts"
    __table_args__ = (UniqueConstraint("user_id", "id"),)

    id: Mapped[UUID] = mapped_column(primary_key=True, default=slot_id())
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id"))
    text: Mapped[str]
    made: Mapped[datetime] = mapped_column(default=now)

    user: Mapped[User] = relationship(back_populates="posts")
    comments: Mapped[list[Comment]] = relationship(back_populates="post", order_by="Comment.id")
    likes: Mapped[list[Like]] = relationship(back_populates="post")


@sharded(by="owner_id")
class Comment(Base):
    """What ``author_id`` wrote under a post of ``owner_id``."""

    __tablename__ = "comments"
    __table_args__ = (ForeignKeyConstraint(["owner_id", "post_id"], ["posts.user_id", "posts.id"]),)

    owner_id: Mapped[UUID] = mapped_column(primary_key=True)
    post_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True, default=slot_id())
    author_id: Mapped[UUID]
    text: Mapped[str]
    made: Mapped[datetime] = mapped_column(default=now)

    post: Mapped[Post] = relationship(back_populates="comments")


@sharded(by="owner_id")
class Like(Base):
    """``user_id`` likes a post of ``owner_id``, once."""

    __tablename__ = "likes"
    __table_args__ = (ForeignKeyConstraint(["owner_id", "post_id"], ["posts.user_id", "posts.id"]),)

    owner_id: Mapped[UUID] = mapped_column(primary_key=True)
    post_id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(primary_key=True)

    post: Mapped[Post] = relationship(back_populates="likes")
