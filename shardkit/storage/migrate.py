"""shardkit's own tables, by Alembic: brings the ``catalog`` or the ``shard`` branch of a database to its head.

The scripts are the top-level ``migrations/`` of the source tree, installed as ``shardkit/_migrations``.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from .urls import sqlalchemy_url

Branch = Literal["catalog", "shard"]


def _scripts() -> Path:
    """The folder of the scripts, installed or in a checkout."""
    package = find_spec("shardkit")
    assert package is not None
    assert package.origin is not None
    here = Path(package.origin).parent
    for folder in (here / "_migrations", here.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise RuntimeError(f"no migration scripts beside {here}: the installation is damaged")


def _config() -> Config:
    config = Config()
    # ConfigParser interpolates percent signs, which a path may hold.
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(url: str, branch: Branch) -> None:
    """Bring a branch of the database to its head; nothing happens where it is there already."""
    config = _config()
    engine = create_engine(sqlalchemy_url(url), poolclass=NullPool)
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, f"{branch}@head")
        connection.commit()


@cache
def _heads() -> dict[Branch, str]:
    # Read once: the doctor asks for every shard.
    scripts = ScriptDirectory.from_config(_config())
    branches: tuple[Branch, ...] = ("catalog", "shard")
    return {branch: scripts.get_revision(f"{branch}@head").revision for branch in branches}


def pending(url: str, branch: Branch) -> bool:
    """Whether the branch of the database is behind its head."""
    head = _heads()[branch]
    engine = create_engine(sqlalchemy_url(url), poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table_schema": "shardkit"})
        return head not in context.get_current_heads()
