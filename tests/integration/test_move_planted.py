"""Differences that somebody plants on the target in mid-move: found, named by key, and never decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from psycopg import sql

from shardkit.core.errors import PreflightFailed, VerificationFailed
from shardkit.core.move import Phase
from shardkit.core.ring import position
from shardkit.core.topology import ReferenceTable, ShardedTable
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.storage import membership
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import Connection, value
from tests.fix_shards import MakeShards, Shards, fill

USERS = 300


def once(phase: Phase, act: Callable[[], object]) -> Callable[[Progress], None]:
    done: list[object] = []

    def listener(progress: Progress) -> None:
        if progress.phase is phase and not done:
            done.append(True)
            act()

    return listener


@pytest.fixture
def shards(make_shards: MakeShards) -> Shards:
    made = make_shards(2)
    fill(made.on("s1"), USERS)
    return made


def moving(shards: Shards) -> list[int]:
    """Users within the arcs of the job."""
    with Catalog.open(shards.catalog_url) as catalog:
        job = catalog.running_job()
        assert job is not None
        (row,) = catalog.transfers(job.id)
    return [key for key in range(1, 10 * USERS) if position(key) in row.arcs]


def change(connection: Connection, keys: list[int]) -> str:
    connection.execute("UPDATE public.users SET n = 41 WHERE id = %s", (keys[0],))
    return f"public.users id={keys[0]}"


def delete(connection: Connection, keys: list[int]) -> str:
    connection.execute("DELETE FROM public.posts WHERE user_id = %s AND id = 2", (keys[0],))
    return f"public.posts user_id={keys[0]} id=2"


def add(connection: Connection, keys: list[int]) -> str:
    connection.execute("INSERT INTO public.users VALUES (%s, 'nobody knows')", (keys[-1],))
    return f"public.users id={keys[-1]}"


def rekey(connection: Connection, keys: list[int]) -> str:
    """Two at once: one is missing, one too many."""
    connection.execute("DELETE FROM public.posts WHERE user_id = %s", (keys[0],))
    connection.execute("UPDATE public.users SET id = %s WHERE id = %s", (keys[-1], keys[0]))
    return f"public.users id={keys[-1]}"


PLANTS = [change, delete, add, rekey]


@pytest.mark.parametrize("phase", [Phase.CATCHING_UP, Phase.CUTTING_OVER])
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_rows_that_somebody_writes_on_the_target(
    shards: Shards, plant: Callable[[Connection, list[int]], str], phase: Phase
) -> None:
    """Before the comparison, and after it, when only what was noted is looked at again."""
    expected: list[str] = []

    def act() -> None:
        expected.append(plant(shards.on("s2"), moving(shards)))

    with pytest.raises(VerificationFailed) as caught:
        shards.move(listener=once(phase, act))
    assert expected[0] in caught.value.fields["keys"]
    assert len(caught.value.fields["keys"]) == {"rekey": 4}.get(plant.__name__, 1)
    assert not shards.topology().owned(1)
    assert caught.value.exit_code == 4
    with pytest.raises(VerificationFailed):  # it stays so until somebody repairs it
        shards.resume()
    with Mover(shards.catalog_url) as mover:
        mover.abort()
    shards.assert_clean()
    assert len(shards.rows(shards.tables[1])["s1"]) == USERS


def test_after_a_repair_it_goes_on(shards: Shards) -> None:
    keys: list[int] = []

    def act() -> None:
        keys.extend(moving(shards))
        change(shards.on("s2"), keys)

    with pytest.raises(VerificationFailed):
        shards.move(listener=once(Phase.CUTTING_OVER, act))
    shards.on("s2").execute("UPDATE public.users SET n = 0 WHERE id = %s", (keys[0],))
    shards.resume()
    shards.assert_clean()
    assert {row[2] for rows in shards.rows(shards.tables[1]).values() for row in rows} == {0}


def test_what_both_sides_do_alike_is_no_difference(shards: Shards) -> None:
    """As a cascade from a reference table does, which is written on every shard."""
    for name in ("s1", "s2"):
        shards.on(name).execute("CREATE TABLE public.country (code text PRIMARY KEY)")
        shards.on(name).execute("INSERT INTO public.country VALUES ('x'), ('y')")
        shards.on(name).execute(
            "ALTER TABLE public.users ADD country text REFERENCES public.country ON DELETE CASCADE"
        )
        shards.on(name).execute("ALTER TABLE public.posts DROP CONSTRAINT posts_user_id_fkey")
    with shards.writer() as (catalog, connections):
        membership.declare(catalog, connections, [ReferenceTable("public", "country")])
    shards.on("s1").execute("UPDATE public.users SET country = CASE WHEN id % 2 = 0 THEN 'x' ELSE 'y' END")
    left: list[Any] = []

    def act() -> None:
        for name in ("s2", "s1"):  # else the deletions arrive before the cascade
            shards.on(name).execute("DELETE FROM public.country WHERE code = 'x'")
        left.append(value(shards.on("s2"), "SELECT count(*) FROM shardkit.changed"))

    shards.move(listener=once(Phase.CUTTING_OVER, act))
    assert left[0] > 0, "the cascade on the target was not noted"
    shards.assert_clean()
    held = [row for rows in shards.rows(shards.tables[1]).values() for row in rows]
    assert len(held) == USERS / 2


@pytest.mark.parametrize("phase", [Phase.CATCHING_UP, Phase.CUTTING_OVER])
@pytest.mark.parametrize("how", ["ALWAYS", "REPLICA"])
def test_a_trigger_on_the_target_that_alters_what_arrives(shards: Shards, how: str, phase: Phase) -> None:
    """Made when the preflight had passed. What it altered is cleared away when the move begins anew."""

    def act() -> None:
        two, keys = shards.on("s2"), moving(shards)
        two.execute(
            """
            CREATE FUNCTION public.alter_row() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.name := NEW.name || ''!''; RETURN NEW; END'
            """
        )
        two.execute(
            "CREATE TRIGGER exclaim BEFORE INSERT OR UPDATE ON public.users "
            "FOR EACH ROW EXECUTE FUNCTION public.alter_row()"
        )
        two.execute(sql.SQL("ALTER TABLE public.users ENABLE {} TRIGGER exclaim").format(sql.SQL(how)))
        shards.on("s1").execute("UPDATE public.users SET n = 7 WHERE id = %s", (keys[0],))

    with pytest.raises((PreflightFailed, VerificationFailed), match=r"exclaim|public\.users id="):
        shards.move(listener=once(phase, act))
    assert not shards.topology().owned(1)
    shards.on("s2").execute("DROP TRIGGER exclaim ON public.users")
    with pytest.raises(VerificationFailed, match=r"public\.users id="):
        shards.resume()
    with Mover(shards.catalog_url) as mover:
        mover.abort()
    shards.assert_clean()
    shards.move()
    shards.assert_clean()


@pytest.mark.parametrize(
    ("to", "phase"),
    [("DEFAULT 5", Phase.CATCHING_UP), (None, Phase.CATCHING_UP), ("DEFAULT random()", Phase.CUTTING_OVER)],
)
def test_a_column_default_that_becomes_another(make_shards: MakeShards, to: str | None, phase: Phase) -> None:
    """What arrives is whole, but what is written after the cutover would not be."""
    things = ShardedTable("public", "things", "id", "int")
    shards = make_shards(
        2, tables=(things,), schema="CREATE TABLE public.things (id int PRIMARY KEY, n int DEFAULT 1)"
    )
    shards.on("s1").execute("INSERT INTO public.things SELECT generate_series(1, 200)")
    act = sql.SQL("ALTER TABLE public.things ALTER n {}").format(
        sql.SQL(f"SET {to}" if to else "DROP DEFAULT")
    )
    with pytest.raises(PreflightFailed, match=r"column public\.things\.n differs: integer DEFAULT 1"):
        shards.move(listener=once(phase, lambda: shards.on("s2").execute(act)))
    with pytest.raises(PreflightFailed, match=r"column public\.things\.n differs"):
        shards.resume()
    shards.on("s2").execute("ALTER TABLE public.things ALTER n SET DEFAULT 1")
    shards.resume()
    shards.assert_clean()
