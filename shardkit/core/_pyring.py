"""The ring in pure Python: the twin of `shardkit._ring`, used where that is not built, and its test.

The hash is PostgreSQL's own (``src/common/hashfn.c``, Bob Jenkins' lookup3 with a result of 64 bits and seed 0), so
that a position computed here equals ``hashint8extended(key, 0)``, ``hashtextextended(key, 0)`` under a deterministic
collation in a UTF-8 database, or ``uuid_hash_extended(key, 0)``. Import it through `shardkit.core.ring`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any, SupportsIndex, final
from uuid import UUID

from ._ringargs import (
    Key,
    as_buffer,
    checked_position,
    checked_ring,
    int64_view,
    listed_keys,
    listed_positions,
    plain_key,
)
from .keyrange import POSITION_MAX, POSITION_MIN

_M32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9 + 3923095
"""To which the length of the key is added: the first state of each of the three words."""


def _rot(word: int, bits: int) -> int:
    return (word << bits | word >> (32 - bits)) & _M32


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    a = (a - c) & _M32 ^ _rot(c, 4)
    c = (c + b) & _M32
    b = (b - a) & _M32 ^ _rot(a, 6)
    a = (a + c) & _M32
    c = (c - b) & _M32 ^ _rot(b, 8)
    b = (b + a) & _M32
    a = (a - c) & _M32 ^ _rot(c, 16)
    c = (c + b) & _M32
    b = (b - a) & _M32 ^ _rot(a, 19)
    a = (a + c) & _M32
    c = (c - b) & _M32 ^ _rot(b, 4)
    b = (b + a) & _M32
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    c = ((c ^ b) - _rot(b, 14)) & _M32
    a = ((a ^ c) - _rot(c, 11)) & _M32
    b = ((b ^ a) - _rot(a, 25)) & _M32
    c = ((c ^ b) - _rot(b, 16)) & _M32
    a = ((a ^ c) - _rot(c, 4)) & _M32
    b = ((b ^ a) - _rot(a, 14)) & _M32
    c = ((c ^ b) - _rot(b, 24)) & _M32
    signed = b << 32 | c
    return signed - (1 << 64) if signed >> 63 else signed


def _hash_int(value: int) -> int:
    # The halves are folded so that an int2, an int4 and an int8 of one value hash alike.
    word = (value ^ (value >> 32 if value >= 0 else ~(value >> 32))) & _M32
    start = (_GOLDEN + 4) & _M32
    return _final((start + word) & _M32, start, start)


def _hash_bytes(data: bytes) -> int:
    a = b = c = (_GOLDEN + len(data)) & _M32
    whole = len(data) // 12 * 12
    for at in range(0, whole, 12):
        a = (a + int.from_bytes(data[at : at + 4], "little")) & _M32
        b = (b + int.from_bytes(data[at + 4 : at + 8], "little")) & _M32
        c = (c + int.from_bytes(data[at + 8 : at + 12], "little")) & _M32
        a, b, c = _mix(a, b, c)
    rest = data[whole:]
    a = (a + int.from_bytes(rest[:4], "little")) & _M32
    b = (b + int.from_bytes(rest[4:8], "little")) & _M32
    # The lowest byte of c is reserved for the length.
    c = (c + (int.from_bytes(rest[8:], "little") << 8)) & _M32
    return _final(a, b, c)


def position(key: Key) -> int:
    """The position of a key: the signed 64-bit hash that PostgreSQL computes for it.

    `KeyTypeError` for a bool, None, another type, an int outside the signed 64 bits, a str with a surrogate.
    """
    if type(key) is int and POSITION_MIN <= key <= POSITION_MAX:
        return _hash_int(key)
    if type(key) is str:
        try:
            return _hash_bytes(key.encode())
        except UnicodeEncodeError:
            plain_key(key)
    if type(key) is UUID:
        return _hash_bytes(key.bytes)
    return position(plain_key(key))


def positions(keys: Iterable[Key]) -> array[int]:
    """Positions of many keys, in their order, as an array of int64.

    ``keys`` is any buffer of signed 64-bit ints in one dimension, or an iterable of keys.
    """
    view = as_buffer(keys)
    if view is not None:
        return array("q", map(_hash_int, int64_view(view)))
    return array("q", [position(key) for key in listed_keys(keys)])  # type: ignore[arg-type]


@final
class Ring:
    """Sorted tokens with an owner each: a position belongs to the first token at or after it, wrapping round.

    Immutable; equal, hashed and pickled by value; safe to share between threads.
    """

    __slots__ = ("_owners", "_owners_by_token", "_tokens")

    def __init__(self, tokens: Iterable[SupportsIndex], owners: Iterable[SupportsIndex]) -> None:
        checked, numbers = checked_ring(tokens, owners)
        self._tokens = tuple(checked)
        self._owners_by_token = tuple(numbers)
        # Past the last token the ring goes on at the first.
        self._owners = (*self._owners_by_token, self._owners_by_token[0])

    @property
    def tokens(self) -> tuple[int, ...]:
        """Strictly increasing positions, each the last of an arc."""
        return self._tokens

    @property
    def owners_by_token(self) -> tuple[int, ...]:
        """The owner (0 to 65,535) of the arc that ends at each token."""
        return self._owners_by_token

    def owner(self, key: Key) -> int:
        """The owner of a key."""
        return self._owners[bisect_left(self._tokens, position(key))]

    def __getitem__(self, key: Key) -> int:
        return self.owner(key)

    # A ring looks up keys; without this, iteration would ask for the owners of 0, 1, 2 without end.
    __iter__ = None

    def owner_at(self, position: SupportsIndex) -> int:
        """The owner of a position; ValueError outside the signed 64 bits."""
        return self._owners[bisect_left(self._tokens, checked_position(position))]

    def owners(self, keys: Iterable[Key]) -> array[int]:
        """Owners of many keys (see `positions`), in their order, as an array of uint16."""
        return self._at(positions(keys))

    def owners_at(self, positions: Iterable[SupportsIndex]) -> array[int]:
        """Owners of many positions (a buffer of int64, or an iterable), as an array of uint16."""
        view = as_buffer(positions)
        return self._at(listed_positions(positions) if view is None else int64_view(view))

    def _at(self, positions: array[int]) -> array[int]:
        tokens, owners = self._tokens, self._owners
        return array("H", [owners[bisect_left(tokens, at)] for at in positions])

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ring):
            return NotImplemented
        return self._tokens == other._tokens and self._owners_by_token == other._owners_by_token

    def __hash__(self) -> int:
        return hash((self._tokens, self._owners_by_token))

    def __repr__(self) -> str:
        return f"<Ring of {len(self._tokens)} tokens, {len(set(self._owners))} owners>"

    def __reduce__(self) -> tuple[Any, ...]:
        from .ring import Ring as Chosen

        return (Chosen, (self._tokens, self._owners_by_token))
