"""The hash and the lookup, each test on the native core and on its twin."""

from __future__ import annotations

import enum
import os
import pickle
import subprocess
import sys
import threading
from array import array
from decimal import Decimal
from types import ModuleType
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from shardkit import _ring as native
from shardkit.core import _pyring as twin
from shardkit.core import ring as chosen
from shardkit.core.errors import EXIT_USAGE, KeyTypeError
from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, slot_arc

# What PostgreSQL 15 answers for hashint8extended(key, 0), hashtextextended(key, 0), uuid_hash_extended(key, 0).
VECTORS: dict[int | str | UUID, int] = {
    0: 4154612158245552303,
    1: -3670598878359251130,
    -1: -1888257769727981238,
    2: 3647684041653542134,
    2**15 - 1: 1790040721271588170,
    -(2**15): 8455483389771436374,
    2**31 - 1: -9109110466470504941,
    -(2**31): 1977219185673256887,
    2**31: 1977219185673256887,
    -(2**31) - 1: -9109110466470504941,
    2**32 - 1: -1888257769727981238,
    2**32: -3670598878359251130,
    -(2**32): 4154612158245552303,
    2**63 - 1: 1977219185673256887,
    -(2**63): -9109110466470504941,
    1234567890123456789: -1348933112428498873,
    "": -6939563903564495251,
    "a": 3591986179850072241,
    "ab": 2833316173711343549,
    "abc": -6747756470228489321,
    "abcd": -1038429303365892052,
    "abcdefg": -6158032784613548338,
    "abcdefgh": -8882191227074733005,
    "abcdefghijk": 3112909444737856467,
    "abcdefghijkl": -7556637188122330412,
    "abcdefghijklm": 8871624171452417744,
    "user:00000042": 8647261631284192202,
    "Zürich": 6325084439750968862,
    "日本語": 2870829529307104068,
    "😀": -9149796522330800166,
    "👩\u200d👩\u200d👧\u200d👦": -1741539813767467067,
    UUID(int=0): -6859010066814654381,
    UUID(int=1): 3419970005924668665,
    UUID(int=2**128 - 1): 293445543803463785,
    UUID("12345678-1234-5678-1234-567812345678"): -9049495735378870530,
    UUID("0190163d-8694-739b-aea5-966c26f8ad91"): 6038170035463180615,
}

# Texts made for their positions by running the hash backwards. -1 is also how C code says that it failed.
EXTREMES = {
    "i7aJ5YgZVvNF": -1,
    "KynHOtwvkg1Q": 0,
    "P4WX718jWa5S": POSITION_MIN,
    "zVaK3L6p3Vgc": POSITION_MAX,
}


@pytest.fixture(params=[native, twin], ids=["cython", "python"])
def impl(request: pytest.FixtureRequest) -> Any:
    return request.param


# --- the hash ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "expected"), [*VECTORS.items(), *EXTREMES.items()])
def test_known_positions(impl: Any, key: Any, expected: int) -> None:
    assert impl.position(key) == expected


def test_a_batch_gives_the_positions_in_order(impl: Any) -> None:
    keys = [*VECTORS, *EXTREMES]
    expected = array("q", [*VECTORS.values(), *EXTREMES.values()])
    assert impl.positions(keys) == expected
    assert impl.positions(tuple(keys)) == expected
    assert impl.positions(key for key in keys) == expected


def test_an_empty_batch(impl: Any) -> None:
    ring = impl.Ring([0], [1])
    nothing: Any
    for nothing in ([], (), array("q"), np.array([], dtype="int64"), iter([])):
        assert impl.positions(nothing) == array("q")
        assert ring.owners(nothing) == array("H")


class Colour(enum.IntEnum):
    RED = 2


class OldColour(int, enum.Enum):
    RED = 2


class Plan(enum.StrEnum):
    FREE = "abc"


class OldPlan(str, enum.Enum):  # noqa: UP042 - not the same: str(OldPlan.FREE) is another
    FREE = "abc"


class OtherUUID(UUID):
    pass


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        (Colour.RED, 2),
        (OldColour.RED, 2),
        (Plan.FREE, "abc"),
        (OldPlan.FREE, "abc"),
        (OtherUUID(int=1), UUID(int=1)),
    ],
)
def test_a_subclass_is_the_value_that_the_driver_sends(impl: Any, key: Any, plain: Any) -> None:
    assert impl.position(key) == VECTORS[plain]
    assert impl.positions([key]) == array("q", [VECTORS[plain]])


