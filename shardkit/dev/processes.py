"""Processes of a PostgreSQL server, and the user they run as.

Owns what must be done around fork and kill. Driven by `Cluster` and by the sweep of stale folders. Never touches a
process that is not a `postgres` whose working directory, which is a server's data directory, is the one asked about.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shardkit.core.errors import ServerFailed, UsageError

_LAUNCH = Path(__file__).with_name("_launch.py")
_IPC_RMID = 0
_POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class ServerUser:
    """The user a server runs as where we are root, which PostgreSQL refuses."""

    name: str
    uid: int
    gid: int


def server_user() -> ServerUser | None:
    """The user to drop to, or None where servers run as ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return ServerUser(name, entry.pw_uid, entry.pw_gid)
    raise ServerFailed(
        "PostgreSQL does not run as root, and there is no user `postgres` or `nobody` to run it as.",
        hint="Add one (useradd --system postgres), or do not run as root.",
    )


@contextlib.contextmanager
def interrupted_later() -> Iterator[None]:
    """Ctrl-C in the block is felt at its end: in the midst of making a process it would leave one that nobody knows."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield  # it is not felt at all, or not here
        return
    felt: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: felt.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if felt:
            before(*felt[0])


def give(path: Path, user: ServerUser | None) -> None:
    """Make `path` the server's."""
    if user is not None:
        os.chown(path, user.uid, user.gid)


def launcher(user: ServerUser | None, death_signal: signal.Signals, *command: str | Path) -> list[str]:
    """`command`, run as `user` and sent `death_signal` by the kernel when we die, however we die (Linux).

    The kernel ties the signal to the THREAD that forked, so only the main thread, which lives as long as the
    process, may start a server: raises `UsageError` elsewhere.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "A PostgreSQL server can be started from the main thread only.",
            hint="It would be stopped by the end of the thread that started it: start it before the threads.",
        )
    uid, gid = ("-", "-") if user is None else (str(user.uid), str(user.gid))
    python = [sys.executable, "-I", "-S", str(_LAUNCH)]
    return [*python, str(os.getpid()), str(int(death_signal)), uid, gid, *map(str, command)]


def reachable(path: Path, user: ServerUser | None) -> bool:
    """Whether `user` may enter the folder `path` (a home directory above it may forbid it)."""
    if user is None:
        return os.access(path, os.X_OK)
    test = launcher(user, signal.SIGKILL, "/bin/sh", "-c", 'cd "$1"', "sh", path)
    return subprocess.run(test, capture_output=True, check=False).returncode == 0


def server_processes(folder: Path) -> list[int]:
    """Pids of the living server processes whose data directory is `folder` or below it."""
    return _from_proc(folder) if Path("/proc/self/cwd").exists() else _from_ps(folder)


def _from_proc(folder: Path) -> list[int]:
    pids = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        # A zombie has no cwd, and it holds nothing any more: it does not count.
        with contextlib.suppress(OSError):
            cwd = Path(os.readlink(f"{entry.path}/cwd"))
            if cwd.is_relative_to(folder) and Path(entry.path, "comm").read_text().strip() == "postgres":
                pids.append(int(entry.name))
    return pids


def _from_ps(folder: Path) -> list[int]:
    listing = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,command="], capture_output=True, text=True, check=True
    )
    rows = [fields for line in listing.stdout.splitlines() if len(fields := line.split(None, 2)) == 3]
    postmasters = {int(pid) for pid, _, command in rows if f"postgres -D {folder}" in command}
    children = {int(pid) for pid, parent, _ in rows if int(parent) in postmasters}
    return [*postmasters, *children]


def read_pid_file(data_dir: Path) -> list[str]:
    """The lines of postmaster.pid, stripped; none if there is none.

    (src/include/utils/pidfile.h: 1 pid, 4 port, 5 socket folder, 7 shared memory key and id, 8 status.)
    """
    try:
        text = (data_dir / "postmaster.pid").read_text(errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines()]


def kill_server(folder: Path, timeout: float = 10) -> None:
    """SIGKILL the server processes of `folder`, as `server_processes`; returns when all are gone.

    Raises `ServerFailed` where some are left after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while pids := server_processes(folder):
        if time.monotonic() > deadline:
            raise ServerFailed(f"Processes of the server in {folder} cannot be killed: {pids}.", pids=pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def remove_shared_memory(data_dir: Path) -> None:
    """Remove the System V segment of a killed server, the only thing that it has outside its folders.

    Only the one that postmaster.pid names, of the owner of that folder, with no process attached.
    """
    lines = read_pid_file(data_dir)
    numbers = lines[6].split() if len(lines) > 6 else []
    if len(numbers) == 2 and _detached(int(numbers[0]), int(numbers[1]), data_dir.stat().st_uid):
        ctypes.CDLL(None).shmctl(int(numbers[1]), _IPC_RMID, None)


def _detached(key: int, shmid: int, uid: int) -> bool:
    try:
        header, *rows = Path("/proc/sysvipc/shm").read_text().splitlines()
    except OSError:
        return sys.platform != "linux"
    names = header.split()
    for row in rows:
        segment = dict(zip(names, map(int, row.split()), strict=False))
        if segment["shmid"] == shmid:
            return segment["key"] % 2**32 == key % 2**32 and segment["uid"] == uid and segment["nattch"] == 0
    return False
