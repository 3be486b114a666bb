"""The topology: which shard owns which arcs, as an immutable value with a version.

Every change makes the next value from the one before (`joined`, `marked`, `cut_over`, `unmarked`, `declared`,
`reweighted`, `left`, ...); who
calls them (the mover, the commands) persists the result before a shard sees it. Pure: no I/O, and `to_json` /
`from_json` are exact inverses, so that the copies on the shards and in the catalog can be compared by digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

from .documents import listed, text, whole
from .errors import NoSuchShard, TopologyInvalid
from .keyrange import POSITION_MAX, POSITION_MIN, Arc, ArcSet, slot_arc, slot_of
from .residues import STRIDE_MAX
from .ring import Ring

KeyType = Literal["int", "text", "uuid"]
KEY_TYPES: tuple[KeyType, ...] = ("int", "text", "uuid")

SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
"""What can be the name of a shard."""
_DIGEST = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, slots=True, order=True)
class Fence:
    """Name of the relation by which a shard proves a topology: the version that last changed what this shard owns or
    holds, and 8 hex digits of that topology's digest (two proposals of one number never share a name)."""

    version: int
    digest: str

    @property
    def relation(self) -> str:
        """Unqualified name of the relation in schema ``shardkit``."""
        return f"fence_{self.version}_{self.digest}"


@dataclass(frozen=True, slots=True)
class ShardedTable:
    """A table spread over the shards: its schema, name, key column and the type family of the key.

    ``numbered`` is what an application knows of its model, no part of what is declared: the columns, numbered by each
    server by itself, that alone make its primary key differ on two shards. It holds neither the shard key nor what is
    unique over shards then, so with more than one of them it needs a `Split`.
    """

    schema: str
    name: str
    key: str
    key_type: KeyType
    numbered: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def description(self) -> str:
        """How it is declared, for people."""
        return f"sharded by {self.key} ({self.key_type})"


