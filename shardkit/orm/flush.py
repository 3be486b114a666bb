"""A flush, before it begins: keys by default, and the shards that it will write held all at once.

Driven by SQLAlchemy's ``before_flush``. What a flush writes is known only while it runs, as it hands keys from parents
to children; but what is known already is provisioned here, so that a refusal comes before the first statement and a
stale fence costs one new route. Instances whose key comes from a parent are left to the flush itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy.orm import InstanceState, Mapper, RelationshipDirection
from sqlalchemy.orm.attributes import instance_state

from shardkit.core.topology import DeclaredTable, HomeTable, ReferenceTable, ShardedTable, Topology

from . import replicated
from .declared import declared_of
from .ids import leasing
from .keys import fill_default_key, instance_position, mapped_key
from .planning.carriers import vet_instance

if TYPE_CHECKING:
    from .session import ShardSession


@dataclass(frozen=True, slots=True)
class Mapped:
    """What a flush must know of a mapped class: its tables, its key (None if they are reference or home tables), and
    the relationships that set the key."""

    tables: tuple[DeclaredTable, ...]
    key: str | None
    parents: tuple[str, ...]


_mapped: WeakKeyDictionary[Mapper[Any], Mapped] = WeakKeyDictionary()


def mapped(mapper: Mapper[Any]) -> Mapped:
    """The facts of a mapped class; `DeclarationError` or `UnroutableQuery` if it is not declared."""
    known = _mapped.get(mapper)
    if known is None:
        known = _mapped[mapper] = _find(mapper)
    return known


def _find(mapper: Mapper[Any]) -> Mapped:
    tables = tuple(declared_of(table) for table in mapper.tables)
    if not any(isinstance(table, ShardedTable) for table in tables):
        return Mapped(tables, None, ())
    key = mapped_key(mapper)
    parents = tuple(
        relationship.key
        for relationship in mapper.relationships
        if relationship.direction is RelationshipDirection.MANYTOONE
        and key.column in relationship.local_columns
    )
    return Mapped(tables, key.attribute, parents)


@dataclass(frozen=True, slots=True)
class _Several:
    shards: frozenset[int]


def provision_flush(session: ShardSession) -> None:
    """Give new instances their default keys and hold every shard that is known to be written."""
    positions: set[int] = set()
    tables: set[DeclaredTable] = set()
    with leasing(session.cluster.ids):
        for instance, facts in _to_be_written(session):
            if facts.key is not None:
                at = instance_position(instance)
                vet_instance(instance, at)
                positions.add(at)
            tables.update(facts.tables)
    if not tables:
        return
    references = [table for table in tables if isinstance(table, ReferenceTable)]
    homes = {table.shard for table in tables if isinstance(table, HomeTable)}
    replicated.admit(session.mode, references)

    def route(topology: Topology) -> _Several:
        owners = set(map(topology.ring.owner_at, positions))
        owners.update(topology.named(name).id for name in homes)
        return _Several(frozenset(topology.by_id if references else owners))

    shards = session.shards.provision(route, tables=tables, writes=True).shards
    replicated.lock(session, references, shards)


def _to_be_written(session: ShardSession) -> Iterator[tuple[object, Mapped]]:
    for instance in session.new:
        state: InstanceState[Any] = instance_state(instance)
        facts = mapped(state.mapper)
        if facts.key is None:
            yield instance, facts
            continue
        if any(state.dict.get(parent) is not None for parent in facts.parents):
            continue
        fill_default_key(instance)
        if state.dict.get(facts.key) is not None:
            yield instance, facts
    for instance in session.deleted:
        yield instance, mapped(instance_state(instance).mapper)
    for instance in session.dirty:
        if session.is_modified(instance, include_collections=False):
            yield instance, mapped(instance_state(instance).mapper)
