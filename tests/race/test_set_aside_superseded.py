"""Indexes that are set aside, and a mover that was superseded without noticing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shardkit.core.errors import MoverSuperseded
from shardkit.core.topology import ShardedTable
from shardkit.storage import setaside
from shardkit.storage.connections import Connection, value
from shardkit.storage.setaside import SetAside, State
from tests.fix_shards import SCHEMA, TABLES, MakeShards, Shards

INDEXES = f"{SCHEMA} CREATE INDEX posts_body ON public.posts (body);"
POSTS: ShardedTable = TABLES[0]
NEWER = 1000
OLDER = 999
INVALID = "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'public.posts_body'::regclass"


@pytest.fixture
def shards(make_shards: MakeShards) -> Shards:
    return make_shards(1, schema=INDEXES)


@pytest.fixture
def one(shards: Shards) -> Connection:
    return shards.on("s1")


def superseded(one: Connection) -> None:
    one.execute("UPDATE shardkit.mover SET token = %s", (NEWER,))


def there(one: Connection) -> Any:
    return value(one, "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('public.posts_body')")


def test_nothing_is_set_aside(one: Connection) -> None:
    superseded(one)
    with pytest.raises(MoverSuperseded):
        setaside.set_aside(one, POSTS, OLDER)
    assert (there(one), setaside.noted(one)) == (True, [])


@pytest.mark.parametrize(
    ("act", "before", "state"),
    [
        (setaside.build, "", State.MISSING),
        (setaside.drop_unfinished, INVALID, State.UNFINISHED),
        (setaside.finish, "SELECT 1", State.BUILT),
    ],
)
def test_nothing_is_put_back(
    one: Connection, act: Callable[[Connection, SetAside, int], None], before: str, state: State
) -> None:
    setaside.set_aside(one, POSTS, OLDER)
    (index,) = setaside.noted(one)
    if before:
        one.execute(index.definition.encode())
        one.execute(before.encode())
    superseded(one)
    with pytest.raises(MoverSuperseded):
        act(one, index, OLDER)
    assert (setaside.state(one, index), setaside.noted(one)) == (state, [index])


def test_one_that_slept_before_it_built_finds_it_built(
    shards: Shards, one: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    setaside.set_aside(one, POSTS, OLDER)
    (index,) = setaside.noted(one)
    slept: list[bool] = []

    def sleep(point: str) -> None:
        if point == "put_back.before" and not slept:
            slept.append(True)
            setaside.put_back(one, index, NEWER)

    monkeypatch.setattr(setaside, "failpoint", sleep)
    with shards.writer() as (_, connections):
        older = connections.get(shards.topology().named("s1"))
        setaside.build(older, index, OLDER)
        with pytest.raises(MoverSuperseded):
            setaside.finish(older, index, OLDER)
    assert (there(one), setaside.noted(one)) == (True, [])


def test_one_that_slept_before_it_dropped_drops_nothing_that_is_finished(one: Connection) -> None:
    """Not even under a token that still counts: it looks again."""
    setaside.set_aside(one, POSTS, OLDER)
    (index,) = setaside.noted(one)
    setaside.build(one, index, OLDER)
    setaside.drop_unfinished(one, index, OLDER)
    assert there(one)
    setaside.finish(one, index, OLDER)
    assert setaside.noted(one) == []
