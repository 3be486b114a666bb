"""Applications: the transactions of sessions, as `orm.transaction` and `storage.guard` run them.

Kinds: ``write`` and ``read`` of range 0 (``write 1``, ``read 1`` of range 1) by one key; ``scatter`` counts the rows
of all ranges on all shards; ``beside`` reads a key of the target's own first and then range 0 (``beside write`` writes
it), and ``beside old`` does so in REPEATABLE READ, whose snapshot on the target is then as old as its first statement
there.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import topologies
from .explorer import Violation
from .rules import Rule
from .world import ABSENT, App, Scenario, World, put, replaced

Moves = Iterator[tuple[str, World]]


def moves(scenario: Scenario, world: World, number: int) -> Moves:
    """What an application can do next."""
    app = world.apps[number]
    if app.kind:
        yield from _Client(scenario, world, number, app).go_on()
    elif app.left:
        nothing: tuple[tuple[int, ...], ...] = ((),) * scenario.shards
        for kind in scenario.apps[number][1]:
            begun = app._replace(
                left=app.left - 1,
                kind=kind,
                held=nothing,
                sent=(False,) * scenario.shards,
                counted=(0,) * len(world.acked) if kind == "scatter" else (),
            )
            yield from _Client(scenario, world, number, begun).go_on()


class _Client:
    def __init__(self, scenario: Scenario, world: World, number: int, app: App) -> None:
        self.scenario, self.rules = scenario, scenario.rules
        self.world, self.number, self.app = world, number, app
        self.name = f"app {number} ({app.kind})"
        self.key_range = 1 if app.kind.endswith("1") else 0

    def with_app(self, app: App, world: World | None = None) -> World:
        world = world or self.world
        return world._replace(apps=(*world.apps[: self.number], app, *world.apps[self.number + 1 :]))

    def ended(self, world: World | None = None) -> World:
        return self.with_app(App(self.app.topology, self.app.left), world)

    def go_on(self) -> Moves:
        if Rule.RULE_R in self.rules:
            for shard, held in enumerate(self.app.held):
                if held and self.fence(shard) not in held:
                    yield from self.hold_also(shard)
                    return
        if self.app.kind == "scatter":
            yield from self.scatter()
        elif self.app.kind.startswith("beside") and not self.app.held[1]:
            yield from self.begin(1)
        elif self.app.kind.startswith("beside") and not self.app.sent[1]:
            yield self.statement_on_target()
        else:
            owner = topologies.facts(self.app.topology).owners[self.key_range]
            if self.app.held[owner]:
                yield self.one_key(owner)
            else:
                yield from self.begin(owner)

    def fence(self, shard: int) -> int:
        return topologies.facts(self.app.topology).fences[shard]

    # --- guards ----------------------------------------------------------------------------------------------------

    def guard(self, shard: int) -> bool | None:
        """Whether the fence is there; None while a mover has it locked."""
        if Rule.FENCE not in self.rules:
            return True
        if self.world.shards[shard].locker:
            return None
        return self.fence(shard) in self.world.shards[shard].now.names

    def begin(self, shard: int) -> Moves:
        found = self.guard(shard)
        if found:
            held = (*self.app.held[:shard], (self.fence(shard),), *self.app.held[shard + 1 :])
            label = f"{self.name} begins on {shard} under {self.version()}"
            yield label, self.with_app(self.app._replace(held=held))
        elif found is not None:
            yield from self.refused(shard)

    def hold_also(self, shard: int) -> Moves:
        """Rule R: hold on an open shard what the newer topology names, or give up."""
        sent = self.app.sent[shard]
        if sent and self.app.kind == "beside old" and Rule.OLD_SNAPSHOTS in self.rules:
            yield f"{self.name} is told that the topology has changed", self.ended()
            return
        found = self.guard(shard)
        before = self.app.held[shard] if sent else ()
        if found:
            now = (*self.app.held[:shard], (*before, self.fence(shard)), *self.app.held[shard + 1 :])
            yield (
                f"{self.name} holds {self.version()} on {shard} too",
                self.with_app(self.app._replace(held=now)),
            )
        elif found is not None:
            app = self.app._replace(held=(*self.app.held[:shard], before, *self.app.held[shard + 1 :]))
            yield from self.refused(shard, app)

    def refused(self, shard: int, app: App | None = None) -> Moves:
        """A newer topology: of the shard's copy, else of the catalog. None is waited for."""
        app = app or self.app
        known = topologies.facts(app.topology).version
        for source, candidate in (
            (f"shard {shard}", self.world.shards[shard].now.copy),
            ("the catalog", self.world.catalog.current),
        ):
            if topologies.facts(candidate).version > known:
                version = topologies.facts(candidate).version
                yield (
                    f"{self.name} is refused on {shard}, learns of {version} from {source}",
                    self.with_app(app._replace(topology=candidate)),
                )
                return

    def version(self) -> int:
        return topologies.facts(self.app.topology).version

    # --- statements ------------------------------------------------------------------------------------------------

    def statement_on_target(self) -> tuple[str, World]:
        snapshot = None
        if self.app.kind == "beside old":
            snapshot = (self.world.shards[1].now.rows[0], self.world.acked[0])
        sent = (*self.app.sent[:1], True, *self.app.sent[2:])
        return f"{self.name} reads a key of its own on 1", self.with_app(
            self.app._replace(sent=sent, snapshot=snapshot)
        )

    def one_key(self, shard: int) -> tuple[str, World]:
        key_range = self.key_range
        row, acked = self.world.shards[shard].now.rows[key_range], self.world.acked[key_range]
        if shard == 1 and self.app.snapshot is not None:
            row, acked = self.app.snapshot
        if row != acked:
            seen = "no row" if row == ABSENT else f"value {row}"
            raise Violation(f"{self.name} finds {seen} on {shard}, where {acked} was acknowledged")
        if "write" not in self.app.kind:
            return f"{self.name} reads {row} on {shard}, commits", self.ended()
        return f"{self.name} writes {row + 1} on {shard}, commits", self.ended(
            written(self.scenario, self.world, shard, key_range)
        )

    def scatter(self) -> Moves:
        shards = range(self.scenario.shards)
        missing = [shard for shard in shards if not self.app.held[shard]]
        unread = [shard for shard in shards if not self.app.sent[shard]]
        if missing:
            # In descending order too: which comes first is the router's own affair.
            for shard in dict.fromkeys((missing[0], missing[-1])):
                yield from self.begin(shard)
            if Rule.GUARDS_FIRST in self.rules:
                return
            unread = [shard for shard in unread if shard not in missing]
        for shard in unread:
            yield self.count(shard, last=not missing and len(unread) == 1)

    def count(self, shard: int, *, last: bool) -> tuple[str, World]:
        facts = topologies.facts(self.app.topology)
        counted = list(self.app.counted)
        for key_range, row in enumerate(self.world.shards[shard].now.rows):
            hidden = Rule.PREDICATE in self.rules and facts.marked[shard][key_range]
            counted[key_range] += row != ABSENT and not hidden
        if last and set(counted) != {1}:
            raise Violation(f"{self.name} under {facts.version} counts {counted} rows of the ranges")
        sent = (*self.app.sent[:shard], True, *self.app.sent[shard + 1 :])
        app = (
            App(self.app.topology, self.app.left)
            if last
            else self.app._replace(sent=sent, counted=tuple(counted))
        )
        return f"{self.name} counts on {shard} under {facts.version}", self.with_app(app)


def written(scenario: Scenario, world: World, shard: int, key_range: int) -> World:
    """After a write was committed and acknowledged. Its COMMIT waits for the standby, and so for all before it."""
    state = world.shards[shard]
    value = world.acked[key_range] + 1
    slots = tuple(
        (*slot, value)
        if slot is not None and stream.source == shard and stream.key_range == key_range
        else slot
        for slot, stream in zip(state.now.slots, scenario.streams, strict=True)
    )
    now = state.now._replace(rows=replaced(state.now.rows, key_range, value), slots=slots)
    world = put(world, shard, state._replace(now=now, kept=None))
    return world._replace(acked=replaced(world.acked, key_range, value))