@dataclass(frozen=True, slots=True)
class ReferenceTable:
    """A table that every shard holds whole: its schema and name."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def description(self) -> str:
        """How it is declared, for people."""
        return "a reference table"


@dataclass(frozen=True, slots=True)
class HomeTable:
    """A table that one shard holds whole: its schema, its name, and the name of the shard."""

    schema: str
    name: str
    shard: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"

    @property
    def description(self) -> str:
        """How it is declared, for people."""
        return f"at home on shard {self.shard}"


@dataclass(frozen=True, slots=True)
class Split:
    """That the sequences of a sharded table's column are disjoint: those of the shard with the number n give what
    leaves n when divided by ``stride``. What was given before is not above ``floor``."""

    schema: str
    name: str
    column: str
    stride: int
    floor: int

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


WholeTable = ReferenceTable | HomeTable
DeclaredTable = ShardedTable | WholeTable


@dataclass(frozen=True, slots=True)
class Shard:
    """One PostgreSQL database with a name.

    ``url`` never holds a password. ``in_transit`` are arcs whose rows may exist here though they are not owned.
    ``replicas`` are the URLs of its physical standbys that applications may read from. One that is ``leaving`` has
    weight 0, and leaves the topology as soon as it owns nothing.
    """

    id: int
    name: str
    url: str
    fence: Fence
    weight: int = 100
    in_transit: ArcSet = field(default_factory=ArcSet)
    replicas: tuple[str, ...] = ()
    leaving: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Pin:
    """An arc that is to be on a shard, named by its id, whatever the weights say: a whole slot, or one position."""

    arc: Arc
    shard: int

    @property
    def slot(self) -> int:
        """The slot that it is, or lies in."""
        return slot_of(self.arc.first)

    @property
    def is_slot(self) -> bool:
        """Whether it is a whole slot."""
        return self.arc == slot_arc(self.slot)


@dataclass(frozen=True)
class Topology:
    """Shards and tokens under a version.

    ``tokens`` are strictly increasing positions, the last one the largest position, so that no arc wraps round;
    ``owners[i]`` is the id of the shard that owns the positions after ``tokens[i - 1]`` up to ``tokens[i]``.
    ``tables`` are the sharded tables: what a move carries. ``whole`` are the reference and home tables, which no move
    carries. ``splits`` are the sharded tables whose primary keys are numbered by disjoint sequences. ``pins`` are arcs
    with a place of their own, in order; who owns them now is another matter.
    """

    version: int
    shards: tuple[Shard, ...]
    tokens: tuple[int, ...]
    owners: tuple[int, ...]
    tables: tuple[ShardedTable, ...] = ()
    whole: tuple[WholeTable, ...] = ()
    splits: tuple[Split, ...] = ()
    pins: tuple[Pin, ...] = ()

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise TopologyInvalid(f"topology {self.version}: {problem}")

    def _problem(self) -> str | None:
        ids = [shard.id for shard in self.shards]
        names = [shard.name for shard in self.shards]
        if self.version < 1:
            return "the version is below 1"
        if not ids:
            return "it has no shard"
        if len(set(ids)) < len(ids) or len(set(names)) < len(names):
            return "two shards share an id or a name"
        if any(not 0 <= shard_id <= 0xFFFF for shard_id in ids):
            return "a shard id is not within 0 to 65535"
        if bad := [name for name in names if not SHARD_NAME.fullmatch(name)]:
            return f"not a shard name: {bad[0]!r} (letters, digits, '_', '.', '-', 63 at most)"
        if bad_fence := [
            s.name for s in self.shards if not _DIGEST.fullmatch(s.fence.digest) or s.fence.version < 1
        ]:
            return f"the fence of shard {bad_fence[0]} has no valid name"
        if any(shard.fence.version > self.version for shard in self.shards):
            return "a fence is newer than the topology"
        if any(shard.weight < 0 for shard in self.shards):
            return "a weight is negative"
        if staying := [shard.name for shard in self.shards if shard.leaving and shard.weight]:
            return f"shard {staying[0]} is leaving and has a weight"
        if not self.tokens or len(self.tokens) != len(self.owners):
            return "tokens and owners differ in number"
        if self.tokens[-1] != POSITION_MAX or self.tokens[0] < POSITION_MIN:
            return "the last token is not the largest position"
        if any(a >= b for a, b in zip(self.tokens, self.tokens[1:], strict=False)):
            return "tokens are not strictly increasing"
        if not set(self.owners) <= set(ids):
            return "an owner is no shard"
        if twice := [s.name for s in self.shards if len({s.url, *s.replicas}) <= len(s.replicas)]:
            return f"shard {twice[0]} lists a replica twice, or itself"
        if self._owns_in_transit():
            return "an arc is owned and in transit on one shard"
        qualified = [(table.schema, table.name) for table in (*self.tables, *self.whole)]
        if len(set(qualified)) < len(qualified):
            return "a table is declared twice"
        if homeless := [table for table in self.homes if table.shard not in names]:
            return f"the home of table {homeless[0]} is no shard"
        return self._split_problem(max(ids)) or self._problem_of_pins()

    def _owns_in_transit(self) -> bool:
        # Few hold anything in transit, and the arcs of all shards are dear to collect where there are a thousand.
        held = {shard.id: shard.in_transit for shard in self.shards if shard.in_transit}
        first = POSITION_MIN
        for token, owner in zip(self.tokens, self.owners, strict=True) if held else ():
            if owner in held and held[owner] & ArcSet([Arc(first, token)]):
                return True
            first = token + 1
        return False

    def _split_problem(self, highest: int) -> str | None:
        names = [(split.schema, split.name) for split in self.splits]
        if len(set(names)) < len(names):
            return "the ids of a table are split twice"
        for split in self.splits:
            if (split.schema, split.name) not in self.by_table:
                return f"the ids of {split} are split, which is no sharded table"
            if not highest < split.stride <= STRIDE_MAX:
                return f"the ids of {split} are split by {split.stride}, and a shard has the number {highest}"
        return None

    def _problem_of_pins(self) -> str | None:
        staying = {shard.id for shard in self.shards if not shard.leaving}
        before = POSITION_MIN - 1
        for pin in self.pins:
            if pin.arc.width != 1 and not pin.is_slot:
                return f"the pin {pin.arc} is neither a slot nor a position"
            if pin.arc.first <= before:
                return f"the pin {pin.arc} is out of order or in another"
            if pin.shard not in staying:
                return f"the pin {pin.arc} is to no shard, or to one that is leaving"
            before = pin.arc.last
        return None

    # --- reading ---------------------------------------------------------------------------------------------------

    @cached_property
    def ring(self) -> Ring:
        """The lookup structure: position or key to shard id."""
        return Ring(self.tokens, self.owners)

    @cached_property
    def by_id(self) -> Mapping[int, Shard]:
        """Shards by id."""
        return {shard.id: shard for shard in self.shards}

    @cached_property
    def by_table(self) -> Mapping[tuple[str, str], ShardedTable]:
        """Sharded tables by (schema, name)."""
        return {(table.schema, table.name): table for table in self.tables}

    @cached_property
    def declared_tables(self) -> Mapping[tuple[str, str], DeclaredTable]:
        """All tables by (schema, name): sharded, reference and home."""
        return {**self.by_table, **{(table.schema, table.name): table for table in self.whole}}

    @cached_property
    def references(self) -> tuple[ReferenceTable, ...]:
        """The reference tables."""
        return tuple(table for table in self.whole if isinstance(table, ReferenceTable))

    @cached_property
    def homes(self) -> tuple[HomeTable, ...]:
        """The home tables."""
        return tuple(table for table in self.whole if isinstance(table, HomeTable))

    @cached_property
    def by_split(self) -> Mapping[tuple[str, str], Split]:
        """Tables whose ids are split by (schema, name)."""
        return {(split.schema, split.name): split for split in self.splits}

    @cached_property
    def _arcs(self) -> Mapping[int, ArcSet]:
        arcs: dict[int, list[Arc]] = {shard.id: [] for shard in self.shards}
        first = POSITION_MIN
        for token, owner in zip(self.tokens, self.owners, strict=True):
            arcs[owner].append(Arc(first, token))
            first = token + 1
        return {shard_id: ArcSet(owned) for shard_id, owned in arcs.items()}

    def owned(self, shard_id: int) -> ArcSet:
        """The arcs that a shard owns."""
        return self._arcs[shard_id]

    def fence_on(self, shard_id: int) -> Fence:
        """The fence of this topology on a shard. On one that left by it, that is a name which nobody asks for."""
        shard = self.by_id.get(shard_id)
        return shard.fence if shard is not None else Fence(self.version, self.digest[:8])

    def changed_since(self, before: Topology | None) -> tuple[int, ...]:
        """Ids of the shards whose fence is another than in ``before``."""
        old = {shard.id: shard.fence for shard in before.shards} if before is not None else {}
        return tuple(shard.id for shard in self.shards if old.get(shard.id) != shard.fence)

    def closing_since(self, before: Topology | None) -> tuple[int, ...]:
        """Ids of the shards to which this change takes something away or adds a mark: transactions that began there
        under ``before`` must end first. The other changed shards only gain.

        Who writes reference tables writes the shard with the lowest id first. Where a shard joins, that one closes:
        then nobody is left who would write them without the newcomer. Where one leaves, it closes itself, whichever it
        is: whoever writes reference tables under ``before`` has it open."""
        if before is None:
            return ()
        joined = before.references and not self.by_id.keys() <= before.by_id.keys()
        first = min(before.by_id)
        return tuple(
            shard.id
            for shard in before.shards
            if shard.id not in self.by_id
            or (joined and shard.id == first)
            or before.owned(shard.id) - self.owned(shard.id)
            or self.by_id[shard.id].in_transit - shard.in_transit
        )

    def named(self, name: str) -> Shard:
        """The shard of this name; `NoSuchShard` if there is none."""
        for shard in self.shards:
            if shard.name == name:
                return shard
        known = ", ".join(sorted(shard.name for shard in self.shards))
        raise NoSuchShard(f"There is no shard {name!r}; there are: {known}.", name=name)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the content. Fences of this version carry the digest in their names, so there the digest
        itself is left out of what is hashed."""
        return self._digest_with({shard.id for shard in self.shards if shard.fence.version == self.version})

    def _digest_with(self, named: Collection[int]) -> str:
        """The digest, where the fences of ``named`` shards are of this version."""
        document = self.to_json()
        for shard in document["shards"]:
            if shard["id"] in named:
                shard["fence"] = [self.version]
        return hashlib.sha256(_canonical(document).encode()).hexdigest()

    # --- the next value --------------------------------------------------------------------------------------------

    @classmethod
    def first(
        cls,
        version: int,
        shards: Sequence[tuple[int, str, str, int]],
        tokens: Sequence[int],
        owners: Sequence[int],
    ) -> Self:
        """The first topology of a catalog, from (id, name, url, weight) of each shard, tokens and owners."""
        unnamed = Fence(version, "0" * 8)
        made = cls(
            version,
            tuple(Shard(sid, name, url, unnamed, weight) for sid, name, url, weight in shards),
            tuple(tokens),
            tuple(owners),
        )
        return made._refenced({shard.id for shard in made.shards})

    def _refenced(self, changed: Iterable[int]) -> Self:
        """The same topology with the fences of ``changed`` shards named after it."""
        changed = set(changed)
        named = self._digest_with({*changed, *(s.id for s in self.shards if s.fence.version == self.version)})
        fence = Fence(self.version, named[:8])
        made = replace(
            self, shards=tuple(replace(s, fence=fence) if s.id in changed else s for s in self.shards)
        )
        made.__dict__["digest"] = named  # names of fences of this version are no part of it
        return made

    def _next(self, version: int, changed: Iterable[int], **values: Any) -> Self:
        if version <= self.version:
            raise TopologyInvalid(f"version {version} does not follow {self.version}")
        return replace(self, version=version, **values)._refenced(changed)

    def _with_shard(self, changed: Shard) -> tuple[Shard, ...]:
        return tuple(changed if shard.id == changed.id else shard for shard in self.shards)

    def joined(self, version: int, *, shard_id: int, name: str, url: str, weight: int) -> Self:
        """A shard that owns nothing yet joins. Every fence changes: every shard's writers of reference tables must
        learn of it."""
        newcomer = Shard(shard_id, name, url, Fence(version, "0" * 8), weight)
        shards = (*self.shards, newcomer)
        return self._next(version, (shard.id for shard in shards), shards=shards)

    def reweighted(self, version: int, weights: Mapping[int, int], leaving: Iterable[int] = ()) -> Self:
        """Some shards have these weights, by id, and those named as ``leaving``, and no others of them, are to leave.
        No fence changes: no row changes its shard."""
        gone = set(leaving)
        shards = tuple(
            replace(shard, weight=weights[shard.id], leaving=shard.id in gone)
            if shard.id in weights
            else shard
            for shard in self.shards
        )
        return self._next(version, [], shards=shards)

    def left(self, version: int, shard_id: int) -> Self:
        """A shard that owns and holds nothing leaves. Every fence changes: nobody may go on to count on it."""
        if self.owned(shard_id) or self.by_id[shard_id].in_transit:
            raise TopologyInvalid(f"shard {self.by_id[shard_id].name} owns or holds arcs still")
        shards = tuple(shard for shard in self.shards if shard.id != shard_id)
        return self._next(version, (shard.id for shard in shards), shards=shards)

    def marked(self, version: int, shard_id: int, arcs: ArcSet) -> Self:
        """``arcs`` are in transit on a shard that does not own them: rows of them are about to arrive."""
        shard = self.by_id[shard_id]
        return self._next(
            version, [shard_id], shards=self._with_shard(replace(shard, in_transit=shard.in_transit | arcs))
        )

    def unmarked(self, version: int, shard_id: int, arcs: ArcSet) -> Self:
        """No row of ``arcs`` is left on a shard that does not own them."""
        shard = self.by_id[shard_id]
        return self._next(
            version, [shard_id], shards=self._with_shard(replace(shard, in_transit=shard.in_transit - arcs))
        )

    def cut_over(self, version: int, source: int, target: int, arcs: ArcSet) -> Self:
        """``arcs`` pass from ``source`` to ``target``: there the mark ends, on the source it begins."""
        if not self.owned(source).issuperset(arcs):
            raise TopologyInvalid(f"shard {source} does not own all of {arcs}")
        if not self.by_id[target].in_transit.issuperset(arcs):
            raise TopologyInvalid(f"shard {target} does not hold all of {arcs} in transit")
        tokens, owners = assigned(self.tokens, self.owners, arcs, target)
        shards = tuple(
            replace(shard, in_transit=shard.in_transit | arcs)
            if shard.id == source
            else replace(shard, in_transit=shard.in_transit - arcs)
            if shard.id == target
            else shard
            for shard in self.shards
        )
        return self._next(version, [source, target], shards=shards, tokens=tokens, owners=owners)

    def pinned(self, version: int, arc: Arc, shard_id: int) -> Self:
        """An arc is pinned to a shard, wherever it was pinned before. No fence changes: no row changes its shard."""
        others = (pin for pin in self.pins if pin.arc != arc)
        return self._next(version, [], pins=tuple(sorted((*others, Pin(arc, shard_id)))))

    def unpinned(self, version: int, arc: Arc) -> Self:
        """An arc is pinned no more. No fence changes."""
        return self._next(version, [], pins=tuple(pin for pin in self.pins if pin.arc != arc))

    def pin_of(self, position: int) -> Pin | None:
        """The pin that holds a position."""
        return next((pin for pin in self.pins if position in pin.arc), None)

    def declared(self, version: int, tables: Iterable[DeclaredTable]) -> Self:
        """The tables are these. No fence changes: no row changes its shard."""
        ordered = sorted(tables, key=lambda table: (table.schema, table.name))
        return self._next(
            version,
            [],
            tables=tuple(table for table in ordered if isinstance(table, ShardedTable)),
            whole=tuple(table for table in ordered if not isinstance(table, ShardedTable)),
        )

    def with_replicas(self, version: int, shard_id: int, urls: Iterable[str]) -> Self:
        """The replicas of a shard are these. No fence changes: what a shard owns is the same."""
        shard = replace(self.by_id[shard_id], replicas=tuple(urls))
        return self._next(version, [], shards=self._with_shard(shard))

    def with_urls(self, version: int, urls: Mapping[int, str]) -> Self:
        """The databases of shards, by id, are to be found there; what was a replica is one no more. No fence changes:
        they are the same shards."""
        shards = tuple(
            replace(
                shard,
                url=urls[shard.id],
                replicas=tuple(each for each in shard.replicas if each != urls[shard.id]),
            )
            if shard.id in urls
            else shard
            for shard in self.shards
        )
        return self._next(version, [], shards=shards)

    def with_splits(self, version: int, splits: Iterable[Split]) -> Self:
        """These tables have their ids split so, beside those that have it already. No fence changes: whoever has not
        seen it refuses the tables."""
        changed = {**self.by_split, **{(split.schema, split.name): split for split in splits}}
        return self._next(version, [], splits=tuple(split for _, split in sorted(changed.items())))

    # --- JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The topology as JSON values; `from_json` is the exact inverse.

        What there is none of is left out, so that a topology without reference and home tables, replicas, splits, pins
        and shards that leave is written, and has the digest, as before there were any."""
        references = [[table.schema, table.name] for table in self.references]
        homes = [[table.schema, table.name, table.shard] for table in self.homes]
        splits = [
            [split.schema, split.name, split.column, split.stride, split.floor] for split in self.splits
        ]
        return {
            "version": self.version,
            "shards": [
                {
                    "id": shard.id,
                    "name": shard.name,
                    "url": shard.url,
                    "weight": shard.weight,
                    "fence": [shard.fence.version, shard.fence.digest],
                    "in_transit": [list(arc) for arc in shard.in_transit],
                    **({"replicas": list(shard.replicas)} if shard.replicas else {}),
                    **({"leaving": True} if shard.leaving else {}),
                }
                for shard in self.shards
            ],
            "tokens": list(self.tokens),
            "owners": list(self.owners),
            "tables": [[t.schema, t.name, t.key, t.key_type] for t in self.tables],
            **({"references": references} if references else {}),
            **({"homes": homes} if homes else {}),
            **({"splits": splits} if splits else {}),
            **({"pins": [[*pin.arc, pin.shard] for pin in self.pins]} if self.pins else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The topology of a document made by `to_json`; `TopologyInvalid` if it is none."""
        try:
            shards = tuple(
                Shard(
                    whole(entry["id"]),
                    text(entry["name"]),
                    text(entry["url"]),
                    _fence(*listed(entry["fence"])),
                    whole(entry["weight"]),
                    ArcSet(Arc(whole(first), whole(last)) for first, last in listed(entry["in_transit"])),
                    tuple(map(text, listed(entry.get("replicas", [])))),
                    _flag(entry.get("leaving", False)),
                )
                for entry in listed(document["shards"])
            )
            tables = tuple(_table(*map(text, listed(entry))) for entry in listed(document["tables"]))
            tokens, owners = (tuple(map(whole, listed(document[name]))) for name in ("tokens", "owners"))
            splits = tuple(_split(*listed(entry)) for entry in listed(document.get("splits", [])))
            return cls(
                whole(document["version"]),
                shards,
                tokens,
                owners,
                tables,
                _whole_tables(document),
                splits,
                _pins(document),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TopologyInvalid(f"This is no topology document: {error!r}.") from error


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"no truth value: {value!r}")
    return value


