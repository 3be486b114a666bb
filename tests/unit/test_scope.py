"""One transaction over several shards: who may write."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from shardkit.core.errors import CrossShardWrite
from shardkit.core.topology import Fence
from shardkit.storage.scope import Scope


@dataclass
class One:
    shard_id: int
    shard_name: str
    held: tuple[Fence, ...] = ()
    sent: bool = False
    wrote: bool = False


def _scope(mode: str = "single") -> tuple[Scope, One, One]:
    scope = Scope(mode)  # type: ignore[arg-type]
    first, second = One(1, "first"), One(2, "second")
    scope.participants.update({1: first, 2: second})
    return scope, first, second


def test_one_shard_may_be_written_again_and_again() -> None:
    scope, first, _ = _scope()
    scope.admit_write(first)
    scope.admit_write(first)
    scope.admit_writes(1, "first")
    assert scope.writer() is first


def test_a_second_shard_may_not() -> None:
    scope, first, second = _scope()
    scope.admit_write(first)
    with pytest.raises(CrossShardWrite) as raised:
        scope.admit_write(second)
    assert raised.value.fields == {"written": "first", "shard": "second"}
    assert not second.wrote
    with pytest.raises(CrossShardWrite):
        scope.admit_writes(2, "second")


def test_two_shards_at_once_may_not() -> None:
    scope, _, _ = _scope()
    with pytest.raises(CrossShardWrite):
        scope.admit_writes(2, "second", beside="first")


def test_in_best_effort_all_may() -> None:
    scope, first, second = _scope("best_effort")
    scope.admit_write(first)
    scope.admit_write(second)
    scope.admit_writes(3, "third", beside="first")
