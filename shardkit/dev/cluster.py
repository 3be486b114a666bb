"""Real PostgreSQL servers for tests, demos and trials: `Cluster` (one server), `Clusters` (several, in parallel).

A cluster lives in a temporary folder of this process and ends with it, however it ends: closed by `with` or at the
interpreter's exit, stopped by the kernel when the process is killed (Linux), its folder removed at the next start.
Nothing here keeps data; never give a cluster rows that matter.

Passwords are in a file (`passfile`), never in a URL: set `PGPASSFILE` to it, or use `conninfo`, which names it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Self, overload
from urllib.parse import quote

from psycopg.conninfo import make_conninfo

from shardkit.core.errors import ServerFailed, UsageError
from shardkit.dev import databases
from shardkit.dev.binaries import find_binaries
from shardkit.dev.processes import (
    interrupted_later,
    kill_server,
    launcher,
    read_pid_file,
    remove_shared_memory,
)
from shardkit.dev.settings import Setting, configuration, default_settings, list_item
from shardkit.dev.workspace import SUPERUSER, Workspace, server_environment

if TYPE_CHECKING:
    from types import TracebackType

_POLL_SECONDS = 0.005
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_PORT = 5432
_PORT_TRIES = 5
_PORT_TAKEN = "could not create any TCP/IP sockets"


class Cluster:
    """One PostgreSQL server with a data directory, a socket folder and a log of its own.

    Making it makes the data directory; `start` starts the server, `close` stops it and removes everything; as a
    context manager it does both. `settings` go over the defaults of `shardkit.dev.settings` (and `ALTER SYSTEM`
    over both); `tcp` adds a port on 127.0.0.1; `binaries` is the folder of `postgres`, else `find_binaries` looks.

    Raises `BinariesNotFound` and `ServerFailed`, and `UsageError` in any thread but the main one.
    """

    def __init__(
        self,
        *,
        settings: Mapping[str, Setting] | None = None,
        tcp: bool = False,
        binaries: str | os.PathLike[str] | None = None,
    ) -> None:
        found = find_binaries(binaries)
        self._workspace = Workspace.current()
        self._folder, self.socket_dir = self._workspace.enter()
        self._pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.data_dir = self._folder / "data"
        self.log = self._folder / "log"
        self.passfile = self._workspace.passfile
        self.password = self._workspace.password
        self.user = SUPERUSER
        self.tcp = tcp
        self.port = _free_port() if tcp else _PORT
        atexit.register(self.close)
        try:
            self.binaries = self._workspace.runnable(found)
            self.settings = {**default_settings(found.major), **(settings or {})}
            self._make_data_folder()
        except BaseException:
            self.close()
            raise

    def _make_data_folder(self) -> None:
        self._workspace.make_data_folder(self.binaries, self.data_dir)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "running" if self.running else "stopped"
        return f"<Cluster {self.socket_dir}:{self.port} PostgreSQL {self.binaries.version}, {state}>"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- life ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the postmaster lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The postmaster's pid. Raises `UsageError` while the server is stopped."""
        return self._postmaster().pid

    def start(self, timeout: float = _START_SECONDS) -> None:
        """Start the server and return when it takes connections (after a crash, that is after its recovery).

        Does nothing where it runs already. `timeout` in seconds.
        """
        _start_all([self], timeout)

    def stop(self, timeout: float = _STOP_SECONDS) -> None:
        """Stop the server in order: transactions are rolled back and a checkpoint is written ("fast").

        One that takes longer than `timeout` seconds is killed. Does nothing where it is stopped already.
        """
        _stop_all([self], timeout)

    def restart(self) -> None:
        """Stop and start; a change of `settings` takes effect."""
        self.stop()
        self.start()

    def kill(self, signum: signal.Signals = signal.SIGKILL) -> None:
        """Crash the server and return when it is gone; `start` recovers it.

        SIGKILL goes to every process of it. Another signal goes to the postmaster, and must be one that ends it.
        Raises `UsageError` while the server is stopped.
        """
        postmaster = self._postmaster()
        postmaster.send_signal(signum)
        # With SIGKILL it is gone before its children: it would answer their deaths by a restart.
        postmaster.wait(_STOP_SECONDS)
        if signum == signal.SIGKILL:
            kill_server(self.data_dir)

    def close(self) -> None:
        """Stop the server and remove all its files. May be called again; does nothing in a forked child."""
        _close_all([self])

    # --- access -------------------------------------------------------------------------------------------------

    def url(self, dbname: str = "postgres", *, user: str = SUPERUSER, tcp: bool = False) -> str:
        """`postgresql://user@/dbname?host=FOLDER&port=N`, or of 127.0.0.1 if `tcp`. Never a password."""
        who, database = quote(user, safe=""), quote(dbname, safe="")
        if tcp:
            return f"postgresql://{who}@127.0.0.1:{self._tcp_port()}/{database}"
        return f"postgresql://{who}@/{database}?host={quote(str(self.socket_dir), safe='/')}&port={self.port}"

    def conninfo(self, dbname: str = "postgres", *, user: str = SUPERUSER, tcp: bool = False) -> str:
        """The same for libpq, naming the passfile: it works without `PGPASSFILE`, and from the other servers."""
        host = "127.0.0.1" if tcp else str(self.socket_dir)
        port = self._tcp_port() if tcp else self.port
        return make_conninfo(host=host, port=port, user=user, dbname=dbname, passfile=str(self.passfile))

    def create_database(self, name: str, template: str = "template1") -> str:
        """Create a database; returns its URL."""
        databases.create(self.conninfo, name, template)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database with what would keep it: sessions, subscriptions, slots, prepared transactions.

        Does nothing where there is no such database.
        """
        databases.drop([(self.conninfo, name)])

    @staticmethod
    def drop_databases(pairs: Iterable[tuple[Cluster, str]]) -> None:
        """Drop several databases, which may replicate to each other."""
        databases.drop([(cluster.conninfo, name) for cluster, name in pairs])

    def log_tail(self, characters: int = 2000) -> str:
        """The end of the server's log."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_text(errors="replace")[-characters:]
        return ""

    # --- the server process -------------------------------------------------------------------------------------

    def _postmaster(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise UsageError(f"{self!r} is not running.", hint="Start it first.")
        return self._process

    def _tcp_port(self) -> int:
        if not self.tcp:
            raise UsageError(f"{self!r} has a socket only.", hint="Make it with tcp=True.")
        return self.port

    def _launch(self) -> None:
        if self._closed:
            raise UsageError(f"{self!r} cannot be started again.", hint="Make a new Cluster.")
        settings = self._folder / "settings.conf"
        settings.write_bytes(os.fsencode(self._configuration()))
        settings.chmod(0o644)
        program = self.binaries.folder / "postgres"
        # Without us an immediate shutdown: a fast one could wait for a replica, and the data is for nobody.
        command = launcher(self._workspace.user, signal.SIGQUIT, program, "-D", self.data_dir)
        with self.log.open("ab") as log, interrupted_later():
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=server_environment(self.passfile),
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle, not the server's
            )

    def _configuration(self) -> str:
        fixed: dict[str, Setting] = {
            "port": self.port,
            "listen_addresses": "127.0.0.1" if self.tcp else "",
            "unix_socket_directories": list_item(str(self.socket_dir)),
        }
        return configuration({**self.settings, **fixed})

    def _await_ready(self, deadline: float) -> None:
        tries = 1
        while not self._ready():
            if not self.running:
                # Another process may have taken the port between our look and the server's.
                if not self.tcp or tries == _PORT_TRIES or _PORT_TAKEN not in self.log_tail():
                    raise ServerFailed(f"PostgreSQL in {self.data_dir} did not start:\n{self.log_tail()}")
                tries += 1
                self.log.unlink()
                self.port = _free_port()
                self._launch()
            if time.monotonic() > deadline:
                raise ServerFailed(f"PostgreSQL in {self.data_dir} does not get ready:\n{self.log_tail()}")
            time.sleep(_POLL_SECONDS)

    def _ready(self) -> bool:
        """Whether the server says that it takes connections."""
        lines = read_pid_file(self.data_dir)
        # The pid tells this server's file from the one that a crashed server left, which may say "ready" too.
        return self.running and len(lines) > 7 and lines[0] == str(self.pid) and lines[7] == "ready"


