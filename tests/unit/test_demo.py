"""The demo's own judgement: a demo that cannot find what is wrong proves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from shardkit.core.errors import DemoFailed, UsageError
from shardkit.core.keyrange import SLOTS, ArcSet, slot_arc
from shardkit.core.move import Phase
from shardkit.core.placement import initial, plan
from shardkit.core.ring import position
from shardkit.core.topology import Topology
from shardkit.dev.demo import drawing
from shardkit.dev.demo.book import Book, Change
from shardkit.dev.demo.client import Configuration
from shardkit.dev.demo.content import KEY_COLUMNS, Key, Layout, columns, row
from shardkit.dev.demo.findings import Findings, Stored, examine
from shardkit.dev.demo.ledger import Expected, Ledger
from shardkit.dev.demo.measures import Latency, Measures, by_phase
from shardkit.dev.demo.models import MODELS
from shardkit.dev.demo.outcome import SLOT, ClientReport, Kill, Move, Outcome
from shardkit.dev.demo.run import Options
from shardkit.dev.demo.worker import Worker
from shardkit.storage.catalog import TransferRow

LAYOUT = Layout(users=40, workers=4)


def topology(*weights: int) -> Topology:
    tokens, owners = initial(dict(enumerate(weights)))
    shards = [
        (number, f"s{number + 1}", f"postgresql:///s{number}", weight)
        for number, weight in enumerate(weights)
    ]
    return Topology.first(1, shards, tokens, owners)


# --- content ----------------------------------------------------------------------------------------------------


def test_the_models_have_the_columns_of_the_content() -> None:
    assert list(KEY_COLUMNS) == list(MODELS)
    for table, model in MODELS.items():
        key = tuple(range(1, len(KEY_COLUMNS[table]) + 1))
        assert tuple(column.name for column in model.__table__.primary_key) == KEY_COLUMNS[table]
        assert set(row(LAYOUT, table, key, 1)) == {column.name for column in model.__table__.columns}


@pytest.mark.parametrize("table", KEY_COLUMNS)
def test_content_differs_by_revision(table: str) -> None:
    key = (3, 4, 5)[: len(KEY_COLUMNS[table])]
    assert columns(LAYOUT, table, key, 1) != columns(LAYOUT, table, key, 2)
    assert columns(LAYOUT, table, key, 1) == columns(LAYOUT, table, key, 1)


@pytest.mark.parametrize("layout", [Layout(40, 4), Layout(41, 4), Layout(43, 7), Layout(5, 1)])
def test_every_user_has_one_writer(layout: Layout) -> None:
    first = [user for worker in range(layout.workers) for user in layout.first_users(worker)]
    assert sorted(first) == list(range(1, layout.users + 1))
    new = {layout.new_user(worker, serial) for worker in range(layout.workers) for serial in range(5)}
    assert len(new) == 5 * layout.workers
    assert min(new) > layout.users
    for worker in range(layout.workers):
        mine = [*layout.first_users(worker), *(layout.new_user(worker, serial) for serial in range(5))]
        assert {layout.writer(user) for user in mine} == {worker}


# --- book -------------------------------------------------------------------------------------------------------


def a_book() -> Book:
    book = Book()
    book.apply(
        [
            Change("users", (1,), 1),
            Change("users", (2,), 2),
            Change("posts", (1, 10), 3),
            Change("posts", (1, 11), 4),
            Change("comments", (1, 10, 20), 5),
            Change("likes", (1, 10, 2), 6),
        ]
    )
    return book


def test_a_book_knows_the_last_revision() -> None:
    book = a_book()
    book.apply([Change("posts", (1, 10), 7), Change("likes", (1, 10, 2), None)])
    assert book.revision("posts", (1, 10)) == 7
    assert book.revision("likes", (1, 10, 2)) is None
    assert dict(book.below("posts", (1,))) == {10: 7, 11: 4}
    assert book.counts == {"users": 2, "posts": 2, "comments": 1, "likes": 0}


def test_a_deletion_takes_what_is_below() -> None:
    book = a_book()
    gone = list(book.deletion("users", (1,)))
    assert gone[-1] == Change("users", (1,), None)
    assert {(table, key) for table, key, _ in gone} == {
        ("users", (1,)),
        ("posts", (1, 10)),
        ("posts", (1, 11)),
        ("comments", (1, 10, 20)),
        ("likes", (1, 10, 2)),
    }
    book.apply(gone)
    assert book.counts == {"users": 1, "posts": 0, "comments": 0, "likes": 0}
    assert {book.some_user(Random(1)) for _ in range(20)} == {2}


def test_some_key_is_one_that_is_there() -> None:
    book, random = a_book(), Random(1)
    found = {book.some_key(random, "comments") for _ in range(100)}
    assert found == {None, (1, 10, 20)}
    assert {book.some_key(random, "posts") for _ in range(100)} == {None, (1, 10), (1, 11)}


def test_a_worker_leaves_users_alone_whose_state_is_unknown() -> None:
    worker = Worker(1, LAYOUT, 1)
    worker.committed([Change("users", (1,), 1), Change("users", (5,), 2), Change("posts", (1, 10), 3)])
    worker.unknown([Change("posts", (1, 10), 4)])
    assert {worker.book.some_user(Random(n)) for n in range(20)} == {5}


@pytest.mark.parametrize(
    ("user", "read", "wrong"),
    [
        (1, [3], False),
        (1, [2], True),
        (1, [None], True),
        (5, [None], False),
        (5, [1], True),
        (2, [4, 4, None, 9], False),
        (2, [9, 8], True),
    ],
)
def test_a_worker_knows_a_stale_read(user: int, read: list[int | None], wrong: bool) -> None:
    worker = Worker(1, LAYOUT, 1)
    worker.committed([Change("users", (1,), 3), Change("users", (5,), 1), Change("users", (5,), None)])
    for revision in read:
        found = None if revision is None else MODELS["users"](**row(LAYOUT, "users", (user,), revision))
        worker.check("users", (user,), found)
    assert bool(worker.stale) is wrong


def test_a_worker_knows_a_row_of_mixed_revisions() -> None:
    worker = Worker(1, LAYOUT, 1)
    mixed = {**row(LAYOUT, "users", (2,), 3), "bio": "another"}
    worker.check("users", (2,), MODELS["users"](**mixed))
    assert len(worker.stale) == 1


# --- ledger -----------------------------------------------------------------------------------------------------


def test_a_ledger_is_replayed_as_it_was_written(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.acknowledged([Change("users", (1,), 1), Change("posts", (1, 10), 2)])
        ledger.acknowledged([])
        ledger.acknowledged([Change("users", (1,), 3)])
        ledger.unknown([Change("posts", (1, 10), 4)])
        on_disk = (tmp_path / "ledger").read_text().splitlines()
        assert len(on_disk) == 3, "what is acknowledged is on disk before the next operation"
    expected = Expected.read([tmp_path / "ledger"])
    assert expected.rows == {"users": {(1,): 3}, "posts": {(1, 10): 2}}
    assert expected.writes == 3
    assert expected.allows("users", (1,), 3)
    assert not expected.allows("users", (1,), 1)
    assert expected.allows("posts", (1, 10), 2)
    assert expected.allows("posts", (1, 10), 4)
    assert not expected.allows("posts", (1, 10), None)
    assert not expected.allows("posts", (1, 11), 1)


def test_an_acknowledgement_ends_doubt() -> None:
    expected = Expected()
    expected.replay([json.dumps(["?", [["users", [1], 1]]]), json.dumps(["+", [["users", [1], 2]]])])
    assert not expected.allows("users", (1,), 1)
    assert expected.allows("users", (1,), 2)


# --- the end check ----------------------------------------------------------------------------------------------

RING = topology(100, 100)


def stored(table: str, key: Key, revision: int, shard: int | None = None) -> Stored:
    place = position(key[0])
    values = columns(LAYOUT, table, key, revision)
    return Stored(RING.ring.owner_at(place) if shard is None else shard, table, key, values, place)


def other(row: Stored) -> Stored:
    return row._replace(shard=1 - row.shard)


def expected() -> Expected:
    made = Expected()
    made.rows = {"users": {(1,): 5, (2,): None, (3,): 1}, "posts": {(1, 10): 6}}
    return made


GOOD = [stored("users", (1,), 5), stored("users", (3,), 1), stored("posts", (1, 10), 6)]


def test_all_is_well() -> None:
    assert examine(expected(), LAYOUT, RING, GOOD) == Findings(rows=3)


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        (GOOD[1:], {"lost"}),
        ([*GOOD, other(GOOD[0])], {"doubled", "misplaced"}),
        ([*GOOD, GOOD[0]], {"doubled"}),
        ([other(GOOD[0]), *GOOD[1:]], {"misplaced"}),
        ([stored("users", (1,), 4), *GOOD[1:]], {"stale"}),
        ([*GOOD, stored("users", (2,), 3)], {"stale"}),
        ([GOOD[0]._replace(columns={**GOOD[0].columns, "bio": "x"}), *GOOD[1:]], {"stale"}),
        ([*GOOD, stored("users", (9,), 3)], {"unwritten"}),
        ([*GOOD, stored("likes", (1, 10, 2), 3)], {"unwritten"}),
    ],
)
def test_what_is_wrong_is_found(rows: list[Stored], kinds: set[str]) -> None:
    found = examine(expected(), LAYOUT, RING, rows)
    lists = {kind: getattr(found, kind) for kind in ("lost", "doubled", "stale", "unwritten", "misplaced")}
    assert {kind for kind, sentences in lists.items() if sentences} == kinds
    assert all(len(sentences) <= 1 for sentences in lists.values())


def test_either_state_of_an_unknown_commit_is_right() -> None:
    doubtful = expected()
    doubtful.unknown = {("users", (1,)): {7, None}, ("users", (4,)): {8}}
    for rows in (GOOD[1:], GOOD, [stored("users", (1,), 7), *GOOD[1:]], [*GOOD, stored("users", (4,), 8)]):
        assert examine(doubtful, LAYOUT, RING, rows) == Findings(rows=len(rows))
    assert examine(doubtful, LAYOUT, RING, [stored("users", (1,), 6), *GOOD[1:]]).stale


# --- measures ---------------------------------------------------------------------------------------------------


def test_percentiles_are_nearest_ranks() -> None:
    assert Latency.of([]) == Latency(0, 0.0, 0.0, 0.0)
    assert Latency.of([0.002]) == Latency(1, 2.0, 2.0, 2.0)
    assert Latency.of(n / 1000 for n in range(200, 0, -1)) == Latency(200, 100.0, 198.0, 200.0)


def test_an_operation_belongs_to_every_phase_it_touches(tmp_path: Path) -> None:
    measures = Measures()
    for began, ended in ((0.0, 1.0), (1.5, 2.5), (2.6, 2.7), (5.0, 6.0)):
        measures.add(began, ended)
    measures.save(tmp_path / "measures")
    loaded = Measures.load(tmp_path / "measures")
    assert len(loaded) == 4
    found = by_phase([loaded], {"before": (0.5, 2.0), "during": (2.0, 3.0)})
    assert found["before"] == Latency(2, 1000.0, 1000.0, 1000.0)
    assert found["during"] == Latency(2, 100.0, 1000.0, 1000.0)


# --- the ring ---------------------------------------------------------------------------------------------------


def test_the_drawn_ring_has_the_shares() -> None:
    grid = drawing.cells(topology(100, 100, 200), rows=60)
    drawn = [owner for line in grid for owner in line if owner is not None]
    assert [round(drawn.count(number) / len(drawn), 2) for number in range(3)] == [0.25, 0.25, 0.5]
    assert grid[30][60] is None, "the hole"


def test_the_ring_starts_at_the_top_and_goes_clockwise() -> None:
    grid = drawing.cells(topology(100, 100), rows=15)
    top = [owner for owner in grid[0] if owner is not None]
    assert top == sorted(top, reverse=True)
    assert grid[7][-1] == 0, "the right half is the lower half of the positions"
    assert grid[7][0] == 1


def test_a_drawing_names_shards_and_shares_without_colours() -> None:
    ring = topology(100, 300)
    palette = drawing.Palette(["s1", "s2"], coloured=False)
    text = drawing.side_by_side([drawing.ring(ring, "before", palette)] * 2, 4).plain
    assert text.count("before") == 2
    assert text.count("s1  25.00% in 1 arc") == 2
    assert {character for character in text if character in drawing.SHADES} == set(drawing.SHADES[:2])
    assert not any(line.endswith(" ") for line in text.splitlines())


# --- the verdict ------------------------------------------------------------------------------------------------


def transfer(phase: Phase = Phase.DONE) -> TransferRow:
    record = {
        "certificate": {"rows": {"public.users": 7, "public.posts": 5}},
        "pause_ms": {"total": 9.5, "lock": 1.5},
    }
    return TransferRow(
        1,
        1,
        0,
        2,
        ArcSet([slot_arc(0)]),
        phase,
        {**record, "copy_began": 1000.0, "copy_seconds": 0.5},
        0,
        None,
        None,
    )


def grown(before: Topology) -> Topology:
    """A third shard, and a third of the ring for it, from each side of the border between the two."""
    joined = before.joined(2, shard_id=2, name="s3", url="postgresql:///s2", weight=100)
    for source, arcs in ((0, slot_arc(SLOTS // 2 - 10922, 10922)), (1, slot_arc(SLOTS // 2, 10923))):
        moved = ArcSet([arcs])
        marked = joined.marked(joined.version + 1, 2, moved)
        joined = marked.cut_over(marked.version + 1, source, 2, moved).unmarked(
            marked.version + 2, source, moved
        )
    return joined


def outcome(**changed: object) -> Outcome:
    before = topology(100, 100)
    move = Move(before, grown(before), {"s1": dict.fromkeys(KEY_COLUMNS, 3)}, [transfer()], 0, "", [])
    measures = Measures()
    for began in (1.0, 2.0, 3.0):
        measures.add(began, began + 0.5)
    values = {
        "clients": [ClientReport(3, 0, [], 0, [])],
        "measures": [measures],
        "phases": {"before": (1.0, 1.9), "during": (2.0, 2.9), "after": (3.0, 3.9)},
        "move": move,
        "writes": 10,
        "findings": Findings(rows=12),
        "leftovers": [],
        "rows_after": {name: dict.fromkeys(KEY_COLUMNS, 4) for name in ("s1", "s2", "s3")},
    }
    return Outcome(**{**values, **changed})  # type: ignore[arg-type]


def swapped() -> Topology:
    after = grown(topology(100, 100))
    return replace(after, owners=tuple({0: 1, 1: 0, 2: 2}[owner] for owner in after.owners))


def joined() -> Topology:
    return topology(100, 100).joined(2, shard_id=2, name="s3", url="postgresql:///s2", weight=100)


def with_move(**changed: object) -> Callable[[], Outcome]:
    def make() -> Outcome:
        good = outcome().move
        values = {name: getattr(good, name) for name in good.__dataclass_fields__}
        return outcome(move=Move(**{**values, **changed}))

    return make


def test_a_good_run_passes_and_has_all_numbers() -> None:
    report = outcome().report({"users": 40}, {"check": 1.0})
    report.raise_if_failed()
    document = json.loads(json.dumps(report.as_dict()))
    assert document["passed"] is True
    assert {document[kind] for kind in ("errors", "lost", "doubled", "stale")} == {0}
    assert document["operations"] == 3
    assert document["positions_moved"] == document["positions_minimum"] == 21845 * SLOT
    assert document["latency_ms"]["during"] == {"p50": 500.0, "p99": 500.0, "max": 500.0, "operations": 1}
    assert document["cutover_pause_ms"] == [9.5]
    assert document["rows_copied"] == 12
    assert document["copy_seconds"] == 0.5
    assert document["rows_before"]["s3"]["users"] == 0
    assert document["rows_after"]["s3"]["users"] == 4


def test_copies_side_by_side_take_their_time_once() -> None:
    spans = ((1000.0, 2.0), (1001.0, 0.5), (1001.5, 1.0), (1010.0, 0.25))
    rows = [replace(transfer(), record={"copy_began": began, "copy_seconds": took}) for began, took in spans]
    report = with_move(transfers=rows)().report({}, {})
    assert report.as_dict()["copy_seconds"] == 2.75


def test_the_minimum_is_not_the_planners(monkeypatch: pytest.MonkeyPatch) -> None:
    move = outcome().move
    monkeypatch.setattr("shardkit.core.placement.quotas", None)
    monkeypatch.setattr("shardkit.dev.demo.outcome.quotas", None, raising=False)
    assert move.positions_minimum == 21845 * SLOT


@pytest.mark.parametrize("weights", [(1, 1), (1, 1, 1), (3, 3, 3, 3, 3), (100, 300), (7, 7, 7, 7, 7, 7, 7)])
def test_nobody_can_move_less_than_the_minimum(weights: tuple[int, ...]) -> None:
    before = topology(*weights[:-1])
    newcomer = len(weights) - 1
    after = before.joined(2, shard_id=newcomer, name="new", url="postgresql:///new", weight=weights[-1])
    best = plan(after, {shard.id: shard.weight for shard in after.shards}).slots_moved
    move = Move(before, after, {}, [], 0, "", [])
    assert move.positions_minimum == best * SLOT


def test_the_latency_says_what_it_counts() -> None:
    console = Console(width=120, file=StringIO(), record=True)
    replace(outcome().report({}, {}), operations=6680).draw(console)
    text = console.export_text()
    assert "Latency of the operations in each phase" in text
    assert "6,680 operations in all, with those of the warm-up and between two phases" in text


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: outcome(clients=[ClientReport(3, 1, ["boom"], 0, [])]), "clients saw no error"),
        (lambda: outcome(clients=[ClientReport(3, 0, [], 1, ["old"])]), "nothing stale"),
        (lambda: outcome(findings=Findings(lost=["x"])), "no acknowledged write is lost"),
        (lambda: outcome(findings=Findings(doubled=["x"])), "no row is on two shards"),
        (lambda: outcome(findings=Findings(stale=["x"])), "nothing stale"),
        (lambda: outcome(findings=Findings(unwritten=["x"])), "nobody wrote"),
        (lambda: outcome(findings=Findings(misplaced=["x"])), "on the shard that owns its key"),
        (lambda: outcome(leftovers=["slot x"]), "left nothing behind"),
        (lambda: outcome(measures=[]), "every client worked"),
        (lambda: outcome(measures=[Measures()]), "every client worked"),
        (with_move(status=5, output="lease"), "the mover ended well: status 5: lease"),
        (with_move(transfers=[]), "the mover ended well"),
        (with_move(transfers=[transfer(Phase.PURGING)]), "the mover ended well"),
        (with_move(after=swapped()), "no more keys moved than the theoretical minimum: 65,536 slots"),
        (with_move(after=joined()), "the ring is even"),
        (with_move(kills=[Kill("copy", False, "no unfinished job")]), "killed in mid-copy"),
    ],
)
def test_what_is_wrong_fails_the_demo(make: Callable[[], Outcome], named: str) -> None:
    report = make().report({}, {})
    assert report.as_dict()["passed"] is False
    with pytest.raises(DemoFailed, match="The demo failed") as raised:
        report.raise_if_failed()
    assert named in raised.value.message
    assert raised.value.exit_code == 4


def test_the_summary_is_drawn_with_its_problems() -> None:
    made = outcome(findings=Findings(lost=["users (7,), acknowledged at revision 3"]))
    text = StringIO()
    made.report({}, {}).draw(Console(file=text, width=10_000))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["s1", "12", "→", "16"] in [[line[0], *line[-3:]] for line in lines if line]
    assert "  lost: users (7,), acknowledged at revision 3" in text.getvalue().splitlines()
    assert ["FAIL", "no", "acknowledged", "write", "is", "lost:", "1"] in lines


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [Options(clients=0), Options(seconds=0), Options(users=100), Options(kill_mover=("copy", "paste"))],
)
def test_options_that_cannot_be_run_are_refused(options: Options) -> None:
    with pytest.raises(UsageError):
        options.check()


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_workers_fall_to_clients(clients: int) -> None:
    options = Options(clients=clients, users=1000)
    options.check()
    made = options.configurations("postgresql:///catalog", "/tmp")
    assert sorted(worker for one in made for worker in one.workers) == list(range(options.layout.workers))
    assert [one.tasks for one in made] == [False] * (clients - 1) + [clients > 1]
    assert [Configuration.parse(one.dump()) for one in made] == made
