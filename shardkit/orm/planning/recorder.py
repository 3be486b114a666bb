"""The recorder: what a statement renders to, seen while SQLAlchemy compiles it.

Relationship joins, ``with_loader_criteria``, inheritance, eager joins and auto-correlation exist only while a statement
is compiled, in subqueries too. So the planner compiles each shape once with a compiler of its own, which renders as the
dialect's does and notes what it sees: every block (SELECT, UPDATE, DELETE) with its FROMs as they are displayed, every
kind of element, every function, every table. Decides nothing.

All use of SQLAlchemy's private compiler interface is in this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol, cast

from sqlalchemy import Select, Table
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import BindParameter, Grouping
from sqlalchemy.sql.selectable import ScalarSelect, SelectStatementGrouping
from sqlalchemy.sql.util import surface_selectables_only
from sqlalchemy.sql.visitors import iterate

_BLOCK = "shardkit_block"
_COMPARING = {"binary", "in_op_binary", "not_in_op_binary"}
_DERIVING = {"subquery", "cte"}


@dataclass(slots=True, eq=False)
class Block:
    """One query block as it is rendered.

    ``statement`` is the Core Select, Update or Delete that the block became; ``froms`` what its FROM clause shows (for
    an UPDATE or DELETE its table first), so not what it correlates to; ``parent`` the block that it stands in, if
    columns of that can be named in it; ``compared`` the comparison whose right side it is, as a whole; ``derived`` the
    subquery or common table expression whose body it is, as a whole; ``given`` is the element of the statement that
    became it, as it stands there.
    """

    statement: Any
    froms: tuple[Any, ...]
    parent: Block | None
    columns: tuple[Any, ...] = ()
    compared: Any = None
    derived: Any = None
    given: Any = None

    @property
    def criteria(self) -> tuple[Any, ...]:
        """The conditions of its WHERE, all of which hold."""
        return tuple(self.statement._where_criteria)


@dataclass(slots=True, eq=False)
class Compound:
    """One set operation as it is rendered: its element, the subquery or common table expression whose body it is, as a
    whole, and its branches, in order."""

    element: Any
    derived: Any
    branches: list[Block | Compound] = field(default_factory=list)


@dataclass(slots=True)
class Recording:
    """What was seen. ``kinds`` are the names of the visits (``visit_select`` is "select") and how many there were,
    ``elements`` those of interest by kind, ``tables`` the tables in rendered FROMs."""

    blocks: list[Block] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    elements: dict[str, list[Any]] = field(default_factory=dict)
    tables: Counter[Table] = field(default_factory=Counter)
    foreign: list[str] = field(default_factory=list)
    compounds: list[Compound] = field(default_factory=list)
    """Set operations, outer ones first."""
    uniting: list[Compound] = field(default_factory=list)
    """Those whose branches are being rendered."""
    selecting: Any = None
    """A SELECT that is about to be rendered."""
    comparing: Any = None
    """A comparison whose right side is about to be rendered."""
    deriving: Any = None
    """A subquery or common table expression whose body is about to be rendered."""

    def saw(self, kind: str, element: Any, as_from: bool) -> None:
        """Note one visit of the compiler."""
        self.kinds[kind] += 1
        self.elements.setdefault(kind, []).append(element)
        if kind in _COMPARING:
            self.comparing = element
        elif kind in _DERIVING:
            self.deriving = element
        elif kind == "select":
            self.selecting = element
        if kind == "table" and as_from:
            self.tables[element] += 1

    def unite(self, element: Any, *, inside: bool) -> None:
        """Note that a set operation begins, which is a branch of another one (``inside``) or none."""
        found = Compound(element, None if inside else self.deriving)
        self.deriving = None
        if inside:
            self.uniting[-1].branches.append(found)
        self.compounds.append(found)
        self.uniting.append(found)


class _RecorderMixin:
    """Compiler methods that note and then do what the dialect's compiler does."""

    recording: Recording
    stack: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.recording = Recording()
        super().__init__(*args, **kwargs)

    def _enclosing(self, entries: Sequence[Any]) -> Block | None:
        return next((entry[_BLOCK] for entry in reversed(entries) if _BLOCK in entry), None)

    def _setup_select_stack(
        self,
        select: Any,
        compile_state: Any,
        entry: Any,
        asfrom: bool,
        lateral: bool,
        compound_index: int | None,
    ) -> Any:
        inherited: Any = super()
        froms = inherited._setup_select_stack(select, compile_state, entry, asfrom, lateral, compound_index)
        columns = tuple(column for _, _, _, column, _ in compile_state.columns_plus_names)
        # A subquery in a FROM sees nothing of the block around it, unless it is LATERAL.
        parent = None if asfrom and not lateral else self._enclosing(self.stack[:-1])
        block = Block(
            select, tuple(froms), parent, columns, *self._role(compound_index), given=self.recording.selecting
        )
        self.stack[-1][_BLOCK] = block
        self.recording.blocks.append(block)
        if compound_index is not None:
            self.recording.uniting[-1].branches.append(block)
        return froms

    def _role(self, compound_index: int | None) -> tuple[Any, Any]:
        """The comparison that this SELECT is the right side of, and the FROM that it is the body of: nothing else was
        begun since."""
        recording = self.recording
        comparing, recording.comparing = recording.comparing, None
        deriving, recording.deriving = recording.deriving, None
        if compound_index is not None:
            return None, None
        right = getattr(comparing, "right", None)
        while isinstance(right, Grouping | ScalarSelect | SelectStatementGrouping):
            right = right.element
        return comparing if isinstance(right, Select) else None, deriving

    def _enter_dml(self, statement: Any, table: Any, extra_froms: Sequence[Any]) -> None:
        block = Block(statement, (table, *extra_froms), self._enclosing(self.stack[:-1]))
        self.stack[-1][_BLOCK] = block
        self.recording.blocks.append(block)

    def update_tables_clause(
        self, update_stmt: Any, from_table: Any, extra_froms: Sequence[Any], **kw: Any
    ) -> Any:
        self._enter_dml(update_stmt, from_table, extra_froms)
        inherited: Any = super()
        return inherited.update_tables_clause(update_stmt, from_table, extra_froms, **kw)

    def delete_table_clause(
        self, delete_stmt: Any, from_table: Any, extra_froms: Sequence[Any], **kw: Any
    ) -> Any:
        self._enter_dml(delete_stmt, from_table, extra_froms)
        inherited: Any = super()
        return inherited.delete_table_clause(delete_stmt, from_table, extra_froms, **kw)


