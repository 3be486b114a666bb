"""Routing: from a statement to the shards that answer it, by proof.

Driven by the session: `Planner.plan` for each statement, `Plan.route` for each topology that is tried. Pure: never
opens a connection, never looks at rows.

The promise is that a statement returns what one database would have returned, or raises `UnroutableQuery`. So a
statement runs on one shard if every sharded FROM of every block is bound to one position (`proof`); on several if
its rows are each made on one shard and its result can be put together exactly (`scatter`); row by row if it
writes rows (`rows`); and else not at all. What is not known by name is refused (`vetting`). No answer and no
refusal depends on the topology: two keys that live on one shard today are two keys.

Proofs are kept by SQLAlchemy's own cache key, so by the shape of a statement; each call only looks at its values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Delete, Executable, Insert, Select, Update
from sqlalchemy.engine import Dialect
from sqlalchemy.orm.context import FromStatement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import CompoundSelect

from shardkit.orm.ids import leasing
from shardkit.storage.idleases import IdLeases

from .binding import Terms, terms
from .clock import asks_the_time
from .insertselect import InsertSelectProof, prove_insert_select
from .kept import Kept
from .plan import Parameters, Plan, Route, ShardPart
from .proof import prove
from .recorder import Compiled
from .refusals import Refusal
from .rows import InsertProof, plan_bulk_insert, plan_bulk_update, plan_values, prove_insert
from .statements import PlannerFacts, StatementProof, prove_statement
from .vetting import vet_insert_scatter, vet_one_shard
from .whole import (
    WholeProof,
    is_declared_whole,
    is_whole,
    plan_bulk_whole,
    plan_values_whole,
    prove_insert_whole,
)

__all__ = ["Parameters", "Plan", "Planner", "Route", "ShardPart"]

MOST_ROWS = 100_000

_Proof = StatementProof | InsertProof | InsertSelectProof | WholeProof

_NO_PARAMETERS: Mapping[str, Any] = {}
_PLANNED = (Select, CompoundSelect, FromStatement, Insert, Update, Delete)


class Planner:
    """Plans statements for one dialect; safe to share between threads. ``size`` bounds the statement shapes kept;
    ``most_rows`` is how many rows of a table may be read from its shards for one statement; ``ids`` makes shard keys
    that are ids by default."""

    def __init__(
        self, dialect: Dialect, *, size: int = 500, most_rows: int = MOST_ROWS, ids: IdLeases | None = None
    ) -> None:
        self._dialect = dialect
        self._most_rows = most_rows
        self._ids = ids
        self._proofs: Kept[tuple[_Proof, bool]] = Kept(size)

    def plan(
        self,
        statement: Executable,
        parameters: Parameters = None,
        execution_options: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Understand a statement and the values it is called with.

        Call it after autoflush, with what is given to the connection. `UnroutableQuery` if it cannot be proved right on
        shards, `KeyTypeError` if it writes a row whose shard key is no key, `DeclarationError` if a table of it is
        declared wrongly.
        """
        try:
            if self._ids is None or not getattr(statement, "is_insert", False):
                return self._plan(statement, parameters, execution_options or {})
            with leasing(self._ids):
                return self._plan(statement, parameters, execution_options or {})
        except Refusal as refusal:
            raise refusal.error() from None

    def _plan(self, statement: Any, parameters: Parameters, options: Mapping[str, Any]) -> Plan:
        if options.get("schema_translate_map"):
            raise Refusal("schema-map", "schema_translate_map hides which tables it names")
        if type(statement) is Select:
            return self._plan_shape(statement, parameters, options)
        if isinstance(statement, FunctionElement):
            statement = statement.select()
        if not isinstance(statement, _PLANNED):
            raise _unplanned(statement)
        bulk = _bulk_mapper(statement, parameters, options)
        if bulk is not None:
            rows = parameters if isinstance(parameters, Sequence) else [parameters or {}]
            if is_whole(bulk):
                return plan_bulk_whole(statement, rows, bulk)
            if isinstance(statement, Insert):
                return plan_bulk_insert(statement, rows, bulk)
            return plan_bulk_update(statement, rows, bulk)
        return self._plan_shape(statement, parameters, options)

    def _plan_shape(self, statement: Any, parameters: Parameters, options: Mapping[str, Any]) -> Plan:
        single: Mapping[str, Any] | None = None
        names: tuple[str, ...] = ()
        if not parameters:
            single = _NO_PARAMETERS
        elif isinstance(parameters, Mapping):
            single = parameters
            names = tuple(sorted(single))
        else:
            names = tuple(sorted(parameters[0]))
            if len(parameters) == 1:
                single = parameters[0]
        call = statement._generate_cache_key()
        shape = None if call is None else (call.key, names, single is None)
        known = None if shape is None else self._proofs.get(shape)
        if known is None:
            facts = self._facts(names, single is None)
            compiled = facts.compile_(statement)
            vet_one_shard(compiled)
            call = compiled.call
            timed = asks_the_time(compiled)
            whole = isinstance(compiled.statement, Insert) and is_declared_whole(compiled.statement.table)
            if isinstance(compiled.given, Insert) and compiled.state._has_multi_parameters:
                if whole:
                    plan = plan_values_whole(statement, parameters, compiled)
                else:
                    plan = plan_values(statement, parameters, compiled, *_insert_facts(compiled))
                plan.asks_the_time = timed
                return plan
            proof: _Proof
            if whole:
                proof = prove_insert_whole(compiled)
            elif isinstance(compiled.statement, Insert) and compiled.statement.select is not None:
                _vet_insert(compiled)
                proof = prove_insert_select(compiled, self._facts(names, False))
            elif isinstance(compiled.statement, Insert):
                proof = prove_insert(compiled, *_insert_facts(compiled))
            else:
                proof = prove_statement(compiled, facts)
            known = proof, timed
            if shape is not None:
                self._proofs.put(shape, known)
        proof, timed = known
        if isinstance(proof, WholeProof | InsertSelectProof):
            plan = proof.plan(statement, parameters)
        elif isinstance(proof, InsertProof):
            plan = proof.plan(statement, parameters, call)
        elif single is None:
            assert isinstance(parameters, Sequence)
            plan = proof.plan_each(statement, parameters, call)
        else:
            plan = proof.plan(statement, parameters, single, call, options, self._facts(names, False))
        if timed:
            plan.asks_the_time = True
        return plan

    def _facts(self, names: Sequence[str], many: bool) -> PlannerFacts:
        return PlannerFacts(
            self._dialect,
            lambda statement: Compiled(self._dialect, statement, names, many),
            self._most_rows,
        )


