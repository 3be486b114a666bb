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
from itertools import pairwise
from typing import Any, NoReturn, TypeAlias, cast
from uuid import UUID

from .errors import KeyTypeError
from .keyrange import POSITION_MAX, POSITION_MIN

Key: TypeAlias = int | str | UUID
"""What a shard key can be; bool, though an int to Python, cannot."""

_NATIVE = "<" if sys.byteorder == "little" else ">"
INT64_FORMATS = frozenset(mark + code for mark in ("", "@", "=", _NATIVE) for code in "ql")
"""Formats of a buffer that, with items of 8 bytes, mean signed ints in this machine's byte order."""


def refuse(value: object, reason: str, *, role: str = "a shard key") -> NoReturn:
    """Raise the `KeyTypeError` of a value that cannot be what it was passed as."""
    raise KeyTypeError(f"{_shown(value)} cannot be {role}: {reason}.", value=value, reason=reason)


def _shown(value: object) -> str:
    if issubclass(type(value), int) and not _in_range(int.__index__(cast("int", value))):
        # Python refuses to print ints of thousands of digits.
        return f"an int of {int.bit_length(cast('int', value))} bits"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _in_range(number: int) -> bool:
    # Not `in range(...)`, which for a subclass of int compares with each member in turn.
    return POSITION_MIN <= number <= POSITION_MAX


def plain_key(value: object) -> Key:
    """The int, str or UUID that a value stands for, or `KeyTypeError`.

    Subclasses (IntEnum, StrEnum, another library's UUID) count as what psycopg sends for them: ``int(value)``,
    ``value.encode()``, ``value.bytes``. One that redefines those is refused, as its value on the server could be
    another than the one hashed here.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str, UUID)):
        refuse(value, "keys are int (not bool), str or uuid.UUID, and never None")
    if isinstance(value, int):
        _refuse_redefined(value, int, "__int__", "__index__")
        number = int(value)
        if not _in_range(number):
            refuse(value, "it is outside the signed 64 bits of a bigint")
        return number
    if isinstance(value, str):
        _refuse_redefined(value, str, "encode")
        try:
            str.encode(value)
        except UnicodeEncodeError:
            refuse(value, "it holds a surrogate, which no text in PostgreSQL can")
        return str.__str__(value)
    _refuse_redefined(value, UUID, "int", "bytes", "hex")
    return UUID(int=int(value.int))


def _refuse_redefined(value: object, base: type, *names: str) -> None:
    if any(getattr(type(value), name, None) is not getattr(base, name) for name in names):
        refuse(value, f"this subclass of {base.__name__} redefines its value; pass a plain {base.__name__}")


def listed_keys(keys: object) -> list[object]:
    """The keys of an iterable as a list; one key in the place of many is a `KeyTypeError`."""
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        refuse(keys, "many are an iterable, or a buffer of signed 64-bit ints", role="many keys")
    return list(keys)


def int64_view(view: memoryview) -> array[int]:
    """The ints of a buffer, copied; `KeyTypeError` if it does not hold signed 64-bit ints in one dimension."""
    if view.ndim != 1 or view.itemsize != 8 or view.format not in INT64_FORMATS:
        reason = f"it has {view.ndim} dimensions of format {view.format!r}, not one of signed 64-bit ints"
        refuse(view.obj, reason, role="many keys")
    values = array("q")
    values.frombytes(view.tobytes())
    return values


def as_buffer(values: Any) -> memoryview | None:
    """A view of a value that offers a buffer, else None."""
    try:
        return memoryview(values)
    except TypeError:
        return None


def checked_position(value: Any) -> int:
    """A position; TypeError if it is no integer, ValueError if it is not within the signed 64 bits."""
    position = operator.index(value)
    if not _in_range(position):
        raise ValueError(f"not a position, which is a signed 64-bit integer: {_shown(position)}")
    return position


def listed_positions(positions: Iterable[Any]) -> array[int]:
    """Positions of an iterable as a buffer; the errors of `checked_position`."""
    return array("q", [checked_position(position) for position in positions])


def checked_ring(tokens: Iterable[Any], owners: Iterable[Any]) -> tuple[array[int], array[int]]:
    """Tokens and owners of a ring as arrays of int64 and uint16, or ValueError."""
    checked = listed_positions(tokens)
    try:
        numbers = array("H", list(owners))
    except OverflowError as error:
        raise ValueError("an owner of a ring is a number from 0 to 65535") from error
    if not checked or len(checked) != len(numbers):
        raise ValueError(f"a ring needs one owner a token: {len(checked)} tokens, {len(numbers)} owners")
    for before, after in pairwise(checked):
        if before >= after:
            raise ValueError(f"tokens of a ring are strictly increasing: {before} is followed by {after}")
    return checked, numbers
