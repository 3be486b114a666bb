"""What every test gets: the fixtures of the plugins below, and its folder's name as its marker."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

pytest_plugins = [
    "pytester",
    "tests.fix_instagram",
    "tests.fix_oracle",
    "tests.fix_postgres",
    "tests.fix_sharded",
    "tests.fix_shards", "tests.fix_backups",
    "tests.fix_twins",
]

_TESTS = Path(__file__).parent
_LONG = "test_wide_oracle.py"
"""A file that takes longest goes first, or one of several processes is at work on it when the others are done."""


def pytest_configure() -> None:
    """Whoever starts the tests in the background of a shell has them ignore SIGINT, and some interrupt themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its folder, before `-m` selects. A folder without a registered marker is an error.

    The names of the folders happen to be in the order of what their files cost; so it stays, with one exception.
    """
    for item in items:
        if item.path.is_relative_to(_TESTS):
            item.add_marker(getattr(pytest.mark, item.path.relative_to(_TESTS).parts[0]))
    items.sort(key=lambda item: item.path.name != _LONG)