class Clusters(Sequence[Cluster]):
    """`count` clusters with the same options, started and closed in parallel.

    `with Clusters(3) as (catalog, first, second): ...`
    """

    def __init__(
        self,
        count: int,
        *,
        settings: Mapping[str, Setting] | None = None,
        tcp: bool = False,
        binaries: str | os.PathLike[str] | None = None,
    ) -> None:
        self._members: list[Cluster] = []
        try:
            for _ in range(count):
                self._members.append(Cluster(settings=settings, tcp=tcp, binaries=binaries))
        except BaseException:
            self.close()
            raise

    @overload
    def __getitem__(self, index: int) -> Cluster: ...
    @overload
    def __getitem__(self, index: slice) -> list[Cluster]: ...
    def __getitem__(self, index: int | slice) -> Cluster | list[Cluster]:
        return self._members[index]

    def __iter__(self) -> Iterator[Cluster]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, timeout: float = _START_SECONDS) -> None:
        """Start those that do not run; returns when all take connections."""
        _start_all(self._members, timeout)

    def stop(self, timeout: float = _STOP_SECONDS) -> None:
        """Stop all, in order."""
        _stop_all(self._members, timeout)

    def close(self) -> None:
        """Stop all and remove all files."""
        _close_all(self._members)


def _start_all(clusters: Sequence[Cluster], timeout: float) -> None:
    idle = [cluster for cluster in clusters if not cluster.running]
    try:
        for cluster in idle:
            cluster._launch()
        deadline = time.monotonic() + timeout
        for cluster in idle:
            cluster._await_ready(deadline)
    except BaseException:
        _stop_all(idle, _STOP_SECONDS)
        raise


def _stop_all(clusters: Sequence[Cluster], timeout: float) -> None:
    running = [cluster for cluster in clusters if cluster.running]
    for cluster in running:
        with contextlib.suppress(UsageError):  # it ended by itself in between
            cluster._postmaster().send_signal(signal.SIGINT)
    deadline = time.monotonic() + timeout
    for cluster in running:
        while cluster.running and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        with contextlib.suppress(UsageError):
            cluster.kill()


def _close_all(clusters: Sequence[Cluster]) -> None:
    ours = [cluster for cluster in clusters if not cluster._closed and cluster._pid == os.getpid()]
    _stop_all(ours, _STOP_SECONDS)
    for cluster in ours:
        cluster._closed = True
        remove_shared_memory(cluster.data_dir)
        cluster._workspace.leave(cluster._folder.name)
        atexit.unregister(cluster.close)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
