"""Makes what the example's storage stands on: one database with its tables, or a catalog and shards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping

from sqlalchemy import create_engine

from .models import Base
from .storage import driver_url

MODELS = "examples.instagram.models:Base"


def make_plain(url: str) -> None:
    """The tables, on one database."""
    engine = create_engine(driver_url(url))
    Base.metadata.create_all(engine)
    engine.dispose()


def shardkit(*arguments: str) -> None:
    """Run a command of shardkit, in the root of the checkout."""
    subprocess.run([sys.executable, "-m", "shardkit", *arguments], check=True)


def make_shards(catalog: str, shards: Mapping[str, str], run: Callable[..., None] = shardkit) -> None:
    """A catalog, and databases by name as its shards, by the commands that an operator would type."""
    (first, url), *others = shards.items()
    run("init", "--catalog", catalog)
    run("shard", "add", first, url, "--catalog", catalog)
    run("schema", "declare", MODELS, "--create", "--catalog", catalog)
    for name, url in others:
        run("shard", "add", name, url, "--models", MODELS, "--yes", "--catalog", catalog)