def _noting(kind: str, visit: Callable[..., Any]) -> Callable[..., Any]:
    def noted(self: Any, element: Any, *args: Any, **kw: Any) -> Any:
        recording = self.recording
        around = recording.deriving
        recording.saw(kind, element, bool(kw.get("asfrom")))
        if kind == "compound_select":
            recording.unite(element, inside=kw.get("compound_index") is not None)
        rendered = visit(self, element, *args, **kw)
        if kind == "compound_select":
            recording.uniting.pop()
        elif kind in _COMPARING:
            recording.comparing = None
        elif kind in _DERIVING:
            recording.deriving = around
        return rendered

    return noted


@cache
def _recorder(compiler: Any) -> Any:
    """The compiler of a dialect, noting."""
    visits = {
        name: _noting(name.removeprefix("visit_"), getattr(compiler, name))
        for name in dir(compiler)
        if name.startswith("visit_") and name != "visit_unsupported_compilation"
    }
    return type("Recorder", (_RecorderMixin, compiler), visits)


class Compiled:
    """A compiled statement and its recording."""

    def __init__(self, dialect: Dialect, statement: Any, column_keys: Sequence[str], many: bool) -> None:
        self.column_keys = column_keys
        self.cache_key = statement._generate_cache_key()
        # The ORM notes compile options on the statement that it compiles, and with them a copy of that statement would
        # have another cache key: so what is compiled here is a copy.
        self.compiler: Any = _recorder(cast(Any, dialect.statement_compiler))(
            dialect,
            statement._generate(),
            cache_key=self.cache_key,
            column_keys=list(column_keys),
            for_executemany=many,
        )
        self.recording: Recording = self.compiler.recording
        self.given = statement
        self.state: Any = self.compiler.dml_compile_state or self.compiler.compile_state
        self.statement: Any = self.state.statement
        self.recording.foreign += self._custom_elements()

    def _custom_elements(self) -> Iterator[str]:
        """Elements that render themselves (``@compiles``), past every visit above."""
        for root in (self.statement, *(block.statement for block in self.recording.blocks)):
            for element in iterate(root):
                if getattr(type(element), "_compiler_dispatcher", None) is not None:
                    yield type(element).__name__

    @property
    def call(self) -> Call:
        """The values that it was compiled with."""
        return (
            cast(Call, self.cache_key) if self.cache_key else Uncached(None, self.compiler._collected_params)
        )

    def rendered_name(self, from_: Any) -> str:
        """The name by which columns of a FROM are qualified in the SQL."""
        name = getattr(from_, "name", None)
        if hasattr(name, "apply_map"):
            return str(self.compiler._truncated_identifier("alias", name))
        return str(name)

    def locked(self, block: Block) -> set[str] | None:
        """The names of the FROMs whose rows a block locks by FOR UPDATE or FOR SHARE; None if all of them."""
        lock = getattr(block.statement, "_for_update_arg", None)
        if lock is None:
            return set()
        if not lock.of:
            return None
        return {self.rendered_name(from_) for one in lock.of for from_ in surface_selectables_only(one)}

    def column_of_insert(self, column: Any, value: BindParameter[Any] | None) -> BindParameter[Any] | None:
        """The bound value of a column in VALUES, or None if it has none. ``value`` is the one in the statement."""
        named = value is not None and not value.unique
        name = value.key if value is not None and named else self.compiler._get_bind_name_for_col(column)
        found: BindParameter[Any] | None = self.compiler.binds.get(name)
        return found

    def slot(self, bind: BindParameter[Any]) -> Slot | None:
        """How to find the value of a bound parameter in later calls, or None if it is not rendered."""
        name = self.compiler.bind_names.get(bind)
        if name is None:
            return None
        index = None
        if self.cache_key is not None:
            matches, _ = self.compiler._cache_key_bind_match
            for number, extracted in enumerate(self.cache_key.bindparams):
                if any(
                    hash(match) == hash(bind) for match in matches[extracted]
                ):  # annotated ones hash alike
                    index = number
        return Slot(bind, bind.key, name, index, self.compiler._bind_processors.get(name))

    def occurrences(self, bind: BindParameter[Any]) -> int:
        """How often a bound parameter is rendered."""
        return sum(
            self.compiler.bind_names.get(seen) == self.compiler.bind_names.get(bind)
            for seen in self.recording.elements.get("bindparam", ())
        )


