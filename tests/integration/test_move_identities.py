"""Replica identities of moving tables whose primary key lacks the shard key: made once, whoever else needs them."""

from __future__ import annotations

import pytest

from shardkit.core.errors import MoverSuperseded
from shardkit.core.topology import ShardedTable
from shardkit.rebalance.mover import Mover
from shardkit.storage import replicaidentity
from shardkit.storage.connections import value
from tests.fix_shards import MakeShards

TABLES = (ShardedTable("public", "notes", "owner", "int"),)
SCHEMA = """
CREATE TABLE public.notes (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), owner int NOT NULL, body text);
CREATE INDEX ON public.notes (owner);
"""
FILL = "INSERT INTO public.{} (owner, body) SELECT g, 'x' FROM generate_series(1, 300) g"


@pytest.mark.parametrize("parallel", [1, 2])
def test_two_transfers_of_one_source_share_it(make_shards: MakeShards, parallel: int) -> None:
    shards = make_shards(1, tables=TABLES, schema=SCHEMA)
    shards.on("s1").execute(FILL.format("notes"))
    shards.add("s2", 1)
    shards.add("s3", 2)
    shards.move(parallel=parallel)
    shards.assert_clean()
    assert all(shards.rows(TABLES[0]).values())


def test_a_job_that_was_stopped_after_it_was_made_goes_on(make_shards: MakeShards) -> None:
    shards = make_shards(1, tables=TABLES, schema=SCHEMA)
    shards.on("s1").execute(FILL.format("notes"))
    shards.add("s2", 1)
    with Mover(shards.catalog_url) as mover:
        mover.start("rebalance")
        replicaidentity.prepare_index(shards.on("s1"), TABLES[0], mover.catalog.token or 0)
    shards.resume()
    shards.assert_clean()


def test_tables_whose_names_begin_alike_have_one_each(make_shards: MakeShards) -> None:
    names = [f"{'long' * 12}_{end}" for end in ("one", "two")]
    tables = tuple(ShardedTable("public", name, "owner", "int") for name in names)
    schema = "".join(SCHEMA.replace("notes", name) for name in names)
    shards = make_shards(1, tables=tables, schema=schema)
    for name in names:
        shards.on("s1").execute(FILL.format(name))
    shards.add("s2", 1)
    shards.move()
    shards.assert_clean()


def test_a_mover_that_lost_its_lease_does_not_set_it_back(make_shards: MakeShards) -> None:
    shards = make_shards(1, tables=TABLES, schema=SCHEMA)
    with shards.writer() as (slow, _):
        pass
    with shards.writer() as (catalog, _):
        replicaidentity.prepare_index(shards.on("s1"), TABLES[0], catalog.token or 0)
        replicaidentity.use(shards.on("s1"), TABLES[0], catalog.token or 0)
        with pytest.raises(MoverSuperseded):
            replicaidentity.restore(shards.on("s1"), TABLES[0], slow.token or 0)
        assert (
            value(shards.on("s1"), "SELECT relreplident::text FROM pg_class WHERE relname = 'notes'") == "i"
        )