def _fence(version: Any, digest: Any) -> Fence:
    return Fence(whole(version), text(digest))


def _pins(document: Mapping[str, Any]) -> tuple[Pin, ...]:
    if "pins" not in document:
        return ()
    pins = tuple(_pin(*map(whole, listed(entry))) for entry in listed(document["pins"]))
    if not pins:
        raise ValueError("an empty list of pins, which is left out")
    return pins


def _pin(first: int, last: int, shard: int) -> Pin:
    if not POSITION_MIN <= first <= last <= POSITION_MAX:
        raise ValueError(f"no arc: {first}..{last}")
    return Pin(Arc(first, last), shard)


def _table(schema: str, name: str, key: str, key_type: str) -> ShardedTable:
    if key_type not in KEY_TYPES:
        raise ValueError(f"no type of key: {key_type!r}")
    return ShardedTable(schema, name, key, key_type)


def _split(schema: Any, name: Any, column: Any, stride: Any, floor: Any) -> Split:
    return Split(text(schema), text(name), text(column), whole(stride), whole(floor))


def _whole_tables(document: Mapping[str, Any]) -> tuple[WholeTable, ...]:
    references = (
        ReferenceTable(*map(text, listed(entry))) for entry in listed(document.get("references", []))
    )
    homes = (HomeTable(*map(text, listed(entry))) for entry in listed(document.get("homes", [])))
    return tuple(sorted((*references, *homes), key=lambda table: (table.schema, table.name)))


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def assigned(
    tokens: Sequence[int], owners: Sequence[int], arcs: ArcSet, owner: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens and owners after ``arcs`` were given to ``owner``, with no token that separates equal owners."""
    ends = sorted(
        {*tokens, *(arc.first - 1 for arc in arcs if arc.first > POSITION_MIN), *(arc.last for arc in arcs)}
    )
    lookup = Ring(tokens, owners)
    new_tokens: list[int] = []
    new_owners: list[int] = []
    for end in ends:
        now = owner if end in arcs else lookup.owner_at(end)
        if new_owners and new_owners[-1] == now:
            new_tokens[-1] = end
        else:
            new_tokens.append(end)
            new_owners.append(now)
    return tuple(new_tokens), tuple(new_owners)
