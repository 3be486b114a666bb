"""Real PostgreSQL servers for tests, demos and trials: `Cluster` (one server) and `Clusters` (several, in parallel).

A cluster lives in a temporary folder of this process and ends with it, however it ends: closed by `with` or at the
interpreter's exit, stopped by the kernel when the process is killed (Linux), and its folder removed at the next start.
Nothing here keeps data; never point a cluster at rows that matter.

Passwords are in a file (`passfile`), never in a URL: set `PGPASSFILE` to it, or use `conninfo`, which names it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, overload
from urllib.parse import quote

from psycopg.conninfo import make_conninfo

from shardkit.core.errors import ServerFailed, UsageError
from shardkit.dev import databases
from shardkit.dev.binaries import find_binaries
from shardkit.dev.processes import kill_server, launcher, read_pid_file, remove_shared_memory
from shardkit.dev.workspace import SUPERUSER, Workspace, server_environment

Setting = str | int | float | bool

SETTINGS: Mapping[str, Setting] = {
    "wal_level": "logical",
    "max_wal_senders": 32,
    "max_replication_slots": 32,
    "max_logical_replication_workers": 24,
    "max_sync_workers_per_subscription": 4,
    "max_worker_processes": 40,
    "max_prepared_transactions": 64,
    "max_connections": 200,
    "wal_retrieve_retry_interval": "100ms",
    # A crash of the server loses nothing that it acknowledged: what was written is with the kernel. Only a crash of the
    # machine would, and the folder does not outlive that. The pages stay whole only with full_page_writes (a SIGKILL
    # can cut a write in two), and commits only with synchronous_commit: both are left on.
    "fsync": False,
    "shared_buffers": "64MB",
    # In the data directory, so a killed server leaves none of it in /dev/shm.
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] %b %d ",
}
"""The settings of a cluster where it is not told otherwise."""

_SINCE: Mapping[int, Mapping[str, Setting]] = {18: {"max_active_replication_origins": 32}}
"""Settings that older servers do not know, by the first major version that does."""

_POLL_SECONDS = 0.005
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_PORT = 5432
_PORT_TRIES = 5


class Cluster:
    """One PostgreSQL server with a data directory, a socket folder and a log of its own.

    Making it makes the data directory; `start` starts the server, `close` stops it and removes everything. As a context
    manager it does both. `settings` go over `SETTINGS`; `ALTER SYSTEM` goes over both. `tcp` adds a port on 127.0.0.1.
    `binaries` names the folder of `postgres`; without it `find_binaries` looks.

    Raises `BinariesNotFound` and `ServerFailed`; `UsageError` where it is started from another thread than the main one.
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
        self._name = self._workspace.enter()
        self._pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        atexit.register(self.close)
        try:
            self.binaries = self._workspace.runnable(found)
            self.settings: dict[str, Setting] = {**_defaults(self.binaries.major), **(settings or {})}
            folder = self._workspace.make_folder(self._name)
            self.data_dir = folder / "data"
            self.log = folder / "log"
            self.socket_dir = self._workspace.make_socket_folder(self._name)
            self._workspace.make_data_folder(self.binaries, self.data_dir)
        except BaseException:
            self.close()
            raise
        self.user = SUPERUSER
        self.password = self._workspace.password
        self.passfile = self._workspace.passfile
        self.tcp = tcp
        self.port = _free_port() if tcp else _PORT

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

    # --- life ------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the postmaster lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The postmaster's pid. Raises `UsageError` while the server is stopped."""
        if self._process is None or self._process.poll() is not None:
            raise UsageError(f"{self!r} is not running.", hint="Start it first.")
        return self._process.pid

    def start(self, timeout: float = _START_SECONDS) -> None:
        """Start the server and return when it takes connections; after `kill`, that is after recovery.

        Does nothing where it runs already.
        """
        _start_all([self], timeout)

    def stop(self, timeout: float = _STOP_SECONDS) -> None:
        """Stop the server in order: transactions are rolled back, a checkpoint is written (a "fast" shutdown).

        Does nothing where it is stopped already.
        """
        _stop_all([self], timeout)

    def restart(self) -> None:
        """Stop and start; a change of `settings` takes effect."""
        self.stop()
        self.start()

    def kill(self, signum: signal.Signals = signal.SIGKILL) -> None:
        """Crash the server and return when it is gone; `start` recovers it.

        SIGKILL goes to every process of it. Any other signal goes to the postmaster, and must be one that ends it.
        """
        postmaster = self._process
        if postmaster is None:
            raise UsageError(f"{self!r} was never started.")
        if signum == signal.SIGKILL:
            postmaster.kill()
            kill_server(self.data_dir)
        else:
            postmaster.send_signal(signum)
        postmaster.wait(_STOP_SECONDS)

    def close(self) -> None:
        """Stop the server and remove all its files. May be called again; does nothing in a forked child."""
        _close_all([self])

    # --- access ----------------------------------------------------------------------------------------------------

    def url(self, dbname: str = "postgres", *, user: str = SUPERUSER, tcp: bool = False) -> str:
        """`postgresql://user@/dbname?host=FOLDER&port=N`, or with 127.0.0.1 and the port if `tcp`. No password."""
        who, database = quote(user, safe=""), quote(dbname, safe="")
        if tcp:
            return f"postgresql://{who}@127.0.0.1:{self._tcp_port()}/{database}"
        return f"postgresql://{who}@/{database}?host={quote(str(self.socket_dir), safe='/')}&port={self.port}"

    def conninfo(self, dbname: str = "postgres", *, user: str = SUPERUSER, tcp: bool = False) -> str:
        """The same for libpq, with the passfile's name, so it works without `PGPASSFILE`, from the other servers too."""
        host = "127.0.0.1" if tcp else str(self.socket_dir)
        port = self._tcp_port() if tcp else self.port
        return make_conninfo(host=host, port=port, user=user, dbname=dbname, passfile=str(self.passfile))

    def _tcp_port(self) -> int:
        if not self.tcp:
            raise UsageError(f"{self!r} has a socket only.", hint="Make it with tcp=True.")
        return self.port

    def create_database(self, name: str, template: str = "template1") -> str:
        """Create a database; returns its URL."""
        databases.create(self.conninfo(), name, template)
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database with what would keep it: sessions, subscriptions, slots, prepared transactions.

        Does nothing where there is no such database.
        """
        databases.drop([(self.conninfo, name)])

    @staticmethod
    def drop_databases(pairs: Iterable[tuple[Cluster, str]]) -> None:
        """Drop several databases that may replicate to each other."""
        databases.drop([(cluster.conninfo, name) for cluster, name in pairs])

    def log_tail(self, characters: int = 2000) -> str:
        """The end of the server's log."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.read_text(errors="replace")[-characters:]
        return ""

    # --- the server process ------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        if self._closed:
            raise UsageError(f"{self!r} cannot be started again.", hint="Make a new Cluster.")
        self._write_settings()
        command = launcher(
            # An immediate shutdown: a fast one could wait for a replica, and there is nobody to keep the data for.
            self._workspace.user, signal.SIGQUIT, self.binaries.folder / "postgres", "-D", self.data_dir
        )  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data_dir.parent,
                env=server_environment(self.passfile),
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle, not the server's
            )

    def _write_settings(self) -> None:
        fixed: dict[str, Setting] = {
            "port": self.port,
            "listen_addresses": "127.0.0.1" if self.tcp else "",
            "unix_socket_directories": _list_item(str(self.socket_dir)),
        }
        lines = [_setting_line(name, value) for name, value in {**self.settings, **fixed}.items()]
        conf = self.data_dir / "shardkit.conf"
        conf.write_text("".join(lines))
        conf.chmod(0o644)

    def _ready(self) -> bool:
        """Whether the server says that it takes connections. Raises `ServerFailed` if it has ended instead."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServerFailed(
                f"PostgreSQL in {self.data_dir} ended with status {self._process.returncode}:\n{self.log_tail()}",
                status=self._process.returncode,
            )
        lines = read_pid_file(self.data_dir)
        # The pid tells this server's file from the one that a crashed server left, which may say "ready" too.
        return len(lines) > 7 and lines[0] == str(self._process.pid) and lines[7] == "ready"

    def _await_ready(self, deadline: float) -> None:
        tries = 1
        while True:
            try:
                if self._ready():
                    return
            except ServerFailed as error:
                # Another process may have taken the port between our look and the server's.
                if not self.tcp or tries == _PORT_TRIES or "could not create any TCP/IP sockets" not in str(error):
                    raise
                tries += 1
                self.port = _free_port()
                self._launch()
            if time.monotonic() > deadline:
                raise ServerFailed(f"PostgreSQL in {self.data_dir} does not get ready:\n{self.log_tail()}")
            time.sleep(_POLL_SECONDS)


class Clusters(Sequence[Cluster]):
    """`count` clusters with the same options, started and closed in parallel.

        with Clusters(3) as (catalog, first, second):
            ...
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
    running = [cluster for cluster in clusters if cluster._process is not None and cluster._process.poll() is None]
    deadline = time.monotonic() + timeout
    for cluster in running:
        assert cluster._process is not None
        cluster._process.send_signal(signal.SIGINT)
    for cluster in running:
        assert cluster._process is not None
        try:
            cluster._process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            cluster.kill()


def _close_all(clusters: Sequence[Cluster]) -> None:
    ours = [cluster for cluster in clusters if not cluster._closed and cluster._pid == os.getpid()]
    _stop_all(ours, _STOP_SECONDS)
    for cluster in ours:
        cluster._closed = True
        atexit.unregister(cluster.close)
        if hasattr(cluster, "data_dir") and cluster.data_dir.exists():
            remove_shared_memory(cluster.data_dir)
        cluster._workspace.leave(cluster._name)


def _defaults(major: int) -> dict[str, Setting]:
    newer = {name: value for since, names in _SINCE.items() if major >= since for name, value in names.items()}
    return {**SETTINGS, **newer}


def _setting_line(name: str, value: Setting) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name) or "\n" in str(value):
        raise UsageError(f"{name!r} = {value!r} is not a setting of PostgreSQL.")
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return f"{name} = '{text.replace(chr(92), chr(92) * 2).replace(chr(39), chr(39) * 2)}'\n"


def _list_item(value: str) -> str:
    """One item of a list-valued setting, quoted so that spaces and commas belong to it."""
    return '"' + value.replace('"', '""') + '"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
