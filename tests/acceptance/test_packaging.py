"""The package as it is shipped: sdist, wheel from it, installed elsewhere, at work outside the checkout; no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

import shardkit
from shardkit.storage import migrate
from shardkit.storage.connections import connect, value
from shardkit.storage.urls import sqlalchemy_url
from tests.fix_postgres import FreshDatabase

ROOT = Path(__file__).parents[2]

SHIPPED = (
    "_ring.pyx",
    "MANIFEST.in",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "benchmarks",
    "docs",
    "examples",
    "migrations",
    "shardkit",
    "tests",
)
BUILT = ("__pycache__", "*.so", "*.egg-info")

OBJECTS = r"""
SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('shardkit') AND relname <> 'alembic_version'
    AND relname <> 'alembic_version_pkc'
UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = to_regnamespace('shardkit')
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command, which must succeed. It sees nothing of this checkout."""
    inherited = {
        name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "SHARDKIT_"))
    }
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with an sdist, made of a copy of this checkout, and the wheel made of that sdist."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*BUILT))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    (source / "benchmarks" / "results").mkdir(exist_ok=True)
    (source / "benchmarks" / "results" / "measured.json").write_text("{}")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new virtual environment with the wheel in it, and nothing of this checkout."""
    folder = tmp_path_factory.mktemp("a place") / "venv"
    return install(wheel, folder)


def install(wheel: Path, folder: Path) -> Path:
    """The `bin` of a new virtual environment. What shardkit depends on comes from the one that runs the tests."""
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    site = Path(
        run(
            programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--no-index",
        "--no-deps",
        wheel,
        cwd=folder,
    )
    # A path file inside the folder that this one names is not read, so the editable installation there stays unseen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


# --- what is shipped -----------------------------------------------------------------------------------------------


def test_the_sdist_has_sources_only(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "_ring.pyx",
        "setup.py",
        "LICENSE",
        "README.md",
        "shardkit/_ring.pyi",
        "migrations/env.py",
        "Makefile",
        "examples/instagram/models.py",
        "examples/instagram/README.md",
    ):
        assert needed in names
    assert "benchmarks/run.py" in names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_ring.c"))]
    assert not [name for name in names if name.startswith("benchmarks/results")]


def test_the_wheel_has_the_native_core_its_stub_and_the_migrations(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "shardkit/_ring" + sysconfig.get_config_var("EXT_SUFFIX") in names
    assert {"shardkit/py.typed", "shardkit/_ring.pyi", "shardkit/_migrations/env.py"} <= names
    ours = {
        f"shardkit/_migrations/{path.relative_to(ROOT / 'migrations')}"
        for path in (ROOT / "migrations").rglob("*.py")
    }
    ours |= {str(path.relative_to(ROOT)) for path in (ROOT / "shardkit").rglob("*.sql")}
    assert ours <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"shardkit"}


# --- at work outside the checkout ----------------------------------------------------------------------------------


def test_the_package_is_imported_from_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    told = run(
        installed / "python",
        "-c",
        "import json, shardkit, shardkit.core.ring as r; print(json.dumps([shardkit.__file__, r.IMPLEMENTATION]))",
        cwd=tmp_path,
    )
    file, implementation = json.loads(told)
    assert Path(file).is_relative_to(installed.parent)
    assert implementation == "cython"


def test_version(installed: Path, tmp_path: Path) -> None:
    assert shardkit.__version__ in run(installed / "shardkit", "--version", cwd=tmp_path)


def test_init_makes_a_catalog(installed: Path, tmp_path: Path, fresh_database: FreshDatabase) -> None:
    url = fresh_database()
    run(installed / "shardkit", "init", "--catalog", url, cwd=tmp_path)
    with connect(url) as connection:
        assert value(connection, "SELECT count(*) FROM shardkit.cluster") == 1
        version = value(connection, "SELECT version_num FROM shardkit.alembic_version")
    assert str(version).startswith("catalog_")


def test_without_a_compiler_the_ring_runs_in_python(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", tmp_path, sdist, cwd=tmp_path, CC="/bin/false")
    (wheel,) = tmp_path.glob("*.whl")
    programs = install(wheel, tmp_path / "venv")
    told = run(
        programs / "python", "-c", "import shardkit.core.ring as r; print(r.IMPLEMENTATION)", cwd=tmp_path
    )
    assert told.strip() == "python"


# --- the migrations ------------------------------------------------------------------------------------------------


def downgrade(url: str, branch: migrate.Branch) -> None:
    """Take a branch back to nothing; no command does, so nobody's topology goes by mistake."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with create_engine(sqlalchemy_url(url), poolclass=NullPool).connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, f"{branch}@base")
        connection.commit()


@pytest.mark.parametrize("branch", ["catalog", "shard"])
def test_a_branch_upgrades_from_nothing_and_downgrades_to_nothing(
    branch: migrate.Branch, fresh_database: FreshDatabase
) -> None:
    url = fresh_database()
    assert migrate.pending(url, branch)
    migrate.upgrade(url, branch)
    assert not migrate.pending(url, branch)
    with connect(url) as connection:
        assert connection.execute(OBJECTS).fetchall()
    downgrade(url, branch)
    with connect(url) as connection:
        assert connection.execute(OBJECTS).fetchall() == []
    migrate.upgrade(url, branch)  # nothing that a downgrade leaves is in the way
    assert not migrate.pending(url, branch)


def test_one_database_can_be_catalog_and_shard(fresh_database: FreshDatabase) -> None:
    url = fresh_database()
    migrate.upgrade(url, "catalog")
    assert migrate.pending(url, "shard")
    migrate.upgrade(url, "shard")
    migrate.upgrade(url, "catalog")
    assert not migrate.pending(url, "catalog")
    assert not migrate.pending(url, "shard")
