"""Where a sequence goes on when rows with numbers of another one come."""

from __future__ import annotations

from typing import Any

import pytest

from shardkit.storage.sequences import MARGIN, Sequence

BIG = 2**63 - 1


def sequence(**changed: Any) -> Sequence:
    return Sequence(**{
        "name": "s", "start": 1, "step": 1, "minimum": 1, "maximum": BIG, "cycles": False, "last": None, **changed
    })  # fmt: skip


DOWN = {"start": -1, "step": -1, "minimum": -BIG, "maximum": -1}


@pytest.mark.parametrize(
    ("changed", "given", "number"),
    [
        ({}, 500, 500 + MARGIN),
        ({}, 1, 1 + MARGIN),
        ({"last": 499}, 500, 500 + MARGIN),
        ({"last": 500}, 500, None),
        ({"last": 900}, 500, None),
        (DOWN, -500, -500 - MARGIN),
        ({**DOWN, "last": -900}, -500, None),
        ({**DOWN, "minimum": -600}, -500, -550),
        ({"maximum": 32767}, 32000, 32383),
        ({"maximum": 32767}, 32766, 32766),
        # The even numbers, beside the odd ones of the source.
        ({"start": 2, "step": 2}, 501, 502 + 2 * MARGIN),
        ({"start": 2, "step": 2, "last": 600}, 501, None),
        ({"start": 5000}, 500, None),
        ({"start": -BIG, "minimum": -BIG}, -7, -7 + MARGIN),
    ],
)
def test_it_goes_on_beyond_what_was_given(changed: dict[str, Any], given: int, number: int | None) -> None:
    assert sequence(**changed).beyond(given) == number


@pytest.mark.parametrize(
    ("changed", "given"),
    [({"maximum": 500}, 500), ({"maximum": 500}, 9000), ({**DOWN, "minimum": -500}, -500), ({"start": 2, "step": 2,
      "maximum": 503}, 501)],
)  # fmt: skip
def test_it_says_that_none_is_left(changed: dict[str, Any], given: int) -> None:
    with pytest.raises(ValueError, match="no number left"):
        sequence(**changed).beyond(given)
