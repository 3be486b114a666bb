"""URLs of databases: one spelling in, what libpq and SQLAlchemy want out; passwords never kept.

Accepted are ``postgresql://`` and ``postgresql+psycopg://`` URLs with libpq's parameters in the query part, several
hosts included. Passwords come from where libpq looks for them (environment, passfile, service file).
"""

from __future__ import annotations

from psycopg.conninfo import make_conninfo
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError

from shardkit.core.errors import UsageError

_DRIVER = "postgresql+psycopg"


def sqlalchemy_url(url: str) -> URL:
    """The URL for ``create_engine``, with the psycopg driver; `UsageError` if it is no PostgreSQL URL."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise UsageError(
            "This is no database URL.", hint="It looks like postgresql://user@host:5432/database."
        ) from error
    if parsed.get_backend_name() != "postgresql":
        raise UsageError(
            f"Not a PostgreSQL URL: {redacted_url(parsed)}",
            hint="It looks like postgresql://user@host:5432/database.",
        )
    return parsed.set(drivername=_DRIVER)


def conninfo(url: str, **extra: str | int | None) -> str:
    """The libpq connection string of a URL, with further parameters."""
    dialect: Dialect = PGDialect_psycopg()  # type: ignore[no-untyped-call]
    try:
        _, options = dialect.create_connect_args(sqlalchemy_url(url))
    except ArgumentError as error:
        raise UsageError(
            f"The URL cannot be understood: {redacted(url)}: {error}",
            hint="Several hosts look like postgresql://user@/database?host=one:5432&host=two:5432.",
        ) from error
    return make_conninfo("", **{**options, **extra})


def redacted_url(url: URL) -> str:
    """A parsed URL for people: the password as ``***``, wherever it stands."""
    query = {name: "***" if name == "password" else value for name, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


def redacted(url: str) -> str:
    """A URL for people: the password as ``***``."""
    return redacted_url(sqlalchemy_url(url).set(drivername="postgresql"))


def without_password(url: str) -> str:
    """The URL as it is stored: no password anywhere in it."""
    parsed = sqlalchemy_url(url)
    query = {name: value for name, value in parsed.query.items() if name != "password"}
    bare = URL.create("postgresql", parsed.username, None, parsed.host, parsed.port, parsed.database, query)
    return bare.render_as_string(hide_password=False)
