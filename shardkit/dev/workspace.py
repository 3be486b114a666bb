"""What the clusters of one process share: a scratch folder, one password, one `initdb`.

Driven by `Cluster`: made with the first cluster, removed with the last one (at the latest at the interpreter's exit,
or by the next start after a kill -9). Never starts a server.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar

from shardkit.core.errors import ServerFailed
from shardkit.dev.binaries import Binaries
from shardkit.dev.identity import renew_identifier
from shardkit.dev.processes import ServerUser, give, interrupted_later, launcher, server_user
from shardkit.dev.scratch import NAME_LENGTH, Scratch, choose_base, sweep

SUPERUSER = "postgres"

_SOCKETS_LENGTH = 80
"""Bytes of a socket folder's path: sun_path holds 103 (macOS) or 107, less the name "/.s.PGSQL.65535"."""
_BASE_LENGTH = _SOCKETS_LENGTH - NAME_LENGTH - len("//c1234/sockets")


class Workspace:
    """One for each process, by `current()`."""

    _current: ClassVar[Workspace | None] = None

    def __init__(self) -> None:
        self.user: ServerUser | None = server_user()
        self.password = secrets.token_urlsafe(24)
        self._pid = os.getpid()
        self._members: set[str] = set()
        self._entered = 0
        self._templates: dict[Path, Path] = {}
        self._runnable: dict[Path, Binaries] = {}
        self._scratches: list[Scratch] = []
        sweep()
        try:
            base = choose_base(self.user)
            self._folder = self._sockets = self._scratch(base)
            if not _suits_sockets(base):
                self._sockets = self._scratch(choose_base(self.user, suits=_suits_sockets))
            self.passfile = self._write_secret("passfile", f"*:*:*:{SUPERUSER}:{self.password}\n")
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    @classmethod
    def current(cls) -> Workspace:
        """The workspace of this process; a forked child gets one of its own."""
        if cls._current is None or cls._current._pid != os.getpid():
            cls._current = cls()
        return cls._current

    def close(self) -> None:
        """Remove every folder. The clusters stop their servers before."""
        for scratch in reversed(self._scratches):
            scratch.remove()
        if Workspace._current is self:
            Workspace._current = None
        atexit.unregister(self.close)

    def enter(self) -> tuple[Path, Path]:
        """The folder and the socket folder of a new cluster.

        The first is ours and lets the server through to what is given to it inside. The second is the server's, can
        be entered by the servers and us only, and its path is short enough for a socket.
        """
        name = f"c{self._entered}"
        self._entered += 1
        self._members.add(name)
        folder, above = self._folder / name, self._sockets / name
        for path in dict.fromkeys((folder, above)):
            path.mkdir()
            path.chmod(0o711)
        sockets = above / "sockets"
        sockets.mkdir(mode=0o700)
        give(sockets, self.user)
        return folder, sockets

    def leave(self, name: str) -> None:
        """Remove the folders of the cluster `name`; the last one takes the workspace along."""
        self._members.discard(name)
        shutil.rmtree(self._folder / name, ignore_errors=True)
        shutil.rmtree(self._sockets / name, ignore_errors=True)
        if not self._members:
            self.close()

    def make_data_folder(self, binaries: Binaries, target: Path) -> None:
        """Make `target` the data directory of a new server: a copy of one that `initdb` made, once per version.

        Its configuration ends with `settings.conf` of the folder above.
        """
        if binaries.folder not in self._templates:
            self._templates[binaries.folder] = self._initdb(binaries)
        self._make_for_server(target)
        shutil.copytree(self._templates[binaries.folder], target, symlinks=True, dirs_exist_ok=True)
        for path in target.rglob("*"):
            give(path, self.user)
        renew_identifier(target)
        self._run_as_server(binaries.folder / "pg_resetwal", target)

    def make_standby_folder(self, binaries: Binaries, target: Path, primary: str) -> None:
        """Make `target` the data directory of a standby: a base backup of the running server at a conninfo."""
        self._make_for_server(target)
        options = ("-d", primary, "-X", "stream", "-c", "fast", "--no-sync")
        self._run_as_server(binaries.folder / "pg_basebackup", "-D", target, *options)
        signal_file = target / "standby.signal"
        signal_file.touch(mode=0o600)
        give(signal_file, self.user)

    def runnable(self, binaries: Binaries) -> Binaries:
        """`binaries`, or a private copy where the server's user cannot reach them.

        So it is for root with a virtual environment below a home directory that only its owner may enter.
        Permissions outside our own folders are never changed.
        """
        if binaries.folder not in self._runnable:
            reached = self.user is None or self._runs(binaries.folder)
            self._runnable[binaries.folder] = binaries if reached else self._reachable_copy(binaries)
        return self._runnable[binaries.folder]

    def _reachable_copy(self, binaries: Binaries) -> Binaries:
        prefix = binaries.folder.parent
        package = prefix.parent
        folder = self._scratch(choose_base(self.user, memory=False, executable=True))
        copy = folder / package.name / prefix.name
        for part in ("bin", "lib", "lib64", "share"):
            if (prefix / part).is_dir():
                shutil.copytree(prefix / part, copy / part, symlinks=True)
        # A wheel's shared libraries are beside its package, found by a path relative to the program.
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, folder / libraries.name)
        for top in (folder / package.name, folder / libraries.name):
            _open_to_all(top)
        if not self._runs(copy / "bin"):
            raise ServerFailed(
                f"The user {self.user.name if self.user else ''} can run neither {binaries.folder}/postgres nor a "
                "copy of it.",
                hint="Install PostgreSQL where every user can read it.",
            )
        return Binaries(copy / "bin", binaries.version, binaries.source)

    def _runs(self, folder: Path) -> bool:
        command = launcher(self.user, signal.SIGKILL, folder / "postgres", "--version")
        return subprocess.run(command, capture_output=True, check=False, cwd="/").returncode == 0

    def _initdb(self, binaries: Binaries) -> Path:
        target = self._folder / f"template{len(self._templates)}"
        self._make_for_server(target)
        secret = self._write_secret("initdb-password", self.password)
        options = ["--auth=scram-sha-256", f"--username={SUPERUSER}", f"--pwfile={secret}", "--encoding=UTF8"]
        options += ["--locale=C", "--no-sync", "--no-instructions", "--wal-segsize=4"]
        try:
            self._run_as_server(binaries.folder / "initdb", "-D", target, *options)
        finally:
            secret.unlink()
        with (target / "postgresql.conf").open("a") as configuration:
            configuration.write("\ninclude = '../settings.conf'\n")
        return target

    def _make_for_server(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        give(folder, self.user)

    def _run_as_server(self, *command: str | Path) -> None:
        _run(*launcher(self.user, signal.SIGKILL, *command))

    def _write_secret(self, name: str, text: str) -> Path:
        """A new file that the servers and we can read (we own it, or we are root)."""
        path = self._folder / name
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(text)
        give(path, self.user)
        return path

    def _scratch(self, base: Path) -> Path:
        scratch = Scratch(base)
        self._scratches.append(scratch)
        return scratch.path


def server_environment(passfile: Path) -> dict[str, str]:
    """Our environment without libpq's variables, and with the passfile.

    By it a subscription reaches another cluster of this process with no password in the catalog.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**inherited, "LC_ALL": "C", "TZ": "UTC", "PGPASSFILE": str(passfile)}


def _suits_sockets(base: Path) -> bool:
    """Whether sockets may be below `base`: libpq takes a comma for the end of a host, and paths must be short."""
    return (
        len(os.fsencode(base)) <= _BASE_LENGTH and re.fullmatch(r"[A-Za-z0-9/._+-]+", str(base)) is not None
    )


def _open_to_all(folder: Path) -> None:
    """Let every user read what is in a folder of ours, and run what its owner can run."""
    for path in (folder, *folder.rglob("*")):
        if path.exists() and not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if mode & 0o100 else 0o444))


def _run(*command: str) -> None:
    process: subprocess.Popen[str] | None = None
    try:
        with interrupted_later():
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=server_environment(Path(os.devnull)),
                cwd="/",
                start_new_session=True,
            )
        output, complaint = process.communicate()
    except BaseException:
        if process is not None:
            # All that it started too: initdb is a row of servers, and one that outlives it would write on while its
            # folder is removed. Each holds the pipe, so the pipe's end is theirs.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        raise
    if process.returncode != 0:
        raise ServerFailed(f"{' '.join(command)} failed:\n{(complaint or output).strip()[-2000:]}")
