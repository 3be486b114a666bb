"""A position is what PostgreSQL computes: keys and positions are copied into a server, which compares them in bulk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg import sql

from shardkit.core.ring import Key, positions
from tests.fix_postgres import FreshDatabase

INT_BITS = {"int2": 16, "int4": 32, "int8": 64}

# The hash of the column's own type, and the one expression that a move uses for all ints and all texts.
HASHES: dict[LiteralString, tuple[LiteralString, ...]] = {
    "int2": ("hashint2extended", "hashint8extended"),
    "int4": ("hashint4extended", "hashint8extended"),
    "int8": ("hashint8extended",),
    "text": ("hashtextextended",),
    "varchar": ("hashtextextended",),
    "uuid": ("uuid_hash_extended",),
}


@dataclass(frozen=True)
class Sample:
    """So many keys of each type of the family, from a seed."""

    ints: int
    texts: int
    uuids: int

    def keys(self, kind: str) -> list[Key]:
        random = Random(f"shardkit {kind}")
        if kind in INT_BITS:
            return list(_ints(random, INT_BITS[kind], self.ints))
        if kind == "uuid":
            return list(_uuids(random, self.uuids))
        return list(_texts(random, self.texts))


def _ints(random: Random, bits: int, count: int) -> Iterable[int]:
    """The limits of every narrower type and their neighbours, then ints of every magnitude and sign."""
    bound = 1 << (bits - 1)
    edges = {sign * (1 << power) + step for power in range(bits) for sign in (1, -1) for step in (-1, 0, 1)}
    kept = sorted(edge for edge in edges if -bound <= edge < bound)
    yield from kept
    for _ in range(count - len(kept)):
        value = random.getrandbits(random.randint(1, bits - 1))
        yield value if random.random() < 0.5 else ~value


# All of Unicode but the surrogates, which no UTF-8 holds, and NUL, which no text in PostgreSQL holds.
ALPHABETS = (
    range(0x20, 0x7F),
    range(0x01, 0x100),
    [*range(0x01, 0xD800), *range(0xE000, 0x10000)],
    range(0x1F300, 0x1F700),
    [*range(0x01, 0xD800), *range(0xE000, 0x110000)],
)


def _texts(random: Random, count: int) -> Iterable[str]:
    """Lengths from 0 to 64, each in every alphabet."""
    for number in range(count):
        length, alphabet = number % 65, ALPHABETS[number // 65 % len(ALPHABETS)]
        yield "".join(map(chr, random.choices(alphabet, k=length)))


def _uuids(random: Random, count: int) -> Iterable[UUID]:
    yield from (UUID(int=0), UUID(int=2**128 - 1))
    yield from (UUID(int=1 << bit) for bit in range(128))
    for _ in range(count - 130):
        yield UUID(
            int=random.getrandbits(128), version=random.choice([1, 4, 5]) if random.random() < 0.5 else None
        )


def mismatches(
    url: str, kind: LiteralString, keys: list[Key], ours: Iterable[int]
) -> tuple[int, list[tuple[str, int, int]]]:
    """(keys compared, [(key, ours, theirs) of those that differ]) of a column of a type."""
    found: list[tuple[str, int, int]] = []
    with psycopg.connect(url) as connection:
        connection.execute(sql.SQL("CREATE TEMP TABLE keys (key {}, ours int8)").format(sql.SQL(kind)))
        with connection.cursor() as cursor:
            with cursor.copy("COPY keys FROM STDIN (FORMAT BINARY)") as copy:
                copy.set_types([kind, "int8"])
                for row in zip(keys, ours, strict=True):
                    copy.write_row(row)
            for function in HASHES[kind]:
                cursor.execute(
                    sql.SQL(
                        "SELECT key::text, ours, {hash}(key, 0) FROM keys WHERE {hash}(key, 0) IS DISTINCT FROM ours"
                    ).format(hash=sql.SQL(function))
                )
                found += cursor.fetchall()
            (count,) = cursor.execute("SELECT count(*) FROM keys").fetchone() or (0,)
    return count, found


def compare(url: str, kind: LiteralString, sample: Sample) -> None:
    keys = sample.keys(kind)
    count, found = mismatches(url, kind, keys, positions(keys))
    assert count == len(keys)
    assert found == []


@pytest.mark.parametrize("kind", HASHES)
def test_positions_are_the_servers(fresh_database: FreshDatabase, kind: LiteralString) -> None:
    compare(fresh_database(), kind, Sample(ints=50_000, texts=20_000, uuids=10_000))


@pytest.mark.slow
@pytest.mark.parametrize("kind", HASHES)
def test_a_million_positions_are_the_servers(fresh_database: FreshDatabase, kind: LiteralString) -> None:
    compare(fresh_database(), kind, Sample(ints=1_000_000, texts=200_000, uuids=100_000))


def test_one_position_that_differs_is_found(fresh_database: FreshDatabase) -> None:
    keys: list[Key] = list(range(100))
    ours = positions(keys)
    ours[7] ^= 1
    assert mismatches(fresh_database(), "int8", keys, ours) == (100, [("7", ours[7], ours[7] ^ 1)])
