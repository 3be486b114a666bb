"""The operations of the Instagram example: the same functions on one database and over shards, by sync and async
sessions. Only the lines of the fixture `place` differ.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Protocol, TypeVar
from uuid import UUID, uuid4

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker

import shardkit
from examples.instagram import operations, storage
from examples.instagram.operations import NameTaken, NotFound
from tests.fix_instagram import SHARDS, rows

T = TypeVar("T")


class Place(Protocol):
    def __call__(self, operation: Callable[..., T], *args: Any) -> T: ...


@contextmanager
def sync_sessions(sessions: sessionmaker[Any]) -> Iterator[Place]:
    def run(operation: Callable[..., T], *args: Any) -> T:
        with sessions.begin() as session:
            return operation(session, *args)

    yield run


@contextmanager
def async_sessions(make: Callable[[], storage.Storage]) -> Iterator[Place]:
    with asyncio.Runner() as runner:
        made = make()
        yield lambda operation, *args: runner.run(made.run(operation, *args))
        runner.run(made.close())


@pytest.fixture(params=["plain", "sharded"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["sync", "async"])
def place(kind: str, request: pytest.FixtureRequest, empty_instagram: dict[str, str]) -> Iterator[Place]:
    """`place(operation, *args)`: what an operation returns, committed."""
    with ExitStack() as ends:
        if request.param == "async" and kind == "plain":
            yield ends.enter_context(async_sessions(lambda: storage.plain(empty_instagram["plain"])))
        elif request.param == "async":
            yield ends.enter_context(async_sessions(lambda: storage.sharded(empty_instagram["catalog"])))
        elif kind == "plain":
            engine = create_engine(storage.driver_url(empty_instagram["plain"]))
            ends.callback(engine.dispose)
            yield ends.enter_context(sync_sessions(sessionmaker(engine, expire_on_commit=False)))
        else:
            cluster = ends.enter_context(shardkit.connect(empty_instagram["catalog"]))
            sessions = cluster.sessionmaker(mode="two_phase", expire_on_commit=False)
            yield ends.enter_context(sync_sessions(sessions))


def test_everything_that_users_do(place: Place) -> None:
    ada, bob, eve = (place(operations.add_user, name, "hash") for name in ("ada", "bob", "eve"))
    first, second = (place(operations.add_post, ada.id, text) for text in ("first", "second"))
    third = place(operations.add_post, bob.id, "third")
    for user, text in ((bob, "well"), (eve, "said"), (ada, "thanks")):
        place(operations.comment, user.id, first.id, text)
    for user in (eve, bob, eve):
        place(operations.like, user.id, first.id)
    place(operations.like, ada.id, third.id)
    place(operations.like, eve.id, third.id)
    place(operations.unlike, eve.id, third.id)
    place(operations.edit_bio, ada.id, "analyst")

    user, posts = place(operations.profile, "ada")
    assert (user.id, user.name, user.bio, posts) == (ada.id, "ada", "analyst", 2)
    assert shown(place(operations.posts_by_user, ada.id)) == [("second", "ada", 0, 0), ("first", "ada", 3, 2)]
    assert shown(place(operations.feed)) == [
        ("third", "bob", 0, 1),
        ("second", "ada", 0, 0),
        ("first", "ada", 3, 2),
    ]
    assert shown(place(operations.feed, second.id)) == [("first", "ada", 3, 2)]
    assert shown([place(operations.view_post, first.id)]) == [("first", "ada", 3, 2)]
    comments = place(operations.comments_by_post, first.id)
    assert [(comment.text, author) for comment, author in comments] == [
        ("well", "bob"),
        ("said", "eve"),
        ("thanks", "ada"),
    ]
    assert place(operations.likes_by_post, first.id) == ["bob", "eve"]
    assert place(operations.likes_by_post, second.id) == []


def shown(views: Any) -> list[tuple[str, str, int, int]]:
    return [(view.post.text, view.author, view.comments, view.likes) for view in views]


def test_the_feed_comes_in_pages(place: Place) -> None:
    users = [place(operations.add_user, f"user{number}", "hash") for number in range(7)]
    made = [place(operations.add_post, users[number % 7].id, str(number)) for number in range(45)]
    newest = sorted((post.id for post in made), reverse=True)
    pages: list[list[UUID]] = []
    while not pages or pages[-1]:
        before = pages[-1][-1] if pages else None
        pages.append([view.post.id for view in place(operations.feed, before)])
    assert [len(page) for page in pages] == [20, 20, 5, 0]
    assert [post for page in pages for post in page] == newest


def test_a_name_is_taken_once(place: Place) -> None:
    ada = place(operations.add_user, "ada", "hash")
    with pytest.raises(NameTaken, match="ada"):
        place(operations.add_user, "ada", "other")
    assert place(operations.user_named, "ada").id == ada.id
    assert place(operations.user_named, "ada").password == "hash"


def test_what_is_not_there_is_not_found(place: Place) -> None:
    with pytest.raises(NotFound, match="nobody"):
        place(operations.user_named, "nobody")
    for operation in (operations.view_post, operations.comments_by_post, operations.likes_by_post):
        with pytest.raises(NotFound):
            place(operation, uuid4())
    with pytest.raises(NotFound):
        place(operations.comment, uuid4(), uuid4(), "text")
    with pytest.raises(NotFound):
        place(operations.like, uuid4(), uuid4())


def test_of_two_at_the_same_time_one_gets_the_name(kind: str, empty_instagram: dict[str, str]) -> None:
    """The second waits at the primary key for the first, wherever their users live."""
    with ExitStack() as ends:
        sessions: sessionmaker[Any]
        if kind == "plain":
            engine = create_engine(storage.driver_url(empty_instagram["plain"]))
            ends.callback(engine.dispose)
            sessions = sessionmaker(engine)
        else:
            sessions = ends.enter_context(shardkit.connect(empty_instagram["catalog"])).sessionmaker(
                mode="two_phase"
            )

        def register(_: int) -> bool:
            try:
                with sessions.begin() as session:
                    operations.add_user(session, "ada", "hash")
            except NameTaken:
                return False
            return True

        with ThreadPoolExecutor(8) as threads:
            assert sorted(threads.map(register, range(8))) == [False] * 7 + [True]
    names = ["plain"] if kind == "plain" else SHARDS
    assert sum(rows(empty_instagram[name], "users") for name in names) == 1
    assert sum(rows(empty_instagram[name], "usernames") for name in names) == 1


def test_everything_of_a_post_is_on_one_shard(empty_instagram: dict[str, str]) -> None:
    with shardkit.connect(empty_instagram["catalog"]) as cluster:
        sessions = cluster.sessionmaker(mode="two_phase", expire_on_commit=False)

        def asked(operation: Callable[..., Any], *args: Any) -> int:
            """The number of shards that an operation asks."""
            with sessions.begin() as session:
                operation(session, *args)
                return len(session.shards.scope.participants)

        with sessions.begin() as session:
            users = [operations.add_user(session, f"user{number}", "hash") for number in range(30)]
        assert rows(empty_instagram["one"], "users") > 3
        assert rows(empty_instagram["two"], "users") > 3
        for user, guest in pairwise(users):
            with sessions.begin() as session:
                post = operations.add_post(session, user.id, "text")
            assert asked(operations.comment, guest.id, post.id, "text") == 1
            assert asked(operations.like, guest.id, post.id) == 1
            assert asked(operations.view_post, post.id) == 1
            assert asked(operations.posts_by_user, user.id) == 1
            assert asked(operations.edit_bio, user.id, "bio") == 1
            assert (
                asked(lambda session, key: operations.get_post(session, key).comments[0].post.user, post.id)
                == 1
            )
        assert asked(operations.feed) == len(cluster.topology.shards)
        assert asked(operations.comments_by_post, post.id) <= 2
