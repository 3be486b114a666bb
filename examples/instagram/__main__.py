"""Runs the example on throw-away PostgreSQL servers, until Ctrl-C.

    python -m examples.instagram [monolith|services] [--plain] [--port 8000]

The monolith is at the port; the services of users, posts, comments and likes are at the port and the three after it.
With ``--plain`` they work on one database, else on two shards, and a database is there that may become a third.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from shlex import quote

from shardkit.dev import Clusters

from .databases import MODELS, make_plain, make_shards

SERVICES = ("users", "posts", "comments", "likes")


def main() -> None:
    """Read the command line, run."""
    parser = argparse.ArgumentParser(prog="python -m examples.instagram")
    parser.add_argument("shape", nargs="?", choices=["monolith", "services"], default="monolith")
    parser.add_argument("--plain", action="store_true", help="on one database instead of two shards")
    parser.add_argument("--port", type=int, default=8000, help="the first port; 0 for any")
    arguments = parser.parse_args()
    apps = (
        {"web": "web"} if arguments.shape == "monolith" else {name: f"services.{name}" for name in SERVICES}
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), _servers(arguments.plain) as servers:
        os.environ["PGPASSFILE"] = str(servers[0].passfile)
        if arguments.plain:
            storage = _plain(servers)
        else:
            storage = _shards(servers)
        environment = {**os.environ, **storage, "INSTAGRAM_SECRET": secrets.token_hex()}
        _serve(apps, arguments.port, environment)


def _servers(plain: bool) -> Clusters:
    return Clusters(1 if plain else 3, settings={"fsync": True})


def _plain(servers: Clusters) -> dict[str, str]:
    url = servers[0].create_database("app")
    make_plain(url)
    return {"DATABASE_URL": url}


def _shards(servers: Clusters) -> dict[str, str]:
    """Make two shards, and tell how to make a third."""
    catalog = servers[0].create_database("catalog")
    one, two, three = (server.create_database("app") for server in servers)
    make_shards(catalog, {"one": one, "two": two})
    print("\nTo add a shard while it runs, in another terminal:\n")
    print(f"export PGPASSFILE={quote(os.environ['PGPASSFILE'])} SHARDKIT_CATALOG={quote(catalog)}")
    print(f"shardkit shard add three {quote(three)} --models {MODELS}\n", flush=True)
    return {"SHARDKIT_CATALOG": catalog}


def _serve(apps: Mapping[str, str], port: int, environment: Mapping[str, str]) -> None:
    """Run a process an application, until all have ended. Who connects before it is ready waits."""
    with ExitStack() as ends:
        running: list[subprocess.Popen[bytes]] = []
        for number, (name, module) in enumerate(apps.items()):
            with socket.create_server(("127.0.0.1", port and port + number), backlog=128) as listening:
                command = [sys.executable, "-m", "uvicorn", f"examples.instagram.{module}:app"]
                command += ["--fd", str(listening.fileno())]
                process = subprocess.Popen(command, env=environment, pass_fds=[listening.fileno()])
                print(f"{name}: http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
            ends.callback(process.wait)
            ends.callback(process.terminate)
            running.append(process)
        for process in running:
            process.wait()


if __name__ == "__main__":
    main()
