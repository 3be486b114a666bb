"""The program as a user runs it: a process of its own, its result on stdout, its narration on stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from psycopg import sql

from shardkit.cli.app import run
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage.connections import connect
from tests.fix_postgres import FreshDatabase
from tests.fix_shards import MakeShards, Shards, fill

USERS = 200
MODELS = """
from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardkit import sharded


class Base(DeclarativeBase):
    pass


@sharded(by="id")
class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str]


@sharded(by="user_id")
class Post(Base):
    __tablename__ = "posts"
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    body: Mapped[str]
"""


@dataclass(frozen=True)
class Outcome:
    """How a run of the program ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)

    def ok(self) -> Outcome:
        """Itself, if it ended with 0 and no traceback."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        return self

    def failed(self, code: int, *parts: str) -> Outcome:
        """Itself, if it ended with this exit code and an error on stderr that has these parts."""
        assert self.code == code, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        said = self.err[self.err.index("error: ") :]
        for part in parts:
            assert part in said, f"{part!r} is not in:\n{said}"
        assert len(said.strip().splitlines()) > 1, f"no next step in:\n{said}"
        return self


class Running:
    """The program at work. Its stderr can be waited for, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self._lines.append(line)
                self._more.notify_all()
        with self._more:
            self._more.notify_all()

    def wait_for(self, text: str) -> None:
        """Return when stderr has said the text."""
        with self._more:
            said = self._more.wait_for(
                lambda: text in "".join(self._lines) or not self._reader.is_alive(), timeout=60
            )
            assert said, f"{text!r} was not said within a minute:\n{''.join(self._lines)}"
            assert text in "".join(self._lines), f"it ended without {text!r}:\n{''.join(self._lines)}"

    def end(self, number: signal.Signals | None = None) -> Outcome:
        """Send a signal, if one is given, and wait for the end."""
        if number is not None:
            self.process.send_signal(number)
        with self.process:  # closes the pipes
            assert self.process.stdout is not None
            out = self.process.stdout.read()
            self._reader.join()
            return Outcome(self.process.wait(timeout=60), out, "".join(self._lines))


class Program(Protocol):
    def __call__(self, *arguments: str, answer: str | None = None, **environment: str) -> Outcome: ...


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's working folder, with `models.py` in it, and an environment without anything of shardkit's."""
    for name in [name for name in os.environ if name.startswith("SHARDKIT_")]:
        if name not in ("SHARDKIT_PG_BIN", "SHARDKIT_RING"):
            monkeypatch.delenv(name)
    monkeypatch.setenv(ALLOW_FSYNC_OFF, "1")
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path


@pytest.fixture
def program(folder: Path) -> Program:
    """`program("status", "--json", SHARDKIT_CATALOG=url) -> Outcome`; ``answer`` is what stdin holds."""

    def run_program(*arguments: str, answer: str | None = None, **environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "shardkit", *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            input=answer or "",
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run_program


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """As `program`, but in this process, which spares the start of one: for the many ways to be refused."""

    def run_here(*arguments: str, answer: str | None = None, **environment: str) -> Outcome:
        assert answer is None, "nobody can answer here"
        before = dict(os.environ)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            for name, text in environment.items():
                patch.setenv(name, text)
            capsys.readouterr()
            code = run(arguments)
            # Flags before the command are kept in the environment of a process that ends soon.
            for name in os.environ.keys() - before.keys() - environment.keys():
                del os.environ[name]
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run_here


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Running]]:
    """`start("rebalance", "run", "--yes") -> Running`; what still runs at the end of the test is killed."""
    made: list[Running] = []

    def begin(*arguments: str, **environment: str) -> Running:
        process = subprocess.Popen(
            [sys.executable, "-m", "shardkit", *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        made.append(Running(process))
        return made[-1]

    yield begin
    for running in made:
        if running.process.returncode is None:
            running.process.kill()
            running.end()


@pytest.fixture
def catalog(fresh_database: FreshDatabase, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty database, in the environment as the catalog."""
    url = fresh_database(0)
    monkeypatch.setenv("SHARDKIT_CATALOG", url)
    return url


@pytest.fixture
def two(make_shards: MakeShards, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Two shards, of which the first owns everything and has `USERS` users; their catalog is in the environment."""
    shards = make_shards(2)
    fill(shards.on("s1"), USERS)
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    return shards


def contents(url: str) -> dict[str, list[Any]]:
    """Every table of a database that is no system's, with its rows; and its schemas."""
    with connect(url) as connection:
        tables = connection.execute(
            "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
        ).fetchall()
        found = {
            f"{schema}.{name}": connection.execute(
                sql.SQL("SELECT t::text FROM {} t ORDER BY 1").format(sql.Identifier(schema, name))
            ).fetchall()
            # Taking the lease counts up, whatever comes of it.
            for schema, name in tables
            if (schema, name) != ("shardkit", "lease")
        }
        found["schemas"] = connection.execute(
            "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' ORDER BY 1"
        ).fetchall()
        return found
