"""The circuit breaker of a shard, by a clock of the test's own."""

from __future__ import annotations

import threading

import pytest

from shardkit.core.errors import ShardUnreachable
from shardkit.storage.breaker import Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("east", failures=3, seconds=2.0, clock=clock)


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.admit()
        breaker.failed()


def test_it_opens_after_failures_in_a_row(breaker: Breaker) -> None:
    fail(breaker, 2)
    breaker.admit()
    breaker.succeeded()
    fail(breaker, 3)
    with pytest.raises(ShardUnreachable, match=r"Shard east .* 3 times in a row .* in 2\.0 s") as raised:
        breaker.admit()
    assert raised.value.fields == {"shard": "east"}


def test_one_probe_at_a_time(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 1.9
    with pytest.raises(ShardUnreachable):
        breaker.admit()
    clock.now += 0.1
    breaker.admit()
    with pytest.raises(ShardUnreachable, match="now"):
        breaker.admit()
    breaker.failed()
    with pytest.raises(ShardUnreachable, match="4 times"):
        breaker.admit()
    clock.now += 2.0
    breaker.admit()
    breaker.succeeded()
    breaker.admit()
    fail(breaker, 2)
    breaker.admit()


def test_a_probe_that_was_interrupted_is_no_answer(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 2.0
    breaker.admit()
    breaker.gave_up()
    breaker.admit()
    with pytest.raises(ShardUnreachable):
        breaker.admit()


def test_of_many_threads_one_probes(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 2.0
    admitted: list[int] = []
    together = threading.Barrier(16)

    def attempt(number: int) -> None:
        together.wait()
        try:
            breaker.admit()
        except ShardUnreachable:
            return
        admitted.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 1
