"""A flush, before it begins: keys by default, and the shards that it will write held all at once.

Driven by SQLAlchemy's ``before_flush``. What a flush writes is known only while it runs, as it hands keys from parents
to children; but what is known already is provisioned here, so that a refusal comes before the first statement and a
stale fence costs one new route. Instances whose key comes from a parent are left to the flush itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy.orm import InstanceState, Mapper, RelationshipDirection
from sqlalchemy.orm.attributes import instance_state

from shardkit.core.errors import UnroutableQuery
from shardkit.core.topology import DeclaredTable, HomeTable, ReferenceTable, ShardedTable, Topology

from . import replicated
from .declared import declared_of
from .ids import leasing
from .keys import fill_default_key, instance_position, mapped_key
from .planning.carriers import vet_instance

if TYPE_CHECKING:
    from .session import ShardSession


@dataclass(frozen=True, eq=False)
class Mapped:
    """What a flush must know of a mapped class: its tables, the attribute of its key (None if they are reference or
    home tables), and the relationships that set the key."""

    tables: Sequence[DeclaredTable]
    key: str | None
    parents: tuple[str, ...]

    @cached_property
    def references(self) -> tuple[ReferenceTable, ...]:
        """Those of the tables that every shard holds."""
        return tuple(table for table in self.tables if isinstance(table, ReferenceTable))

    @cached_property
    def homes(self) -> frozenset[str]:
        """The names of the shards that hold the others, if they are on one."""
        return frozenset(table.shard for table in self.tables if isinstance(table, HomeTable))


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


class Routed(NamedTuple):
    """An instance that is written, as it was when its shard was chosen."""

    attribute: str
    key: Any
    position: int
    tables: Sequence[DeclaredTable]


class RoutedInstances:
    """The instances of one flush that are written by their key.

    SQLAlchemy asks for the connection of an instance before it calls ``before_insert`` and its like, which may change
    the instance: so each that it asked for is looked at again when all is written.
    """

    def __init__(self) -> None:
        self._expected: dict[InstanceState[Any], Routed] = {}
        self._asked: dict[InstanceState[Any], Routed] = {}

    def expect(self, instance: object, facts: Mapped) -> int:
        """The position of an instance that is about to be written. `KeyTypeError`, `IdMismatch`, `UnroutableQuery`
        where its key was changed."""
        assert facts.key is not None
        state = instance_state(instance)
        at = instance_position(instance)
        vet_instance(instance, at)
        self._expected[state] = Routed(facts.key, state.dict.get(facts.key), at, facts.tables)
        return at

    def ask(self, instance: object) -> Routed | None:
        """Where an instance is written; None if its class has no key. Raises as `expect`."""
        state = instance_state(instance)
        found = self._expected.get(state)
        if found is not None and state.dict.get(found.attribute, _ABSENT) is found.key:
            vet_instance(instance, found.position)  # its id may be new
        else:
            facts = mapped(state.mapper)
            if facts.key is None:
                return None
            self.expect(instance, facts)
            found = self._expected[state]
        self._asked.setdefault(state, found)  # asked again, it is judged by the first answer
        return found

    def end(self) -> None:
        """Forget them; `UnroutableQuery` if one has got another key since, `IdMismatch` if an id of another slot."""
        asked, self._asked, self._expected = self._asked, {}, {}
        for state, (attribute, key, at, _) in asked.items():
            now = state.dict.get(attribute, key)
            if now is not key and now != key:
                raise UnroutableQuery(
                    f"The shard key {attribute} of {state.class_.__name__} was changed from {key!r} to {now!r} while "
                    "it was flushed, when its shard had been chosen. Nothing was written.",
                    hint="Set shard keys before the flush, or in a `before_flush` event; not in `before_insert` or "
                    "`before_update`.",
                    reason="changed-key",
                )
            if (instance := state.obj()) is not None:
                vet_instance(instance, at)


_ABSENT = object()


class _Several(NamedTuple):
    shards: Collection[int]


def provision_flush(session: ShardSession) -> None:
    """Give new instances their default keys and hold every shard that is known to be written."""
    positions: set[int] = set()
    classes: set[Mapped] = set()
    routed = session.routed = RoutedInstances()
    with leasing(session.cluster.ids):
        for instance, facts in _to_be_written(session):
            if facts.key is not None:
                positions.add(routed.expect(instance, facts))
            classes.add(facts)
    if not classes:
        return
    written = _together(classes)
    replicated.admit(session.mode, written.references)

    def route(topology: Topology) -> _Several:
        if written.references:
            return _Several(topology.by_id.keys())
        owners = set(map(topology.ring.owner_at, positions))
        owners.update(topology.named(name).id for name in written.homes)
        return _Several(owners)

    shards = session.shards.provision(route, tables=written.tables, writes=True).shards
    if written.references:
        replicated.lock(session, written.references, shards)


def _together(classes: Collection[Mapped]) -> Mapped:
    """What is written, as if it were of one class."""
    if len(classes) == 1:
        (only,) = classes
        return only
    # A list: what is made for one flush is not worth remembering (`Admitted`).
    return Mapped(list({table for facts in classes for table in facts.tables}), None, ())


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