class Doubled(int):
    def __int__(self) -> int:
        return 2 * super().__int__()


class Shouted(str):
    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return self.upper().encode(encoding, errors)


class Mangled(UUID):
    @property
    def bytes(self) -> bytes:
        return b"0" * 16


class Claimed:
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return int


REFUSED = [
    True,
    False,
    None,
    2**63,
    -(2**63) - 1,
    10**10000,
    1.0,
    Decimal(1),
    b"abc",
    bytearray(b"abc"),
    (1, 2),
    object(),
    np.int64(5),
    np.bool_(True),
    "\ud800",
    "fine until here \udfff",
    Doubled(2),
    Shouted("abc"),
    Mangled(int=1),
    Claimed(),
]


@pytest.mark.parametrize("key", REFUSED, ids=lambda key: type(key).__name__)
def test_what_cannot_be_a_key_is_refused(impl: Any, key: Any) -> None:
    ring = impl.Ring([0], [1])
    for call in (impl.position, ring.owner, ring.__getitem__):
        with pytest.raises(KeyTypeError) as caught:
            call(key)
        assert caught.value.fields["value"] is key
        assert caught.value.fields["reason"] in str(caught.value)
    with pytest.raises(KeyTypeError):
        impl.positions([1, key])
    with pytest.raises(KeyTypeError):
        ring.owners([1, key])


@pytest.mark.parametrize("key", [None, True, 1.5, b"abc"])
def test_the_refusal_names_the_types_allowed(impl: Any, key: Any) -> None:
    with pytest.raises(KeyTypeError, match=r"int \(not bool\), str or uuid.UUID") as caught:
        impl.position(key)
    assert isinstance(caught.value, TypeError)
    assert caught.value.exit_code == EXIT_USAGE


def test_the_refusal_names_the_surrogate_and_the_range(impl: Any) -> None:
    with pytest.raises(KeyTypeError, match="surrogate"):
        impl.position("a\udc80")
    with pytest.raises(KeyTypeError, match="signed 64 bits"):
        impl.position(2**63)


@pytest.mark.parametrize("keys", ["abc", 5, None, UUID(int=1)])
def test_one_key_in_the_place_of_many_is_refused(impl: Any, keys: Any) -> None:
    with pytest.raises(KeyTypeError, match="many"):
        impl.positions(keys)
    with pytest.raises(KeyTypeError, match="many"):
        impl.Ring([0], [1]).owners(keys)


# --- buffers -------------------------------------------------------------------------------------------------------

VALUES = [key for key in VECTORS if isinstance(key, int)] * 100
NUMBERS = np.array(VALUES, dtype="int64")


def _unaligned() -> Any:
    packed = np.zeros(len(VALUES), dtype=[("flag", "u1"), ("key", "i8")])
    packed["key"] = NUMBERS
    return packed["key"]


def _read_only() -> Any:
    frozen = NUMBERS.copy()
    frozen.flags.writeable = False
    return frozen


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (array("q", VALUES), VALUES),
        (memoryview(array("q", VALUES)), VALUES),
        (memoryview(array("l", VALUES))[::-3], VALUES[::-3]),
        (NUMBERS, VALUES),
        (NUMBERS[1::2], VALUES[1::2]),
        (NUMBERS[::-1], VALUES[::-1]),
        (NUMBERS.reshape(-1, 4)[:, 2], VALUES[2::4]),
        (np.broadcast_to(NUMBERS[3], (700,)), VALUES[3:4] * 700),
        (_unaligned(), VALUES),
        (_read_only(), VALUES),
    ],
)
def test_any_buffer_of_int64_is_a_batch(impl: Any, keys: Any, values: list[int]) -> None:
    expected = array("q", [VECTORS[value] for value in values])
    assert impl.positions(keys) == expected
    for ring in (
        impl.Ring([slot_arc(9).last, slot_arc(40_000).last], [3, 4]),
        impl.Ring([-(2**62), 5, 2**62], [7, 8, 65535]),
    ):
        assert ring.owners(keys) == array("H", [ring.owner(value) for value in values])
        assert ring.owners_at(keys) == array("H", [ring.owner_at(value) for value in values])


