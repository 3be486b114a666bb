"""What the clusters of one process share: a scratch folder, one password, one `initdb`.

Owned by `Cluster`: made with the first cluster, removed with the last one (at the latest when the interpreter exits, or
by the next start after a kill -9). Never starts a server.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar

from shardkit.core.errors import ServerFailed
from shardkit.dev.binaries import Binaries
from shardkit.dev.processes import ServerUser, give, launcher, server_user
from shardkit.dev.scratch import PREFIX, Scratch, choose_base, sweep

SUPERUSER = "postgres"

_LONGEST_SOCKET_FOLDER = 80
"""Bytes: sun_path holds 103 (macOS) or 107 (Linux), less the file name "/.s.PGSQL.65535"."""
_LONGEST_BASE = _LONGEST_SOCKET_FOLDER - len("/" + PREFIX + "12345678/c1234")


class Workspace:
    """One for each process; use `current()`."""

    _current: ClassVar[Workspace | None] = None

    def __init__(self) -> None:
        self.user: ServerUser | None = server_user()
        self.password = secrets.token_urlsafe(24)
        self._pid = os.getpid()
        self._members: set[str] = set()
        self._count = 0
        self._templates: dict[Path, Path] = {}
        self._private: dict[Path, Binaries] = {}
        sweep()
        self._scratch = Scratch(choose_base(self.user))
        self._others: list[Scratch] = []
        self.folder = self._scratch.path
        self._sockets = self.folder
        try:
            if len(os.fsencode(self.folder)) > _LONGEST_BASE + len("/" + PREFIX + "12345678"):
                self._sockets = self._another(choose_base(self.user, length=_LONGEST_BASE)).path
            self.passfile = self._write_secret("passfile", f"*:*:*:{SUPERUSER}:{self.password}\n")
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    @classmethod
    def current(cls) -> Workspace:
        """The workspace of this process; a new one where there is none, or only that of the process we forked from."""
        if cls._current is None or cls._current._pid != os.getpid():
            cls._current = cls()
        return cls._current

    def close(self) -> None:
        """Remove every folder. Servers must have been stopped before, by their clusters."""
        atexit.unregister(self.close)
        for scratch in (*self._others, self._scratch):
            scratch.remove()
        if Workspace._current is self:
            Workspace._current = None

    def enter(self) -> str:
        """A name for a new cluster."""
        name = f"c{self._count}"
        self._count += 1
        self._members.add(name)
        return name

    def leave(self, name: str) -> None:
        """The cluster `name` is gone; the last one takes the workspace along."""
        self._members.discard(name)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self._sockets / name, ignore_errors=True)
        if not self._members:
            self.close()

    def make_folder(self, name: str) -> Path:
        """The folder of the cluster `name`, ours; the server owns only what is given to it inside."""
        folder = self.folder / name
        folder.mkdir()
        folder.chmod(0o711)
        return folder

    def make_socket_folder(self, name: str) -> Path:
        """A folder with a path short enough for a socket, that only the servers and we can enter."""
        folder = self._sockets / name / "s" if self._sockets == self.folder else self._sockets / name
        folder.mkdir(mode=0o700)
        give(folder, self.user)
        return folder

    def make_data_folder(self, binaries: Binaries, target: Path) -> None:
        """Make `target` the data directory of a new server: a copy of one made by `initdb`, once for each version."""
        template = self._templates.get(binaries.folder)
        if template is None:
            template = self._templates[binaries.folder] = self._initdb(binaries)
        target.mkdir(mode=0o700)
        give(target, self.user)
        _run("cp", "-a", f"{template}/.", str(target))

    def runnable(self, binaries: Binaries) -> Binaries:
        """`binaries`, or a private copy of them where the server's user cannot reach them (a virtual environment below
        a home directory that only its owner may enter). Permissions outside our folders are never changed.
        """
        if self.user is None:
            return binaries
        if binaries.folder not in self._private:
            self._private[binaries.folder] = self._reachable_copy(binaries)
        return self._private[binaries.folder]

    def _reachable_copy(self, binaries: Binaries) -> Binaries:
        if self._runs(binaries.folder):
            return binaries
        prefix = binaries.folder.parent
        root = self._another(choose_base(self.user, memory=False, executable=True)).path
        copy = root / prefix.parent.name / prefix.name
        for part in ("bin", "lib", "lib64", "share"):
            if (prefix / part).is_dir():
                shutil.copytree(prefix / part, copy / part, symlinks=True)
        # A wheel's shared libraries are beside its package, found by a path relative to the program.
        libraries = prefix.parent.parent / f"{prefix.parent.name}.libs"
        if libraries.is_dir():
            shutil.copytree(libraries, root / libraries.name)
        _open_to_all(copy.parent)
        if not self._runs(copy / "bin"):
            raise ServerFailed(f"The user {self.user and self.user.name} cannot run {binaries.folder}/postgres.")
        return Binaries(copy / "bin", binaries.version, binaries.source)

    def _runs(self, folder: Path) -> bool:
        command = launcher(self.user, signal.SIGKILL, folder / "postgres", "--version")
        return subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0

    def _initdb(self, binaries: Binaries) -> Path:
        target = self.folder / f"template{len(self._templates)}"
        target.mkdir(mode=0o700)
        give(target, self.user)
        secret = self._write_secret("initdb-password", self.password)
        options = ["--auth=scram-sha-256", f"--username={SUPERUSER}", f"--pwfile={secret}", "--encoding=UTF8"]
        options += ["--locale=C", "--no-sync", "--no-instructions", "--wal-segsize=4"]
        try:
            _run(*launcher(self.user, signal.SIGKILL, binaries.folder / "initdb", "-D", target, *options))
        finally:
            secret.unlink()
        with (target / "postgresql.conf").open("a") as conf:
            conf.write("\ninclude = 'shardkit.conf'\n")
        return target

    def _write_secret(self, name: str, text: str) -> Path:
        """A file that the servers and we (owner or root) can read."""
        path = self.folder / name
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(text)
        give(path, self.user)
        return path

    def _another(self, base: Path) -> Scratch:
        scratch = Scratch(base)
        self._others.append(scratch)
        return scratch


def server_environment(passfile: Path) -> dict[str, str]:
    """Our environment without libpq's variables, and with the passfile: a subscription's connection to another cluster
    of this process needs no password in the catalog.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**inherited, "LC_ALL": "C", "TZ": "UTC", "PGPASSFILE": str(passfile)}


def _open_to_all(folder: Path) -> None:
    """Let every user read and run what is in this folder of ours."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() or os.access(path, os.X_OK) else 0o444))


def _run(*command: str) -> None:
    environment = server_environment(Path(os.devnull))
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment, cwd="/")
    if done.returncode != 0:
        raise ServerFailed(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")
