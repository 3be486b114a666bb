"""How a command ends that did not succeed: an exit code, a message and the next step.

Every exception that leaves a command passes here once. What shardkit raises knows its exit code; what psycopg or
SQLAlchemy raised is told apart by SQLSTATE; the rest is a bug and keeps its traceback. Passwords are taken out of
whatever is printed.
"""

from __future__ import annotations

import re
import traceback
from typing import Any

import psycopg
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from shardkit.core.errors import (
    EXIT_BUG,
    EXIT_USAGE,
    Refused,
    RetryLater,
    ShardkitError,
    Unexpected,
    UsageError,
)

_PASSWORDS = (
    re.compile(r"(?<=://)([^\s/@:]*):[^\s/]*(?=@)"),
    re.compile(r"(\bpassword\s*[=:]\s*)('(?:\\.|[^'\\])*'|[^\s&'\"]+)", re.IGNORECASE),
)


def scrub(text: str) -> str:
    """The text without passwords, of URLs and of connection strings."""
    return _PASSWORDS[1].sub(r"\1***", _PASSWORDS[0].sub(r"\1:***", text))


def understood(error: BaseException) -> ShardkitError:
    """The error as one of the tree: itself, or what a driver's error or a faulty command line means."""
    if isinstance(error, ShardkitError):
        return error
    if isinstance(error, DBAPIError) and isinstance(error.orig, BaseException):
        return understood(error.orig)
    if isinstance(error, psycopg.Error):
        return _of_server(error)
    if isinstance(error, CommandError):
        return Refused(
            f"The tables of schema shardkit were made by another version of shardkit: {error}",
            hint="Install that version or a newer one.",
        )
    if is_faulty_command_line(error):
        return _of_command_line(error)
    return Unexpected(f"{type(error).__name__}: {error}")


def report(error: BaseException, command: str = "shardkit") -> tuple[ShardkitError, str]:
    """The error, and the text for stderr: message, next step, and the traceback of a bug."""
    known = understood(error)
    if type(known) is UsageError and known.hint == UsageError.default_hint():
        known.hint = f"See `{command} --help`."
    text = f"error: {known.message}" + (f"\n{known.hint}" if known.hint else "")
    if known.exit_code == EXIT_BUG:
        text = "".join(traceback.format_exception(error)) + text
    return known, scrub(text)


def document(error: ShardkitError) -> dict[str, Any]:
    """The error for ``--json``: ``error`` (its code), ``message``, ``hint``, ``retryable``, ``exit_code``, fields."""
    return {
        name: scrub(value) if isinstance(value, str) else value
        for name, value in {**error.as_dict(), "exit_code": error.exit_code}.items()
    }


# --- the server's errors -------------------------------------------------------------------------------------------

_LATER = {
    "40": "The server ended this transaction in favour of another one",
    "53": "The server is short of a resource",
    "55": "A lock or an object is in use",
    "57": "The server ended this statement or is shutting down",
}


def _of_server(error: psycopg.Error) -> ShardkitError:
    text = error.diag.message_primary or (str(error).strip().splitlines() or [type(error).__name__])[0]
    state = error.sqlstate
    if isinstance(error, psycopg.OperationalError) and (state is None or state.startswith("08")):
        return RetryLater(
            f"The connection to a database was lost or could not be made: {text}",
            hint="`shardkit status` shows which one; then run the command again.",
            sqlstate=state,
        )
    if state and state[:2] in _LATER:
        return RetryLater(f"{_LATER[state[:2]]}: {text}", hint="Run the command again.", sqlstate=state)
    if state == "42501":
        return Refused(
            f"The database role may not do this: {text}",
            hint="Connect as a role that owns the tables and may create schemas, publications and subscriptions.",
            sqlstate=state,
        )
    if state == "25006":
        return Refused(f"The database is read-only: {text}", hint="Name the primary server.", sqlstate=state)
    if isinstance(error, psycopg.ProgrammingError) and state is None:
        return UsageError(f"The connection parameters are wrong: {text}", hint="Correct the URL.")
    return Unexpected(f"The server refused a statement: {text} (SQLSTATE {state}).", sqlstate=state)


# --- the command line's --------------------------------------------------------------------------------------------


def is_faulty_command_line(error: Any) -> bool:
    """Whether the error is of the parser of command lines."""
    # Typer brings its own copy of click or uses the installed one, by version; the shape of its errors is the same.
    return getattr(error, "exit_code", None) == EXIT_USAGE and hasattr(error, "format_message")


def gave_help(error: BaseException) -> bool:
    """Whether there was no command at all, for which the help has been printed."""
    return is_faulty_command_line(error) and not error.format_message()  # type: ignore[attr-defined]


def _of_command_line(error: Any) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "shardkit"
    return UsageError(error.format_message(), hint=f"See `{path} --help`.")