@pytest.mark.parametrize(
    "keys",
    [
        b"12345678",
        array("i", [1]),
        array("Q", [1]),
        array("d", [1.0]),
        NUMBERS.astype("int32"),
        NUMBERS.astype("uint64"),
        NUMBERS.astype("float64"),
        NUMBERS.astype(">i8" if sys.byteorder == "little" else "<i8"),
        NUMBERS.reshape(-1, 4),
        np.array(5, dtype="int64"),
    ],
)
def test_other_buffers_are_refused(impl: Any, keys: Any) -> None:
    ring = impl.Ring([0], [1])
    for call in (impl.positions, ring.owners, ring.owners_at):
        with pytest.raises(KeyTypeError, match="dimension"):
            call(keys)
    if isinstance(keys, array):
        keys.append(keys[0])  # a buffer that is held still would refuse to grow


def test_a_list_that_shrinks_while_it_is_read() -> None:
    class Sly(UUID):
        def __getattribute__(self, name: str) -> Any:
            keys.clear()
            return super().__getattribute__(name)

    keys: list[Any] = []
    for call in (native.positions, native.Ring([0], [1]).owners):
        keys[:] = [*range(50), Sly(int=1), *range(50)]
        with pytest.raises(RuntimeError, match="changed its size"):
            call(keys)


# --- the ring ------------------------------------------------------------------------------------------------------


def test_an_arc_ends_at_its_token_and_the_ring_wraps_round(impl: Any) -> None:
    ring = impl.Ring([-5, 10], [7, 8])
    expected = {
        POSITION_MIN: 7,
        -6: 7,
        -5: 7,
        -4: 8,
        0: 8,
        10: 8,
        11: 7,
        POSITION_MAX: 7,
    }
    assert {place: ring.owner_at(place) for place in expected} == expected
    assert ring.owners_at(list(expected)) == array("H", expected.values())
    assert ring.owners_at(array("q", expected)) == array("H", expected.values())


@pytest.mark.parametrize("token", [POSITION_MIN, -1, 0, 77, slot_arc(0).last, POSITION_MAX])
def test_a_ring_of_one_token(impl: Any, token: int) -> None:
    ring = impl.Ring([token], [65535])
    assert len(ring) == 1
    for place in (
        POSITION_MIN,
        token,
        POSITION_MAX,
        max(token - 1, POSITION_MIN),
        min(token + 1, POSITION_MAX),
    ):
        assert ring.owner_at(place) == 65535
    assert {ring[key] for key in VECTORS} == {65535}


def test_every_token_of_a_full_slot_ring(impl: Any) -> None:
    ring = impl.Ring([slot_arc(slot).last for slot in range(65536)], range(65536))
    for slot in (0, 1, 32767, 32768, 65535):
        arc = slot_arc(slot)
        assert ring.owner_at(arc.first) == ring.owner_at(arc.last) == slot


def test_a_crowded_bucket(impl: Any) -> None:
    """Tokens side by side, as a move in small steps and pinned keys leave them."""
    tokens = [*range(-500, 500), POSITION_MAX]
    ring = impl.Ring(tokens, [place % 1000 for place in range(1001)])
    for at, token in enumerate(tokens):
        assert ring.owner_at(token) == at % 1000
    assert ring.owner_at(-501) == 0
    assert ring.owner_at(500) == 0


def test_keys_by_every_door(impl: Any) -> None:
    tokens = sorted(VECTORS[key] for key in ("a", 1, UUID(int=0)))
    ring = impl.Ring(tokens, [1, 2, 3])
    keys = [*VECTORS, *EXTREMES]
    owners = [ring.owner_at(impl.position(key)) for key in keys]
    assert len(set(owners)) == 3
    assert [ring[key] for key in keys] == owners
    assert [ring.owner(key) for key in keys] == owners
    assert ring.owners(keys) == array("H", owners)
    assert ring.owners_at([impl.position(key) for key in keys]) == array("H", owners)


@pytest.mark.parametrize("place", [2**63, -(2**63) - 1])
def test_a_position_outside_64_bits_is_refused(impl: Any, place: int) -> None:
    ring = impl.Ring([0], [1])
    with pytest.raises(ValueError, match="not a position"):
        ring.owner_at(place)
    with pytest.raises(ValueError, match="not a position"):
        ring.owners_at([place])


