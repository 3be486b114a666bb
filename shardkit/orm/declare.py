"""Declarations: which tables are sharded, by which column, and what about them cannot work on shards.

`sharded` writes into ``Table.info``; everything else here reads that back. The planner asks for one table
(`sharded_table`), the session for all that a topology must hold (`sharded_tables`), ``cluster.check`` and the doctor
for everything that is wrong at once (`problems`). Never touches a database.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Column, ForeignKeyConstraint, MetaData, Table, UniqueConstraint
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import CompileError, InvalidRequestError
from sqlalchemy.sql.functions import next_value
from sqlalchemy.types import TypeEngine

from shardkit.core.errors import DeclarationError
from shardkit.core.topology import DeclaredTable, HomeTable, KeyType, ReferenceTable, ShardedTable

from . import places
from .places import DEFAULT_SCHEMA, INFO, Problem, is_whole, local_table

T = TypeVar("T")

_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call]  # SQLAlchemy's dialects are untyped
_FAMILIES: tuple[tuple[re.Pattern[str], KeyType], ...] = (
    (re.compile(r"SMALLINT|INTEGER|BIGINT"), "int"),
    # Equal strings hash alike only under a deterministic collation. Which of the named ones are, only a server knows,
    # but those that are built in.
    (re.compile(r'(VARCHAR(\(\d+\))?|TEXT)( COLLATE "(C|POSIX|default|ucs_basic|pg_c_utf8)")?'), "text"),
    (re.compile(r"UUID"), "uuid"),
)


def sharded(*, by: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: the rows of this mapped class are spread over the shards by its attribute ``by``.

    Entities with equal values of their shard keys live on the same shard. In joined inheritance each class is declared.
    """

    def declare(mapped: type[T]) -> type[T]:
        table = local_table(mapped, "sharded")
        mapper: Any = mapped.__dict__["__mapper__"]
        table.info[INFO] = {"sharded_by": _mapped_column(mapper, by).name}
        return mapped

    return declare


def _mapped_column(mapper: Any, by: str) -> Column[Any]:
    try:
        # Other classes may not be defined yet, so nothing here may configure the mappers.
        columns = mapper.get_property(by, _configure_mappers=False).columns
    except (InvalidRequestError, AttributeError):
        columns = []
    for column in columns:
        if column.table is mapper.local_table:
            found: Column[Any] = column
            return found
    raise DeclarationError(
        f"{mapper.class_.__name__} is sharded by {by!r}, which is no column attribute of its table.",
        hint="Name a mapped attribute that is a column of this class's own table.",
    )


# --- one table -----------------------------------------------------------------------------------------------------


def is_sharded(table: Table) -> bool:
    """Whether a table is declared as sharded, rightly or not."""
    return INFO in table.info and not is_whole(table)


def key_column(table: Table) -> Column[Any]:
    """The column of the shard key of a table that is declared as sharded; `DeclarationError` if it has no such one."""
    declared: Any = table.info[INFO]
    name = declared.get("sharded_by") if isinstance(declared, dict) else None
    for column in table.columns:
        if column.name == name:
            return column
    raise DeclarationError(
        f"Table {table.fullname} is sharded by {name!r}, which is none of its columns.",
        hint=f'Set info={{"{INFO}": {{"sharded_by": "<column name>"}}}} to a column of the table.',
    )


def key_family(type_: TypeEngine[Any]) -> KeyType | None:
    """The family of a type whose values PostgreSQL hashes as shardkit does, or None.

    It is read from the DDL of the type, so that decorators and variants count as what the column really is. A type
    that wraps its values in SQL is none: what is compared is then not the value that was bound.
    """
    try:
        ddl = _DIALECT.type_compiler_instance.process(type_)
        wrapped = type_.dialect_impl(_DIALECT)._has_bind_expression or type_._has_bind_expression
    except CompileError:
        return None
    return next((family for shape, family in _FAMILIES if not wrapped and shape.fullmatch(ddl)), None)


_checked: WeakKeyDictionary[Table, ShardedTable] = WeakKeyDictionary()


def sharded_table(table: Table) -> ShardedTable | None:
    """What a table declares, or None if it is not sharded; `DeclarationError` with all that cannot work on shards.

    Foreign keys are looked at by `sharded_tables` only: they may name tables that are not defined yet.
    """
    if not is_sharded(table):
        return None
    known = _checked.get(table)
    if known is not None and known.key == table.info[INFO].get("sharded_by"):
        return known
    _raise(_table_problems(table))
    key = key_column(table)
    family = key_family(key.type)
    assert family is not None
    declared = ShardedTable(
        table.schema or DEFAULT_SCHEMA, str(table.name), str(key.name), family, numbered=_numbered(table, key)
    )
    _checked[table] = declared
    return declared


def is_bigint(type_: TypeEngine[Any]) -> bool:
    """Whether a type is stored as a bigint."""
    return bool(_DIALECT.type_compiler_instance.process(type_) == "BIGINT")


