"""Dependencies point one way: core <- storage <- {orm | rebalance | schema} <- {cli, dev}."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import shardkit

PACKAGE = Path(shardkit.__file__).parent

_MIDDLE = {"core", "storage"}
_TOP = {*_MIDDLE, "orm", "rebalance", "schema", "_migrations", "shardkit"}
ALLOWED: dict[str, set[str]] = {
    "core": {"core", "_ring"},
    "storage": {"storage", "core", "_migrations"},
    "_migrations": {"_migrations", "storage", "core"},
    "orm": {"orm", *_MIDDLE},
    "rebalance": {"rebalance", *_MIDDLE},
    "schema": {"schema", *_MIDDLE, "_migrations"},
    "dev": {"dev", *_TOP},
    "cli": {"cli", "dev", *_TOP},
    "__main__": {"cli"},
    "testing": {"testing", "orm"},
    "shardkit": {"orm", "core"},
}
"""What each package may import of the others; "shardkit" is the file that re-exports what an application needs, and
"__main__" the one that is `python -m shardkit`."""

NOT_PURE = {
    "asyncio",
    "datetime",
    "http",
    "logging",
    "pathlib",
    "random",
    "socket",
    "subprocess",
    "threading",
    "time",
}
"""Modules of the standard library that core has no use for: I/O, clocks, chance."""


def wrong_arrows(package: Path) -> list[str]:
    """`file:line` and the import, for each import in the package `shardkit` at `package` that points the wrong way."""
    found = []
    for path, parts in _files(package):
        for line, target in _imports(path, parts[:-1], package):
            if not _allowed(_layer(parts), target.split(".")):
                found.append(f"{'/'.join(parts[1:])}.py:{line} {target}")
    return found


def _files(package: Path) -> list[tuple[Path, list[str]]]:
    """Every file with its module's name; the checkout's migrations/ are what is installed as shardkit._migrations."""
    roots = [(package, ["shardkit"]), (package.parent / "migrations", ["shardkit", "_migrations"])]
    return [
        (path, [*prefix, *path.relative_to(root).with_suffix("").parts])
        for root, prefix in roots
        for path in sorted(root.rglob("*.py"))
    ]


def _layer(parts: list[str]) -> str:
    return "shardkit" if parts[1:] in ([], ["__init__"]) else parts[1]


def _allowed(layer: str, target: list[str]) -> bool:
    if target[0] == "shardkit":
        return _layer(target) in ALLOWED[layer]
    return layer != "core" or (target[0] in sys.stdlib_module_names and target[0] not in NOT_PURE)


def _imports(path: Path, here: list[str], package: Path) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import in the file of the package `here`, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from shardkit import orm` names a package, `from shardkit import connect` does not.
            names = [
                alias.name
                for alias in node.names
                if module == "shardkit" and _is_package(package, alias.name)
            ]
            found += [(node.lineno, f"{module}.{name}") for name in names] or [(node.lineno, module)]
    return found


def _is_package(package: Path, name: str) -> bool:
    return name in ALLOWED or (package / name).is_dir() or (package / f"{name}.py").is_file()


def test_dependencies_point_one_way() -> None:
    assert wrong_arrows(PACKAGE) == []


def test_every_package_has_its_place() -> None:
    packages = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert packages <= ALLOWED.keys()


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/x.py", "import sqlalchemy"),
        ("core/x.py", "from psycopg import sql"),
        ("core/x.py", "import time"),
        ("core/x.py", "from shardkit.storage import fence"),
        ("core/x.py", "def f():\n    from ..storage import fence"),
        ("core/deep/x.py", "from ...orm.session import Session"),
        ("storage/x.py", "from shardkit import orm"),
        ("storage/x.py", "from shardkit import connect"),
        ("storage/x.py", "import shardkit.rebalance.mover"),
        ("orm/x.py", "if TYPE_CHECKING:\n    from shardkit.rebalance import mover"),
        ("rebalance/x.py", "from .. import orm"),
        ("rebalance/x.py", "from shardkit.dev import Cluster"),
        ("dev/x.py", "import shardkit.cli"),
        ("__init__.py", "from shardkit.rebalance import mover"),
        ("../migrations/env.py", "from shardkit.orm import declare"),
    ],
)
def test_a_wrong_arrow_is_found(tmp_path: Path, file: str, source: str) -> None:
    (found,) = wrong_arrows(_package(tmp_path, file, source))
    assert Path(file).name in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/ring.py", "from shardkit._ring import Ring"),
        ("core/ring.py", "import os, re\nfrom . import errors"),
        ("storage/x.py", "import psycopg\nfrom shardkit.core.errors import Refused"),
        ("cli/x.py", "from shardkit import __version__\nfrom shardkit.dev import demo"),
        ("__init__.py", "from shardkit.orm.session import Session"),
    ],
)
def test_a_right_arrow_is_not(tmp_path: Path, file: str, source: str) -> None:
    assert wrong_arrows(_package(tmp_path, file, source)) == []


def _package(root: Path, file: str, source: str) -> Path:
    """A package `shardkit` of one file."""
    package = root / "shardkit"
    package.mkdir()
    path = package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return package
