"""Scatter: whether a statement may run on several shards, and how their results become one.

A block may scatter if it has an anchor (`anchor`), so that each of its rows is made on one shard. What it does with
the rows then decides how the shards' results are put together: rows are concatenated, sorted and cut (`arranging`);
totals are added up (`totals`), groups that are spread over shards made of parts (`grouping`). Driven by the
planner; pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CompoundSelect, Select, Table
from sqlalchemy.engine import Dialect

from .anchor import anchored, local_nodes
from .arranging import MOST, Arrangement, arrange
from .binding import possible
from .closure import BlockProof, Node
from .elements import grouped_by, is_set
from .grouping import Grouping, group
from .locality import holds_key, is_grouped, windows_hold_key
from .merge import Merge
from .ownership import BOUNDS, ODD, owned_in
from .prepared import ONCE, Prepared
from .recorder import Call, Compiled
from .refusals import Refusal
from .streaming import Streamed
from .totals import Totals, totals
from .united import as_compiled, as_select, statements, vet_types
from .vetting import vet_scatter
from .vocabulary import TIME_FUNCTIONS


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A SELECT that may run on several shards: what each runs, without and with the ownership predicate, and how the
    results become one."""

    anchor: Node
    plain: Prepared
    owned: Prepared
    merging: Arrangement | Grouping | Totals

    @property
    def reason(self) -> str:
        """Where each row is made, for people."""
        if not self.anchor.branches:
            return f"each row is made on the shard of its {self.anchor}"
        names = ", ".join(dict.fromkeys(str(one.anchor) for one in self.anchor.branches if one.anchor))
        return f"each row is made on the shard of its branch's {names}"

    @property
    def made_once(self) -> bool:
        """Whether branches of its set operation are made on one of its shards, whichever."""
        return any(branch.anchor is None for branch in self.anchor.branches)

    def positions(self, call: Call, parameters: Mapping[str, Any]) -> Mapping[int, Any] | None:
        """The positions that the rows of its anchor can have, or of the anchors of all branches; None if they are not
        known."""
        if not self.anchor.branches:
            return possible(self.anchor.constraints, call, parameters)
        found: dict[int, Any] = {}
        for branch in self.anchor.branches:
            allowed = {} if branch.anchor is None else possible(branch.anchor.constraints, call, parameters)
            if allowed is None:
                return None
            found.update(allowed)
        return found

    def is_wrong(self, call: Call, parameters: Mapping[str, Any]) -> bool:
        """Whether LIMIT or OFFSET are such that any server refuses them."""
        if not isinstance(self.merging, Arrangement):
            return False
        return any(count is not None and count < 0 for count in self.merging.counts(call, parameters))

    def merge(
        self, call: Call, parameters: Mapping[str, Any], dialect: Dialect, streamed: int | None = None
    ) -> tuple[Merge, dict[str, Any]]:
        """The merge of one call, and the parameters that it needs on each shard. ``streamed`` is how many rows of each
        shard are to be at hand at a time."""
        if isinstance(self.merging, Totals):
            return self.merging, {}
        if isinstance(self.merging, Grouping):
            return self.merging.merge(call, parameters, dialect), {}
        limit, offset = self.merging.counts(call, parameters)
        most = None if limit is None else min(limit + (offset or 0), 2**63 - 1)
        own = {} if most is None else {MOST: most}
        if streamed is not None and self.merging.can_stream:
            return Streamed(self.merging, limit, offset, streamed), own
        if streamed is not None and limit is None:
            raise Refusal(
                "stream", f"rows of several shards that are {self.merging.description} are not streamed"
            )
        return self.merging.merge(limit, offset), own


