"""Whole tables: those that are not spread. A reference table is whole on every shard, a home table on one.

`reference` and `home` write into ``Table.info``; the rest reads that back, and finds what would make the rows of a
reference table differ from shard to shard. Driven by `orm.declare`. Never touches a database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Column, Table
from sqlalchemy.sql.elements import ColumnElement, False_, Null, TextClause, True_

from shardkit.core.errors import DeclarationError
from shardkit.core.topology import SHARD_NAME, HomeTable, ReferenceTable, WholeTable
from shardkit.storage import tables

INFO = "shardkit"
"""The entry of ``Table.info``: ``{"sharded_by": "<column name>"}``, ``{"reference": True}`` or ``{"home": "<shard
name>"}``."""

DEFAULT_SCHEMA = "public"
"""Where a table without a schema is taken to be."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """What about a table cannot work on shards, and what to do. ``fatal`` ones refuse the table; the others are true
    on one shard only and so weaker than they look."""

    table: str
    what: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.table}: {self.what}: {self.fix}"


# --- declaring -----------------------------------------------------------------------------------------------------


def reference(mapped: type[T]) -> type[T]:
    """Class decorator: every shard holds the rows of this mapped class, all of them.

    For small tables that are read everywhere and written seldom: statements may join them to any sharded entity. A
    write goes to all shards, in a session whose ``mode`` lets it write several.
    """
    local_table(mapped, "reference").info[INFO] = {"reference": True}
    return mapped


def home(shard: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: the rows of this mapped class live on the shard of this name, and nowhere else."""
    name: object = shard  # whatever was given: @home without parentheses gives a class
    if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
        raise DeclarationError(
            f"{shard!r} is not the name of a shard.", hint='Write it as in @home("main"), with parentheses.'
        )

    def declare(mapped: type[T]) -> type[T]:
        local_table(mapped, "home").info[INFO] = {"home": shard}
        return mapped

    return declare


def local_table(mapped: Any, decorator: str) -> Table:
    """The table of a mapped class's own; `DeclarationError` if it has none."""
    mapper: Any = getattr(mapped, "__dict__", {}).get("__mapper__")
    if mapper is None or not isinstance(mapper.local_table, Table):
        raise DeclarationError(
            f"{getattr(mapped, '__name__', mapped)} is not mapped to a table.",
            hint=f"Put @{decorator} above a class with a table of its own.",
        )
    table: Table = mapper.local_table
    return table


# --- one table -----------------------------------------------------------------------------------------------------


def is_whole(table: Table) -> bool:
    """Whether a table is declared as a reference or home table, rightly or not."""
    declared = table.info.get(INFO)
    return isinstance(declared, dict) and ("reference" in declared or "home" in declared)


def whole_table(table: Table) -> WholeTable | None:
    """What a table declares, or None if it is no reference or home table."""
    if not is_whole(table):
        return None
    schema, name, declared = table.schema or DEFAULT_SCHEMA, str(table.name), table.info[INFO]
    if "home" in declared:
        return HomeTable(schema, name, str(declared["home"]))
    return ReferenceTable(schema, name)


def problem_of_kind(table: Table) -> Problem | None:
    """Why it is not clear what kind of table this is, if so."""
    if not is_whole(table):
        return None
    declared = table.info[INFO]
    home_ = declared.get("home")
    known = declared == {"reference": True} or (
        len(declared) == 1 and isinstance(home_, str) and SHARD_NAME.fullmatch(home_)
    )
    if known:
        return None
    return Problem(
        table.fullname,
        f"it is declared as {declared!r}, which is no kind of table",
        f'set info={{"{INFO}": {{"reference": True}}}} or {{"{INFO}": {{"home": "<shard name>"}}}}',
    )


def problems_of(table: Table) -> Iterator[Problem]:
    """What about a reference or home table cannot work."""
    unclear = problem_of_kind(table)
    if unclear is not None:
        yield unclear
    elif isinstance(whole_table(table), ReferenceTable):
        for column in table.columns:
            what = _made_by_the_shard(table, column)
            if what is not None:
                yield Problem(
                    table.fullname,
                    f"{what} of the reference table's column {column.name!r} would differ from shard to shard",
                    "give it a value, a Python default, or a constant",
                )


def _made_by_the_shard(table: Table, column: Column[Any]) -> str | None:
    """What of a column each shard would make by itself."""
    if column.identity is not None:
        return "the identity"
    if table.autoincrement_column is column and column.default is None and column.server_default is None:
        return "the serial value (without autoincrement=False)"
    if column.computed is None:  # computed from the row alone: the server allows nothing else
        if column.server_default is not None and not is_constant(getattr(column.server_default, "arg", None)):
            return "the server default"
        if column.server_onupdate is not None:
            return "the server's onupdate"
    for name, made in (("default", column.default), ("onupdate", column.onupdate)):
        if made is not None and not (made.is_scalar or made.is_callable):
            return f"the SQL {name}"
    return None


def is_constant(default: Any) -> bool:
    """Whether a server default is the same value wherever and whenever it is evaluated; if that can be told."""
    if isinstance(default, True_ | False_ | Null):
        return True
    if isinstance(default, TextClause):
        return tables.is_constant(default.text)
    if isinstance(default, ColumnElement):
        return False
    return isinstance(default, str) and tables.is_constant("'{}'".format(default.replace("'", "''")))
