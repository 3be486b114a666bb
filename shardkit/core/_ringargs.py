"""What the two implementations of the ring accept and refuse, so that they refuse alike.

Driven by `shardkit._ring` and `shardkit.core._pyring` whenever a value is not exactly an int, a str or a UUID that
can be hashed at once. Holds no hash and no lookup: those are written twice, each the test of the other.
"""

from __future__ import annotations

import operator
import reprlib
import sys
from array import array
from collections.abc import Iterable
from typing import Any, NoReturn, TypeAlias
from uuid import UUID

from .errors import KeyTypeError

Key: TypeAlias = int | str | UUID
"""What a shard key can be; bool, though an int to Python, cannot."""

POSITIONS = range(-(2**63), 2**63)

_NATIVE = "<" if sys.byteorder == "little" else ">"
_INT64_FORMATS = frozenset(mark + code for mark in ("", "@", "=", _NATIVE) for code in "ql")


def refuse(value: object, reason: str) -> NoReturn:
    """Raise the `KeyTypeError` of a value that cannot be a key."""
    raise KeyTypeError(f"{_shown(value)} cannot be a shard key: {reason}.", value=value, reason=reason)


def _shown(value: object) -> str:
    if isinstance(value, int) and value not in POSITIONS:
        # Python refuses to print ints of thousands of digits.
        return f"An int of {value.bit_length()} bits"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def plain_key(value: object) -> Key:
    """The int, str or UUID that a value stands for, or `KeyTypeError`.

    Subclasses (IntEnum, StrEnum, another library's UUID) count as what the driver would send for them: psycopg
    sends ``int(value)``, ``value.encode()`` and ``value.bytes``. One that redefines those is refused, as its value
    on the server could be another than the one hashed here.
    """
    kind = type(value)
    if isinstance(value, int):
        if kind is bool:
            refuse(value, "a bool is not an int to PostgreSQL; keys are int, str or UUID")
        if kind is not int and not _inherits(kind, int, "__int__", "__index__"):
            refuse(value, "this subclass of int redefines its value; pass a plain int")
        if value not in POSITIONS:
            refuse(value, "it is outside the signed 64 bits of a bigint")
        return int(value)
    if isinstance(value, str):
        if kind is not str and not _inherits(kind, str, "encode"):
            refuse(value, "this subclass of str redefines its value; pass a plain str")
        plain = str.__str__(value)
        try:
            plain.encode()
        except UnicodeEncodeError:
            refuse(value, "it holds a surrogate, which no text in PostgreSQL can")
        return plain
    if isinstance(value, UUID):
        if kind is not UUID and not _inherits(kind, UUID, "bytes", "hex"):
            refuse(value, "this subclass of UUID redefines its value; pass a plain UUID")
        return UUID(int=value.int)
    if value is None:
        refuse(value, "None is no key; keys are int, str or UUID")
    refuse(value, "keys are int, str or UUID")


def _inherits(kind: type, base: type, *names: str) -> bool:
    return all(getattr(kind, name) is getattr(base, name) for name in names)


def listed_keys(keys: object) -> list[object]:
    """The keys of an iterable as a list; a single key in the place of many is a `KeyTypeError`."""
    if isinstance(keys, str):
        refuse(keys, "this call takes many keys: a list, or a buffer of signed 64-bit ints")
    if not isinstance(keys, Iterable):
        refuse(keys, "this call takes many keys: a list, or a buffer of signed 64-bit ints")
    return list(keys)


def int64_view(view: memoryview) -> array[int]:
    """The ints of a buffer, copied; `KeyTypeError` if it does not hold signed 64-bit ints in one dimension."""
    if view.ndim != 1 or view.itemsize != 8 or view.format not in _INT64_FORMATS:
        refuse(
            view.obj,
            f"a buffer of keys holds signed 64-bit ints in one dimension, not {view.ndim} of format {view.format!r}",
        )
    values = array("q")
    values.frombytes(view.tobytes())
    return values


def as_buffer(values: object) -> memoryview | None:
    """A view of a value that offers a buffer, else None."""
    try:
        return memoryview(values)  # type: ignore[arg-type]
    except TypeError:
        return None


def checked_position(value: Any) -> int:
    """A position; TypeError if it is no integer, ValueError if it is not within the signed 64 bits."""
    position = operator.index(value)
    if position not in POSITIONS:
        raise ValueError(f"not a position, which is a signed 64-bit integer: {_shown(position)}")
    return position


def listed_positions(positions: Iterable[Any]) -> array[int]:
    """Positions of an iterable as a buffer; the errors of `checked_position`."""
    return array("q", [checked_position(position) for position in positions])


def checked_ring(tokens: Iterable[Any], owners: Iterable[Any]) -> tuple[array[int], array[int]]:
    """Tokens and owners of a ring as arrays of int64 and uint16, or ValueError."""
    checked = listed_positions(tokens)
    try:
        numbers = array("H", owners)
    except OverflowError as error:
        raise ValueError("an owner of a ring is a number from 0 to 65535") from error
    if not checked or len(checked) != len(numbers):
        raise ValueError(f"a ring needs one owner a token: {len(checked)} tokens, {len(numbers)} owners")
    for before, after in zip(checked, checked[1:], strict=False):
        if before >= after:
            raise ValueError(f"tokens of a ring are strictly increasing: {before} is followed by {after}")
    return checked, numbers
