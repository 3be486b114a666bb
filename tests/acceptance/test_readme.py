"""The README does what it says: its programs and commands run as they stand, and print what it shows.

Numbers differ from run to run, so they are compared as ``N``; a line that is shown must be printed, in that order.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fix_postgres import FreshDatabase

README = Path(__file__).parents[2] / "README.md"

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"Save this as\s+`([\w.]+)`")


@dataclass(frozen=True)
class Section:
    """What stands under one heading: the text, and its blocks as (language, content, text since the block before)."""

    blocks: list[tuple[str, str, str]]

    def python(self) -> list[str]:
        return [content for language, content, _ in self.blocks if language == "python"]

    def files(self) -> dict[str, str]:
        """Programs that the text before them gives a name."""
        return {
            named[-1]: content
            for language, content, before in self.blocks
            if language == "python" and (named := _NAMED.findall(before))
        }

    def console(self) -> list[str]:
        return [
            line
            for language, content, _ in self.blocks
            if language == "console"
            for line in content.splitlines()
        ]

    def commands(self) -> list[str]:
        return [line.removeprefix("$ ") for line in self.console() if line.startswith("$ ")]

    def shown(self) -> list[str]:
        return [line for line in self.console() if not line.startswith("$ ")]


def sections() -> dict[str, Section]:
    """The README by heading; the first screen is under its title."""
    found = {}
    for part in re.split(r"^#+ (?=\S)", _without_code_headings(README.read_text()), flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        blocks, end = [], 0
        for match in _BLOCK.finditer(body):
            blocks.append((match[1], match[2].replace("\0", "#"), body[end : match.start()]))
            end = match.end()
        found[heading] = Section(blocks)
    return found


def _without_code_headings(text: str) -> str:
    """Comments in code are no headings."""
    return _BLOCK.sub(lambda match: match[0].replace("#", "\0"), text)


def normal(text: str) -> list[str]:
    """Lines with numbers as N and spaces as one."""
    lines = (" ".join(re.sub(r"\d[\d,.]*", "N", line).split()) for line in text.splitlines())
    return [line for line in lines if line]


def missing(shown: list[str], printed: str) -> list[str]:
    """The shown lines that were not printed, or not in this order."""
    lines = iter(normal(printed))
    return [line for line in normal("\n".join(shown)) if line not in lines]


def environment(**more: str) -> dict[str, str]:
    """Ours, with the programs of this interpreter first and a wide terminal."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SHARDKIT_")}
    programs = str(Path(sys.executable).parent)
    return {**kept, "PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "200", **more}


def shell(script: str, cwd: Path, env: dict[str, str]) -> str:
    """What a script printed, on both streams; it must succeed."""
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_first_screen_runs(tmp_path: Path, fresh_database: FreshDatabase) -> None:
    section = sections()["shardkit"]
    urls = {
        "postgresql://db0/catalog": fresh_database(0),
        "postgresql://db1/app": fresh_database(1),
        "postgresql://db2/app": fresh_database(2),
    }
    (program,) = section.python()
    commands = section.commands()
    assert commands.pop() == "make demo"
    script = "\n".join(["set -e", *commands, "shardkit shard list"])
    for stands_for, url in urls.items():
        assert stands_for in program + script
        program = program.replace(stands_for, url)
        script = script.replace(f" {stands_for}", f" {shlex.quote(url)}")
    (tmp_path / "app.py").write_text(program)
    env = environment(SHARDKIT_CATALOG=urls["postgresql://db0/catalog"], SHARDKIT_ALLOW_FSYNC_OFF="1")
    printed = normal(shell(script, tmp_path, env))
    assert any(line.startswith("int 'N'") and line.endswith("shard two") for line in printed)
    assert [line.split()[0] for line in printed[-4:] if "postgresql" in line] == ["one", "two"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the quickstart after all of its commands, and what they printed, followed by the programs below
    it, which work on the same shards."""
    found = sections()
    section = found["Quickstart"]
    folder = tmp_path_factory.mktemp("quickstart")
    for name, content in section.files().items():
        (folder / name).write_text(content)
    for name, heading in (
        ("later_async.py", "With asyncio"),
        ("later_sqlmodel.py", "With SQLModel"),
        ("later_refused.py", "What the session refuses"),
    ):
        (content,) = found[heading].python()
        (folder / name).write_text(content)
    start, *commands = section.commands()
    user = folder / "user"
    later = ["echo --- later", *(f"python later_{name}.py" for name in ("async", "sqlmodel", "refused"))]
    user.write_text("\n".join(["#!/usr/bin/env bash", "set -e", *commands, *later, "touch finished"]) + "\n")
    user.chmod(0o755)
    printed = shell(start, folder, environment(SHELL=str(user)))
    assert (folder / "finished").exists(), printed
    return folder, printed


def test_the_quickstart_prints_what_it_shows(quickstart: tuple[Path, str]) -> None:
    _, printed = quickstart
    shown = sections()["Quickstart"].shown()
    assert len(shown) > 10
    assert not (lost := missing(shown, printed)), f"not printed, or not here: {lost[0]}\n{printed}"


def test_the_writer_of_the_quickstart_loses_nothing(quickstart: tuple[Path, str]) -> None:
    folder, _ = quickstart
    told = re.fullmatch(
        r"([\d,]+) posts acknowledged, ([\d,]+) found; .*\n", (folder / "writer.log").read_text()
    )
    assert told is not None
    written, found = told.groups()
    assert written == found != "0"


def test_the_refusal_names_what_is_missing(quickstart: tuple[Path, str]) -> None:
    _, printed = quickstart
    later = printed.partition("--- later\n")[2]
    assert "cannot be routed" in later
    assert "user_id" in later


def test_every_link_leads_somewhere() -> None:
    documents = [README, README.with_name("CONTRIBUTING.md")]
    documents += [path for folder in ("docs", "examples") for path in README.parent.glob(f"{folder}/**/*.md")]
    broken = [
        f"{document.name}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert broken == []


def test_every_decision_is_listed() -> None:
    folder = README.parent / "docs" / "decisions"
    titles = {
        path.read_text().partition("\n")[0].removeprefix("# "): path.name for path in folder.glob("*.md")
    }
    titles.pop("Decisions")
    listed = dict(re.findall(r"^- \[(.+)\]\((.+)\)$", (folder / "README.md").read_text(), re.MULTILINE))
    assert listed == titles


def test_a_line_that_is_not_printed_is_missed() -> None:
    assert missing(["1 of 3", "a"], "7 of 9\nb\na") == []
    assert missing(["a", "1 of 3"], "7 of 9\na") == ["N of N"]
