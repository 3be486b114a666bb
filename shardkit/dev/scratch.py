"""Temporary folders that cannot outlive their process for long.

Owns the folders and their lock files. A process holds an flock on `lock` in each of its folders for as long as it
lives; a folder whose lock can be had is therefore stale, whatever killed its owner, and the next `sweep` stops the
servers that still run in it and removes it. Driven by the workspace of the clusters. Never touches a folder of
another user or of a living process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from shardkit.core.errors import ServerFailed
from shardkit.dev.processes import ServerUser, kill_server, reachable, remove_shared_memory

PREFIX = "shardkit-pg-"
NAME_LENGTH = len(PREFIX) + 8
"""Bytes of a scratch folder's name: tempfile adds eight characters."""

_LOCK = "lock"
_SHARED_MEMORY = Path("/dev/shm")
_ROOMY = 3 << 30
"""Bytes. Docker gives /dev/shm 64 MB, which a single server fills."""


class Scratch:
    """A new temporary folder in `base`, locked by this process until `remove` or its death."""

    def __init__(self, base: Path) -> None:
        self._fd, self.path = _locked_folder(base)
        # Servers under another user pass through and see no names; what is in it has its own permissions.
        self.path.chmod(0o711 if os.geteuid() == 0 else 0o700)
        self._pid = os.getpid()
        _open.add(self)

    def remove(self) -> None:
        """Remove the folder and all in it. May be called again; does nothing in a forked child."""
        if self._fd < 0 or self._pid != os.getpid():
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.disown()

    def disown(self) -> None:
        """Give up the lock and leave the folder: a forked child must not keep it from the sweep."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


_open: weakref.WeakSet[Scratch] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for scratch in list(_open):
        scratch.disown()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _locked_folder(base: Path) -> tuple[int, Path]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        with contextlib.suppress(FileNotFoundError):  # a sweep took it before it was locked
            fd = _lock(path)
            if fd is not None:
                if _is_lock_of(fd, path):
                    return fd, path
                os.close(fd)


def _lock(folder: Path) -> int | None:
    """A file descriptor that holds the folder's lock, or None where another process holds it."""
    fd = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise
    return fd


def _is_lock_of(fd: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(folder / _LOCK))
    except FileNotFoundError:
        return False


def bases() -> list[Path]:
    """The folders in which scratch folders are made, and looked for: real paths, existing, writable by us."""
    names = (str(_SHARED_MEMORY), tempfile.gettempdir(), "/tmp", "/var/tmp")
    paths = dict.fromkeys(Path(os.path.realpath(name)) for name in names)
    return [path for path in paths if path.is_dir() and os.access(path, os.W_OK | os.X_OK)]


def choose_base(
    user: ServerUser | None,
    *,
    memory: bool = True,
    executable: bool = False,
    suits: Callable[[Path], bool] | None = None,
) -> Path:
    """The first base that `user` can enter and that `suits`.

    It is in memory only if `memory` and roomy, and programs may run in it if `executable`. Raises `ServerFailed`
    where there is none.
    """
    for base in bases():
        if base == _SHARED_MEMORY and not (memory and _roomy()):
            continue
        if suits is not None and not suits(base):
            continue
        if executable and os.statvfs(base).f_flag & getattr(os, "ST_NOEXEC", 0):
            continue
        if reachable(base, user):
            return base
    looked = ", ".join(str(base) for base in bases()) or tempfile.gettempdir()
    who = "us" if user is None else f"the user {user.name}"
    raise ServerFailed(
        f"No temporary folder can be used by a server that runs as {who}: looked at {looked}.",
        hint="Set TMPDIR to a writable folder with a short path that this user can enter.",
    )


def _roomy() -> bool:
    usage = os.statvfs(_SHARED_MEMORY)
    return usage.f_bavail * usage.f_frsize >= _ROOMY and _available_memory() >= _ROOMY


def _available_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0


def sweep() -> list[Path]:
    """Stop and remove what dead processes of this user left; returns the folders removed."""
    return [folder for base in bases() for folder in base.glob(PREFIX + "*") if _remove_if_stale(folder)]


def _remove_if_stale(folder: Path) -> bool:
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        fd = _lock(folder)
    except OSError:
        return False  # another sweep is removing it
    if fd is None:
        return False
    try:
        # What does not die keeps its folder until the next sweep; it is no reason not to start.
        with contextlib.suppress(ServerFailed):
            kill_server(folder)
            for pid_file in (*folder.glob("*/postmaster.pid"), *folder.glob("*/data/postmaster.pid")):
                remove_shared_memory(pid_file.parent)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)
    return not folder.exists()