def _unplanned(statement: Any) -> Refusal:
    if getattr(statement, "_is_text_clause", False) or getattr(statement, "_is_textual", False):
        return Refusal("text", "text() can name any table")
    return Refusal("unknown-statement", f"{type(statement).__name__} is not a statement that can be routed")


def _bulk_mapper(statement: Any, parameters: Parameters, options: Mapping[str, Any]) -> Any:
    """The mapper of a bulk operation of the ORM, or None if this is none."""
    subject = statement._propagate_attrs.get("plugin_subject")
    if not parameters or subject is None or not isinstance(statement, Insert | Update):
        return None
    strategy = statement._annotations.get("dml_strategy") or options.get("dml_strategy") or "auto"
    if isinstance(statement, Update):
        bulk = isinstance(parameters, Sequence) and "parententity" in statement.table._annotations
        return subject.mapper if bulk and strategy in ("auto", "bulk") else None
    return subject.mapper if strategy in ("auto", "bulk") else None


def _vet_insert(compiled: Compiled) -> None:
    """`Refusal` of an INSERT that is not the whole statement."""
    if compiled.given.is_from_statement:
        raise Refusal("from-statement", "from_statement() of an INSERT is not routed: use its returning()")
    if (
        compiled.recording.kinds["insert"] > 1
        or compiled.recording.kinds["update"]
        or compiled.recording.kinds["delete"]
    ):
        raise Refusal("dml-in-cte", "a writing statement inside another is not routed")


def _insert_facts(compiled: Compiled) -> tuple[tuple[Terms, ...], Refusal | None]:
    """The terms of the subqueries of an INSERT, and why its rows cannot go to several shards."""
    _vet_insert(compiled)
    proofs = prove(compiled)
    if any(block.homes for block in proofs):
        raise Refusal("home", "a subquery in an INSERT of sharded rows names a home table")
    blocks = tuple(terms(block) for block in proofs)
    try:
        if blocks:
            raise Refusal("subquery", "a subquery in an INSERT of rows of several shard keys is not routed")
        vet_insert_scatter(compiled)
    except Refusal as refusal:
        return blocks, refusal.again()
    return blocks, None