def reading(compiled: Compiled, proofs: list[BlockProof], dialect: Dialect) -> Reading:
    """How a SELECT runs on several shards; `Refusal` if that could answer differently from one database."""
    core, distinct = compiled.statement, False
    if isinstance(core, CompoundSelect):
        top, distinct = as_select(compiled, proofs)
        core, proofs = top.block.statement, [top, *proofs]
    elif compiled.given.is_from_statement:
        raise Refusal("from-statement", "from_statement() runs on one shard")
    elif not isinstance(core, Select) or proofs[0].block.statement is not core:
        raise Refusal("derived", "a common table expression runs on one shard")
    anchor = anchored(proofs)
    vet_scatter(compiled, TIME_FUNCTIONS)
    vet_clauses(core)
    columns = proofs[0].block.columns
    if len(columns) != len(compiled.compiler._result_columns):
        raise Refusal("derived", "its columns cannot be told apart")
    top, rendered = proofs[0], compiled.rendered_name
    local = local_nodes(top, anchor)
    merging: Arrangement | Grouping | Totals
    if is_grouped(core, columns) and not holds_key(grouped_by(core), local, rendered):
        vet_types(compiled, proofs)
        total = totals(core, columns)
        part, merging = (
            (core, total) if total is not None else group(compiled, columns, dialect, as_compiled(compiled))
        )
    else:
        if not windows_hold_key(core, columns, local, rendered):
            raise Refusal("window", "a window function without the shard key in PARTITION BY needs all rows")
        _vet_lock(core)
        distinct = distinct or (bool(core._distinct) and not holds_key(columns, local, rendered))
        part, merging = arrange(
            compiled, core, columns, _identities(compiled, top, columns), distinct=distinct
        )

    def prepared(*, owned: bool) -> Prepared:
        own = {MOST: None, ONCE: None} | ({BOUNDS: None, ODD: None} if owned else {})
        made = part
        if owned and not anchor.branches:
            made = part.where(owned_in(anchor.key, anchor.table.key_type))
        return Prepared(dialect, made, compiled, own, statements(compiled, anchor, owned=owned))

    return Reading(anchor, prepared(owned=False), prepared(owned=True), merging)


_CLAUSES: dict[str, tuple[str, str]] = {
    "_fetch_clause": ("limit", "FETCH"),
    "_distinct_on": ("distinct", "DISTINCT ON"),
    "_prefixes": ("prefix", "a prefix"),
    "_suffixes": ("prefix", "a suffix"),
    "_post_select_clause": ("extension", "a syntax extension"),
    "_pre_columns_clause": ("extension", "a syntax extension"),
    "_post_criteria_clause": ("extension", "a syntax extension"),
    "_post_body_clause": ("extension", "a syntax extension"),
}


def vet_clauses(statement: Any) -> None:
    """`Refusal` for clauses that are not merged."""
    for attribute, (reason, name) in _CLAUSES.items():
        if is_set(getattr(statement, attribute, None)):
            raise Refusal(reason, f"{name} is not merged over shards")


def _vet_lock(core: Any) -> None:
    if core._for_update_arg is not None and (
        core._limit_clause is not None or core._offset_clause is not None
    ):
        raise Refusal(
            "for-update", "FOR UPDATE with LIMIT would lock other rows than those that are returned"
        )


def _identities(compiled: Compiled, proof: BlockProof, columns: Any) -> tuple[tuple[int, ...], ...]:
    """The places of the primary keys among the columns: equal ones on two shards are a conflict."""
    places: dict[tuple[str, str], int] = {}
    for place, column in enumerate(columns):
        table = getattr(column, "table", None)
        if table is not None:
            places.setdefault((compiled.rendered_name(table), str(column.name)), place)
    found: list[tuple[int, ...]] = []
    for node in proof.nodes:
        if node.derived is not None:
            continue
        table = node.source if isinstance(node.source, Table) else node.source.element
        wanted = [places.get((node.name, str(column.name))) for column in table.primary_key.columns]
        here = [place for place in wanted if place is not None]
        if here and len(here) == len(wanted):
            found.append(tuple(here))
    return tuple(found)