def carries_slot(column: Column[Any]) -> bool:
    """Whether a column's default is `orm.ids.slot_id`: its values are unique over all shards."""
    return bool(getattr(column.default, "carries_slot", False))


# --- all of them ---------------------------------------------------------------------------------------------------


def declared_table(table: Table) -> DeclaredTable | None:
    """What a table declares, whichever kind it is of, or None if nothing; `DeclarationError`."""
    if not is_whole(table):
        return sharded_table(table)
    found = list(places.problems_of(table))
    if any(problem.fatal for problem in found):
        _raise(found)
    return places.whole_table(table)


def declared_tables(metadata: MetaData) -> tuple[DeclaredTable, ...]:
    """The declared tables of a MetaData; `DeclarationError` with every fatal problem of all of them."""
    _raise(problems(metadata))
    found = (declared_table(table) for table in metadata.tables.values())
    return tuple(
        sorted((table for table in found if table is not None), key=lambda table: (table.schema, table.name))
    )


def tables_of_shard(declared: Mapping[Table, DeclaredTable], shard: str) -> list[Table]:
    """Those of the tables that a shard of this name holds."""
    return [
        table for table, found in declared.items() if not isinstance(found, HomeTable) or found.shard == shard
    ]


def sharded_tables(metadata: MetaData) -> tuple[ShardedTable, ...]:
    """The sharded ones of them."""
    return tuple(table for table in declared_tables(metadata) if isinstance(table, ShardedTable))


def problems(metadata: MetaData) -> list[Problem]:
    """Everything in a MetaData that cannot work on shards, or works on each shard alone."""
    found: list[Problem] = []
    for table in sorted(metadata.tables.values(), key=lambda table: table.fullname):
        if is_sharded(table):
            own = list(_table_problems(table))
            found += own
            if not any(problem.fatal for problem in own):
                found += _unique_problems(table)
        elif is_whole(table):
            found += places.problems_of(table)
        found += _foreign_key_problems(table)
    return found


def _raise(all_found: Iterable[Problem]) -> None:
    found = [problem for problem in all_found if problem.fatal]
    if found:
        raise DeclarationError(
            "\n".join(["These tables cannot work on shards:", *(f"  {problem}" for problem in found)]),
            problems=[str(problem) for problem in found],
        )


def _table_problems(table: Table) -> Iterator[Problem]:
    name = table.fullname
    try:
        key = key_column(table)
    except DeclarationError as error:
        yield Problem(name, error.message, error.hint)
        return
    if key_family(key.type) is None:
        yield Problem(
            name,
            f"the shard key {key.name!r} is of type {key.type!r}, which cannot be hashed as PostgreSQL does",
            "use an integer, string (without a collation of its own) or UUID column",
        )
    if key.nullable:
        yield Problem(name, f"the shard key {key.name!r} can be NULL", "add nullable=False")
    if key.server_default is not None or key.identity is not None or key.computed is not None:
        yield Problem(
            name,
            f"the shard key {key.name!r} gets its value from the server, too late to choose the shard",
            "give it a value or a Python default",
        )
    elif table.autoincrement_column is key and key.default is None:
        yield Problem(
            name,
            f"the shard key {key.name!r} is a serial, which gets its value from the server of one shard",
            "add autoincrement=False and give it a value or a Python default",
        )
    if key.default is not None and not (key.default.is_scalar or key.default.is_callable):
        yield Problem(
            name,
            f"the default of the shard key {key.name!r} is SQL, evaluated too late to choose the shard",
            "use a Python value or function",
        )
    if key.onupdate is not None or key.server_onupdate is not None:
        yield Problem(
            name,
            f"the shard key {key.name!r} changes on update",
            "remove onupdate: a shard key never changes",
        )
    for column in table.columns:
        if carries_slot(column) and not is_bigint(column.type) and key_family(column.type) != "uuid":
            yield Problem(
                name,
                f"the column {column.name!r} of type {column.type!r} cannot hold slot-carrying ids",
                "use BigInteger or a UUID",
            )
    yield from _primary_key_problems(table, key)


def _primary_key_problems(table: Table, key: Column[Any]) -> Iterator[Problem]:
    columns = list(table.primary_key.columns)
    if not columns:
        yield Problem(
            table.fullname,
            "it has no primary key, so a move must send whole rows for each update and delete",
            "add a primary key with the shard key in it",
            fatal=False,
        )
    elif not _holds(columns, key) and not any(_unique_over_shards(column) for column in columns):
        listed = ", ".join(column.name for column in columns)
        if _numbered(table, key):
            yield Problem(
                table.fullname,
                f"the primary key ({listed}) is numbered by each shard by itself",
                "before a second shard joins, `shardkit ids split` makes their sequences disjoint",
                fatal=False,
            )
            return
        yield Problem(
            table.fullname,
            f"the primary key ({listed}) can be equal on two shards",
            f"put the shard key {key.name!r} into it, or use slot_id() or a UUID",
        )


