"""Fixtures of the Instagram example: its databases, and its web applications as processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from psycopg import sql

from examples.instagram.databases import make_plain, make_shards
from shardkit.cli.app import run
from shardkit.dev import Clusters
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage.connections import connect, value

ROOT = Path(__file__).parents[1]
SHARDS = ("one", "two", "three")
PLACES = {"plain": 0, "catalog": 0, "one": 0, "two": 1, "three": 2}
"""The databases, and which server has them."""
SECRET = "a secret of the tests"
TRUNCATE = "TRUNCATE public.usernames, public.users, public.posts, public.comments, public.likes"

# --- where it runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def instagram(servers: Clusters) -> dict[str, str]:
    """URLs by name: "plain" has the tables; "catalog" the shards "one" and "two"; "three" is empty, or has joined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv(ALLOW_FSYNC_OFF, "1")
        urls = {name: servers[number].create_database(f"instagram_{name}") for name, number in PLACES.items()}
        make_plain(urls["plain"])
        make_shards(urls["catalog"], {name: urls[name] for name in ("one", "two")}, here)
    return urls


@pytest.fixture
def empty_instagram(instagram: dict[str, str]) -> dict[str, str]:
    """The same, without a row."""
    for name in ("plain", *SHARDS):
        with connect(instagram[name]) as connection:
            if value(connection, "SELECT to_regclass('public.users')") is not None:
                connection.execute(TRUNCATE)
    return instagram


def here(*arguments: str) -> None:
    """A command of shardkit, in this process, which spares the start of one."""
    assert run(arguments) == 0


# --- over HTTP -----------------------------------------------------------------------------------------------------


@contextmanager
def served(app: str, **environment: str) -> Iterator[httpx.Client]:
    """A client of an application in a process of its own. Its first request waits until the process is ready."""
    with ExitStack() as ends:
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
            command = [sys.executable, "-m", "uvicorn", f"examples.instagram.{app}:app"]
            process = subprocess.Popen(
                [*command, "--log-level", "warning", "--fd", str(listening.fileno())],
                cwd=ROOT,
                env={**os.environ, "INSTAGRAM_SECRET": SECRET, **environment},
                pass_fds=[listening.fileno()],
            )
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        ends.callback(process.wait)
        ends.callback(process.terminate)
        yield ends.enter_context(httpx.Client(base_url=url, timeout=30, trust_env=False))


class Web:
    """The application over HTTP: which process answers what is all that differs between its shapes."""

    def __init__(self, users: httpx.Client, *others: httpx.Client) -> None:
        self.users, self.posts, self.comments, self.likes = (users, *others) if others else [users] * 4

    def join(self, name: str) -> dict[str, str]:
        """Register and log in; the headers of who is logged in."""
        said = {"name": name, "password": f"{name}'s password"}
        assert self.users.post("/register", json=said).status_code == 201
        token = self.users.post("/login", json=said).json()["token"]
        return {"Authorization": f"Bearer {token}"}

    def write(self, headers: dict[str, str], text: str) -> str:
        """A post; its id."""
        answer = self.posts.post("/posts", json={"text": text}, headers=headers)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])


def rows(url: str, table: str) -> int:
    """How many a table has in one database, owned or not."""
    with connect(url) as connection:
        if value(connection, "SELECT to_regclass(%s)", (f"public.{table}",)) is None:
            return 0
        return int(value(connection, sql.SQL("SELECT count(*) FROM public.{}").format(sql.Identifier(table))))
