"""The commands without a server: the command line, its environment, its documentation, and how failures are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import typer.main
from psycopg import errors as pg
from sqlalchemy.exc import ProgrammingError

from shardkit.cli.app import app, run
from shardkit.cli.bars import facts
from shardkit.cli.failures import report, scrub, understood
from shardkit.cli.options import byte_count
from shardkit.cli.output import count, duration, size, wants_json
from shardkit.cli.route import KeyFamily, guess, parse
from shardkit.core.errors import (
    KeyTypeError,
    MoverStopped,
    Refused,
    RetryLater,
    ShardkitError,
    ShardUnreachable,
    Unexpected,
    UsageError,
)
from shardkit.core.move import Phase
from shardkit.rebalance.progress import Progress

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"


# --- the command line -----------------------------------------------------------------------------------------------


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command with its full name."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())


def options(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.param_type_name == "option"]


def test_the_commands() -> None:
    assert {*COMMANDS} - {"demo"} == {
        "init", "shard add", "shard remove", "shard reweight", "shard list", "shard replica", "shard pin",
        "shard unpin", "shard set-url", "shard readmit", "schema declare", "ids split", "route", "status", "doctor",
        "verify",
        "transactions list", "transactions recover",
        "rebalance plan", "rebalance run", "rebalance status", "rebalance resume", "rebalance abort",
        "rebalance pause", "rebalance rollback", "rebalance finalize",
        "rebalance certificate",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_every_flag_has_a_twin_in_the_environment(name: str) -> None:
    for option in options(COMMANDS[name]):
        assert str(option.envvar).startswith("SHARDKIT_"), option.name
    assert {"--catalog", "--json"} <= {flag for option in options(COMMANDS[name]) for flag in option.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_flag_is_documented(name: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    heading = f"## shardkit {name}\n"
    assert heading in text
    section = text.split(heading)[1].split("\n## ")[0]
    common = text.split("\n## ")[0]
    for option in options(COMMANDS[name]):
        flag = max(option.opts, key=len)
        assert f"`{flag}" in section or f"`{flag}" in common, flag
        if option.envvar:
            assert option.envvar in section + common, option.envvar


def test_help_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "Exit codes" in capsys.readouterr().out
    assert run([]) == 2
    assert run(["shard"]) == 2
    assert "error:" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["fly"], ["status", "--fast"], ["shard", "list", "extra"], ["route"]])
def test_a_faulty_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"] == "usage-error"
    assert printed.err.startswith("error: ")
    assert "--help`." in printed.err


@pytest.mark.parametrize(
    ("arguments", "variable", "wanted"),
    [
        (["status", "--json"], "", True),
        (["--json", "status"], "", True),
        (["status"], "1", True),
        (["status"], "true", True),
        (["status"], "0", False),
        (["status"], "", False),
        (["route", "--", "--json"], "", False),
    ],
)
def test_json_is_wanted(
    arguments: list[str], variable: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDKIT_JSON", variable)
    assert wants_json(arguments) is wanted


def test_a_flag_after_the_command_comes_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody answers on port 1, so the message names the URL that was taken.
    monkeypatch.setenv("SHARDKIT_CATALOG", "postgresql://127.0.0.1:1/environment")
    before, after = "postgresql://127.0.0.1:1/before", "postgresql://127.0.0.1:1/after"
    for arguments, taken in (
        (["status"], "environment"),
        (["--catalog", before, "status"], "before"),
        (["--catalog", before, "status", "--catalog", after], "after"),
    ):
        assert run(arguments) == 5
        assert f"127.0.0.1:1/{taken} does not answer" in capsys.readouterr().err


def test_a_reader_that_goes_away() -> None:
    script = "from shardkit.cli.output import show; show({'long': 'x' * 200_000}, True, print)"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert os.read(writer.stdout.fileno(), 1)
        writer.stdout.close()
        assert (writer.stderr.read(), writer.wait()) == (b"", 0)


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "exit_code"),
    [
        (ShardUnreachable("away"), ShardUnreachable, 5),
        (psycopg.OperationalError("connection refused"), RetryLater, 5),
        (pg.AdminShutdown("ends"), RetryLater, 5),
        (pg.LockNotAvailable("held"), RetryLater, 5),
        (pg.DeadlockDetected("dead"), RetryLater, 5),
        (pg.TooManyConnections("full"), RetryLater, 5),
        (pg.InsufficientPrivilege("may not"), Refused, 3),
        (pg.ReadOnlySqlTransaction("standby"), Refused, 3),
        (psycopg.ProgrammingError("invalid connection option"), UsageError, 2),
        (pg.UndefinedColumn("no such column"), Unexpected, 1),
        (ProgrammingError("SELECT", {}, pg.InsufficientPrivilege("may not")), Refused, 3),
        (KeyError("x"), Unexpected, 1),
        (MoverStopped("stopped"), MoverStopped, 5),
    ],
)
def test_what_an_error_means(error: Exception, kind: type[ShardkitError], exit_code: int) -> None:
    known, text = report(error)
    assert type(known) is kind
    assert known.exit_code == exit_code
    assert known is understood(error) or not isinstance(error, ShardkitError)
    assert "error: " in text
    assert known.hint in text
    assert text.startswith("error: ") is (exit_code != 1), (
        "a bug keeps its traceback, and nothing else has one"
    )


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se%40cret@host/db, more", "postgresql://me:***@host/db, more"),
        ("postgresql://me:a:b@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("postgresql://host:5432/db", "postgresql://host:5432/db"),
        ("host=h password=secret user=u", "host=h password=*** user=u"),
        ("password='se cr\\'et' user=u", "password=*** user=u"),
        ("?user=u&password=secret&x=1", "?user=u&password=***&x=1"),
    ],
)
def test_passwords_are_taken_out(text: str, clean: str) -> None:
    assert scrub(text) == clean


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("5", KeyFamily.INT),
        ("-5", KeyFamily.INT),
        ("+5", KeyFamily.INT),
        ("99999999999999999999", KeyFamily.INT),
        ("5.0", KeyFamily.TEXT),
        ("1_000", KeyFamily.TEXT),
        ("\N{ARABIC-INDIC DIGIT FIVE}", KeyFamily.TEXT),
        (" 5", KeyFamily.TEXT),
        ("", KeyFamily.TEXT),
        ("None", KeyFamily.TEXT),
        ("00112233-4455-6677-8899-aabbccddeeff", KeyFamily.UUID),
        ("00112233445566778899AABBCCDDEEFF", KeyFamily.UUID),
    ],
)
def test_what_a_key_reads_as(key: str, family: KeyFamily) -> None:
    assert guess(key) is family
    assert guess(key, ("int", "text", "uuid")) is family
    assert guess(key, ("text",)) is KeyFamily.TEXT


@pytest.mark.parametrize(("key", "declared"), [("5.7", ("int",)), ("", ("int", "uuid")), ("5", ("uuid",))])
def test_what_no_declared_key_can_be_is_not_guessed(key: str, declared: tuple[str, ...]) -> None:
    with pytest.raises(KeyTypeError, match=" and ".join(declared)):
        guess(key, declared)


def test_keys_of_a_type() -> None:
    assert parse("7", KeyFamily.INT) == 7
    assert parse("7", KeyFamily.TEXT) == "7"
    assert parse("{00112233-4455-6677-8899-aabbccddeeff}", KeyFamily.UUID) == UUID(
        int=0x00112233445566778899AABBCCDDEEFF
    )
    for key, family in (("x", KeyFamily.INT), ("", KeyFamily.INT), ("7", KeyFamily.UUID)):
        with pytest.raises(KeyTypeError, match=f"is no {family}"):
            parse(key, family)


# --- numbers --------------------------------------------------------------------------------------------------------


def test_numbers_for_people() -> None:
    assert [size(number) for number in (0, 999, 1000, 2_500_000, 7e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.5 MB",
        "7.0 TB",
    ]
    assert [duration(seconds) for seconds in (0.04, 59.9, 61, 3661)] == [
        "0.0 s",
        "59.9 s",
        "1 min 01 s",
        "1 h 01 min",
    ]
    assert [count(number, "arc") for number in (0, 1, 1200)] == ["0 arcs", "1 arc", "1,200 arcs"]


def test_the_facts_of_a_transfer() -> None:
    nothing = Progress(1, "s1", "s2", Phase.COPYING)
    assert facts(nothing) == ""
    some = Progress(
        1, "s1", "s2", Phase.COPYING, rows=500, rows_expected=2000, bytes=4000, began=nothing.began - 10
    )
    said = facts(some).split(", ")
    assert said[0] == "500 of about 2,000 rows"
    assert said[1] == "4.0 kB"
    assert said[2].endswith(" rows/s")
    assert said[3].endswith(" s left")
    # An estimate that was too small is not held against what is there.
    more = Progress(1, "s1", "s2", Phase.PURGING, rows=3000, rows_expected=2000, lag_bytes=1500)
    assert facts(more).startswith("3,000 rows, ")
    assert facts(more).endswith("1.5 kB behind")


def test_sizes_are_read_as_the_server_reads_them() -> None:
    read = [byte_count(text) for text in ("0", "12", "12B", "8kB", " 512 MB ", "10GB", "1TB", 7)]
    assert read == [0, 12, 12, 8192, 512 << 20, 10 << 30, 1 << 40, 7]
    for wrong in ("", "GB", "-1", "1.5GB", "10 gb", "10KB", "1e3", "ten"):
        with pytest.raises(UsageError, match="Not a size"):
            byte_count(wrong)
