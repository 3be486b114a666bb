"""For the test suites of applications: a pytest plugin that tells which statements ask all shards.

Put ``pytest_plugins = ["shardkit.testing"]`` into the top ``conftest.py``. Then a test that asks for the fixture
``scatters`` is given the list of statements that its sessions sent to all shards; and ``pytest --no-scatter`` fails
each test that sent one, unless it is marked ``@pytest.mark.scatter``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardkit.orm.scatterpolicy import Scattered, listeners

__all__ = ["Scattered", "scatters"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--no-scatter``."""
    parser.getgroup("shardkit").addoption(
        "--no-scatter", action="store_true", help="fail tests that send a statement to all shards"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line("markers", "scatter: may send statements to all shards under --no-scatter")


@pytest.fixture
def scatters() -> Iterator[list[Scattered]]:
    """The statements of this test that were sent to all shards, in order; each names its file and line."""
    found: list[Scattered] = []
    listener = found.append
    listeners.append(listener)
    yield found
    listeners.remove(listener)


@pytest.fixture(autouse=True)
def _no_scatter(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--no-scatter") or request.node.get_closest_marker("scatter"):
        yield
        return
    found: list[Scattered] = request.getfixturevalue("scatters")
    yield
    if found:
        listed = "\n".join(f"  {scattered}" for scattered in found)
        pytest.fail(f"{len(found)} statements asked all shards:\n{listed}", pytrace=False)
