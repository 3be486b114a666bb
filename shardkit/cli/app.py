"""The program: its commands, the flags before them, and the one place where every command ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, NoReturn

import typer

from shardkit import __version__
from shardkit.core.errors import EXIT_OK, EXIT_USAGE
from shardkit.core.ring import IMPLEMENTATION

from . import doctor, failures, ids, init, rebalance, route, schema, shard, status, transactions, verify
from .options import CATALOG_VARIABLE, JSON_VARIABLE
from .output import narrate, wants_json, write

PROGRAM = "shardkit"

app = typer.Typer(
    name=PROGRAM,
    help="Spread SQLAlchemy entities over PostgreSQL servers and move them online.",
    epilog="Exit codes: 0 ok, 1 bug, 2 usage, 3 refused, 4 verification failed, 5 retry later.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (init, shard, schema, ids, rebalance, transactions, route, status, doctor, verify):
    module.register(app)
if find_spec("shardkit.cli.demo") is not None:
    import_module("shardkit.cli.demo").register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__} (ring: {IMPLEMENTATION})")
        raise typer.Exit


@app.callback()
def flags(
    catalog: Annotated[
        str | None, typer.Option("--catalog", metavar="URL", help="As after the command.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As after the command.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Spread SQLAlchemy entities over PostgreSQL servers and move them online."""
    if catalog is not None:
        os.environ[CATALOG_VARIABLE] = catalog
    if as_json:
        os.environ[JSON_VARIABLE] = "1"


def run(arguments: Sequence[str]) -> int:
    """Run a command line; its exit code. Nothing but SystemExit of the interpreter itself passes through."""
    try:
        code = app(list(arguments), prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else EXIT_OK
    except Exception as error:
        return _ended_by(error, arguments)


def _ended_by(error: Exception, arguments: Sequence[str]) -> int:
    if failures.gave_help(error):
        return EXIT_USAGE
    known, text = failures.report(error, _command(arguments))
    if wants_json(arguments):
        write(json.dumps(failures.document(known), indent=2, ensure_ascii=False) + "\n")
    narrate(text)
    return known.exit_code


def _command(arguments: Sequence[str]) -> str:
    """The command of a command line, with the program's name."""
    command: Any = typer.main.get_command(app)
    path = [PROGRAM]
    for argument in arguments:
        if argument in getattr(command, "commands", ()):
            command = command.commands[argument]
            path.append(argument)
    return " ".join(path)


def main() -> NoReturn:
    """The entry point of the installed program."""
    sys.exit(run(sys.argv[1:]))
