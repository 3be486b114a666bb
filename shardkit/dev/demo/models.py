"""The demo's application: users, posts, comments, likes, as an application of shardkit would declare them.

Everything of a user lives with the user: posts, and the comments and likes that others leave under them. So a page
is read, and a post is deleted with all that hangs on it, on one shard. Driven by the clients of the demo.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, ForeignKeyConstraint, Index
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from shardkit import sharded


class Base(DeclarativeBase):
    """The demo's tables.

    ``revision`` of a row is the number of the client's write that made it what it is; ``writer`` the worker that alone
    writes a user and all below it, so that what it was told is the truth about those rows.
    """

    type_annotation_map = {int: BigInteger}  # noqa: RUF012


@sharded(by="id")
class User(Base):
    """An account."""

    __tablename__ = "users"
    __table_args__ = (Index("users_handle", "handle"), Index("users_writer", "writer"))

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    handle: Mapped[str]
    bio: Mapped[str]
    writer: Mapped[int]
    revision: Mapped[int]

    posts: Mapped[list[Post]] = relationship(
        back_populates="user", cascade="all, delete-orphan", order_by="Post.id"
    )


@sharded(by="user_id")
class Post(Base):
    """A picture with its caption."""

    __tablename__ = "posts"
    __table_args__ = (Index("posts_writer", "writer"),)

    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    caption: Mapped[str]
    writer: Mapped[int]
    revision: Mapped[int]

    user: Mapped[User] = relationship(back_populates="posts")
    comments: Mapped[list[Comment]] = relationship(back_populates="post", cascade="all, delete-orphan")
    likes: Mapped[list[Like]] = relationship(back_populates="post", cascade="all, delete-orphan")


@sharded(by="owner_id")
class Comment(Base):
    """What somebody wrote under a post of ``owner_id``."""

    __tablename__ = "comments"
    __table_args__ = (ForeignKeyConstraint(["owner_id", "post_id"], ["posts.user_id", "posts.id"]),)

    owner_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    post_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    author_id: Mapped[int]
    body: Mapped[str]
    revision: Mapped[int]

    post: Mapped[Post] = relationship(back_populates="comments")


@sharded(by="owner_id")
class Like(Base):
    """Somebody likes a post of ``owner_id``, once."""

    __tablename__ = "likes"
    __table_args__ = (ForeignKeyConstraint(["owner_id", "post_id"], ["posts.user_id", "posts.id"]),)

    owner_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    post_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    author_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    revision: Mapped[int]

    post: Mapped[Post] = relationship(back_populates="likes")


MODELS: dict[str, type[Base]] = {model.__tablename__: model for model in (User, Post, Comment, Like)}
"""By table name, parents first."""