@pytest.mark.parametrize("place", ["0", None, 0.0, UUID(int=0)])
def test_a_key_is_no_position(impl: Any, place: Any) -> None:
    ring = impl.Ring([0], [1])
    with pytest.raises(TypeError):
        ring.owner_at(place)
    with pytest.raises(TypeError):
        ring.owners_at([place])


def test_what_a_ring_is_made_of(impl: Any) -> None:
    ring = impl.Ring(np.array([-3, 4]), array("H", [2, 1]))
    assert ring.tokens == (-3, 4)
    assert ring.owners_by_token == (2, 1)
    assert {type(value) for value in (*ring.tokens, *ring.owners_by_token)} == {int}
    assert repr(ring) == "<Ring of 2 tokens, 2 owners>"


@pytest.mark.parametrize(
    ("tokens", "owners", "message"),
    [
        ([], [], "one owner a token"),
        ([1], [], "one owner a token"),
        ([1, 2], [1], "one owner a token"),
        ([2, 1], [1, 2], "strictly increasing"),
        ([1, 1], [1, 2], "strictly increasing"),
        ([2**63], [1], "not a position"),
        ([1], [65536], "0 to 65535"),
        ([1], [-1], "0 to 65535"),
    ],
)
def test_no_ring(impl: Any, tokens: list[int], owners: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        impl.Ring(tokens, owners)


def test_a_ring_is_a_value(impl: Any) -> None:
    ring = impl.Ring([1, 2], [3, 4])
    assert ring == impl.Ring([1, 2], [3, 4])
    assert hash(ring) == hash(impl.Ring([1, 2], [3, 4]))
    assert ring != impl.Ring([1, 2], [3, 5])
    assert ring != impl.Ring([1, 3], [3, 4])
    assert ring != (1, 2)
    for name in ("tokens", "owners_by_token"):
        with pytest.raises(AttributeError):
            setattr(ring, name, (1,))


def test_a_pickled_ring_is_of_the_implementation_that_loads_it(impl: Any) -> None:
    loaded = pickle.loads(pickle.dumps(impl.Ring([1, 2], [3, 4])))
    assert loaded == chosen.Ring([1, 2], [3, 4])


def test_a_ring_cannot_be_iterated(impl: Any) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        iter(impl.Ring([1], [1]))


def test_threads_share_a_ring(impl: Any) -> None:
    ring = impl.Ring([-(2**62), 5, 2**62], [7, 8, 9])
    expected = ring.owners(VALUES)
    found: list[array[int]] = []

    def look() -> None:
        found.append(ring.owners(NUMBERS))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


# --- the choice ----------------------------------------------------------------------------------------------------


def _public(module: ModuleType) -> set[str]:
    return {name for name in vars(module.Ring) if not name.startswith("_")}


def test_both_have_the_same_names() -> None:
    assert _public(native) == _public(twin)
    for module in (native, twin):
        assert all(hasattr(module, name) for name in ("Ring", "position", "positions"))


def _import_with(forced: str | None, *, before: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SHARDKIT_RING"}
    if forced is not None:
        environment["SHARDKIT_RING"] = forced
    code = f"{before}\nfrom shardkit.core import ring\nprint(ring.IMPLEMENTATION, ring.Ring.__module__)"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


NOT_BUILT = "import sys; sys.modules['shardkit._ring'] = None"


@pytest.mark.parametrize(
    ("forced", "before", "expected"),
    [
        (None, "", "cython shardkit._ring"),
        ("", "", "cython shardkit._ring"),
        ("cython", "", "cython shardkit._ring"),
        ("python", "", "python shardkit.core._pyring"),
        (None, NOT_BUILT, "python shardkit.core._pyring"),
    ],
)
def test_the_implementation_can_be_forced(forced: str | None, before: str, expected: str) -> None:
    assert _import_with(forced, before=before).stdout.strip() == expected


def test_a_forced_implementation_that_is_not_there_is_an_error() -> None:
    missing = _import_with("cython", before=NOT_BUILT)
    assert missing.returncode != 0
    assert "ImportError: SHARDKIT_RING=cython, but the native core cannot be imported" in missing.stderr
    unknown = _import_with("fortran")
    assert unknown.returncode != 0
    assert "it can be 'cython', 'python' or unset" in unknown.stderr