MISSING = object()
"""In the place of a value that is not given."""


class Call(Protocol):
    """The values that a statement at hand holds; its cache key is one."""

    @property
    def bindparams(self) -> Sequence[BindParameter[Any]] | None:
        """Its bound parameters, in the order of its cache key; None if it has no cache key."""
        ...

    @property
    def params(self) -> Mapping[str, Any] | None:
        """The values set by ``params()``."""
        ...


class Uncached(NamedTuple):
    """The values of a statement that has no cache key: those it was compiled with."""

    bindparams: None
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where the value of a bound parameter comes from, as SQLAlchemy takes it: by name from the parameters of the call
    or those set by ``params()``, else from the statement at hand (``index`` among its cache key's parameters), else
    from the compiled statement."""

    bind: BindParameter[Any]
    key: str
    name: str
    index: int | None
    processor: Any

    def processed(self, value: Any) -> Any:
        """What is sent for a value."""
        return value if self.processor is None else self.processor(value)

    def sent(self, value: Any, part: int | None = None) -> Any:
        """What is sent for a value, or for one ``part`` of a tuple; `MISSING` if that cannot be told."""
        processor = self.processor
        try:
            if part is not None:
                value = value[part]
                processor = processor and processor[part]
            return value if processor is None or value is MISSING else processor(value)
        except Exception:  # of an application's own type: it is raised again where the statement runs
            return MISSING

    def value(self, call: Call, parameters: Mapping[str, Any]) -> Any:
        """The raw value in one call; `MISSING` if it has none yet."""
        if parameters or call.params:
            for name in (self.key, self.name):
                if name in parameters:
                    return parameters[name]
                if call.params and name in call.params:
                    return call.params[name]
        if self.bind.required:
            return MISSING
        source = self.bind if self.index is None or call.bindparams is None else call.bindparams[self.index]
        return source.effective_value if self.bind.callable else source.value