def _unique_over_shards(column: Column[Any]) -> bool:
    return carries_slot(column) or key_family(column.type) == "uuid"


def _numbered(table: Table, key: Column[Any]) -> tuple[str, ...]:
    """The columns of a primary key that only a server's sequence makes differ; none if something else does."""
    columns = list(table.primary_key.columns)
    if _holds(columns, key) or any(map(_unique_over_shards, columns)):
        return ()
    return tuple(str(column.name) for column in columns if _is_numbered(column))


def _is_numbered(column: Column[Any]) -> bool:
    """Whether a column gets its values from a sequence by its default on the server. A Sequence that is the Python
    default alone is named by the application, not by the table, so nothing could vouch for it."""
    if key_family(column.type) != "int" or column.default is not None:
        return False
    if column.identity is not None:
        return True
    if column.server_default is not None:
        default = getattr(column.server_default, "arg", None)
        return isinstance(default, next_value) or "nextval(" in str(default)
    return column.table.autoincrement_column is column


def _unique_problems(table: Table) -> Iterator[Problem]:
    key = key_column(table)
    constraints = [
        constraint
        for constraint in table.constraints
        if isinstance(constraint, UniqueConstraint | ExcludeConstraint)
    ]
    unique = [(constraint.name, list(constraint.columns)) for constraint in constraints]
    unique += [(index.name, list(index.columns)) for index in table.indexes if index.unique]
    for name, columns in sorted(unique, key=lambda item: str(item[0])):
        if not _holds(columns, key):
            listed = ", ".join(column.name for column in columns)
            yield Problem(
                table.fullname,
                f"the unique constraint {name or ''} ({listed}) holds on each shard alone".replace("  ", " "),
                f"put the shard key {key.name!r} into it",
                fatal=False,
            )


def _holds(columns: Iterable[Column[Any]], key: Column[Any]) -> bool:
    return any(column is key for column in columns)  # == between columns makes SQL


def _foreign_key_problems(table: Table) -> Iterator[Problem]:
    for constraint in sorted(
        table.foreign_key_constraints, key=lambda constraint: str(constraint.column_keys)
    ):
        problem = _foreign_key_problem(table, constraint)
        if problem is not None:
            yield problem


def _foreign_key_problem(table: Table, constraint: ForeignKeyConstraint) -> Problem | None:
    try:
        target = constraint.referred_table
        pairs = [(element.parent, element.column) for element in constraint.elements]
    except InvalidRequestError:  # NoReferencedTableError, NoReferencedColumnError: create_all tells it better
        return None
    listed = ", ".join(column.name for column in constraint.columns)
    what = f"the foreign key ({listed}) to {target.fullname}"
    if not is_sharded(table) or not is_sharded(target):
        return _between_kinds(table, target, constraint, what)
    try:
        own, other = key_column(table), key_column(target)
    except DeclarationError:  # told by _table_problems
        return None
    if not any(mine is own and theirs is other for mine, theirs in pairs):
        return Problem(
            table.fullname,
            f"{what} can name a row on another shard",
            f"put the shard keys into it: {own.name} referring to {target.fullname}.{other.name}",
        )
    if key_family(own.type) != key_family(other.type):
        return Problem(table.fullname, f"{what} joins shard keys of two types", "use one type for both")
    return None


def _between_kinds(
    table: Table, target: Table, constraint: ForeignKeyConstraint, what: str
) -> Problem | None:
    """A foreign key of which one end at least is not sharded: its rows must be on each shard where the other's are."""
    if places.problem_of_kind(table) or places.problem_of_kind(
        target
    ):  # told where the table itself is looked at
        return None
    own, other = places.whole_table(table), places.whole_table(target)
    if isinstance(other, ReferenceTable) and (own is not None or is_sharded(table)):
        actions = {str(action).upper() for action in (constraint.ondelete, constraint.onupdate) if action}
        if own is None and not actions <= {"RESTRICT", "NO ACTION"}:
            return Problem(
                table.fullname,
                f"{what}, a reference table, would write rows of keys that are on their way to another shard",
                "leave out ON DELETE and ON UPDATE, and change these rows by a statement of their own",
            )
        return None
    if isinstance(own, HomeTable) and isinstance(other, HomeTable) and own.shard == other.shard:
        return None
    if own is None and other is None and not is_sharded(table) and not is_sharded(target):
        return None
    if is_sharded(target):
        return Problem(
            table.fullname, f"{what} names rows that are spread", "declare this table as sharded too"
        )
    if isinstance(own, HomeTable):
        return Problem(
            table.fullname,
            f"{what} leaves the shard {own.shard}",
            f"give {target.fullname} the same home, or declare it as a reference table",
        )
    if is_sharded(table) or own is not None:
        return Problem(
            table.fullname,
            f"{what} leaves the shards",
            f"declare {target.fullname} as sharded too, or as a reference table",
        )
    return Problem(
        table.fullname, f"{what} comes from a table whose place is not known", "declare this table too"
    )
