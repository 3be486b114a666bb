"""What a catalog keeps of topologies that are past: every version, few documents, and every number ever used."""

from __future__ import annotations

from dataclasses import replace

from psycopg.types.json import Jsonb

from shardkit.core.topology import Topology
from shardkit.storage import change, idjoin
from shardkit.storage.catalog import KEPT, Catalog
from shardkit.storage.connections import value
from tests.fix_shards import MakeShards

DOCUMENTS = "SELECT version FROM shardkit.topologies WHERE document ? 'tokens' ORDER BY version"


def changed(catalog: Catalog, topology: Topology, times: int) -> Topology:
    """The last of ``times`` topologies that came into force, of which no shard knows."""
    for _ in range(times):
        topology = topology.declared(catalog.next_version(), topology.tables)
        catalog.propose(topology)
        catalog.record(topology)
    return topology


def test_few_documents_are_kept_and_every_version(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    with shards.writer() as (catalog, connections):
        before = shards.topology()
        for _ in range(2 * KEPT):
            change.apply(catalog, connections, lambda now, version: _again(now, version))
        held = [version for (version,) in catalog.connection.execute(DOCUMENTS)]
        assert held == list(range(before.version + KEPT, before.version + 2 * KEPT + 1))
        versions = catalog.connection.execute("SELECT version, digest FROM shardkit.topologies").fetchall()
        assert {version for version, _ in versions} >= set(range(1, held[-1] + 1))
        assert all(digest for _, digest in versions)
        assert catalog.next_version() == held[-1] + 1
        # The copies of the shards are older than the oldest document, and can be compared still.
        for shard in before.shards:
            copy = connections.get(shard).execute("SELECT version, digest FROM shardkit.topology").fetchone()
            assert copy is not None
            assert copy[0] < held[0]
            assert copy in versions
    shards.assert_clean()


def _again(now: Topology | None, version: int) -> Topology:
    assert now is not None
    return now.declared(version, now.tables)


def test_a_proposal_that_was_given_up_is_forgotten(make_shards: MakeShards) -> None:
    shards = make_shards(1)
    with shards.writer() as (catalog, _):
        given_up = _again(catalog.current(), catalog.next_version())
        catalog.propose(given_up)
        catalog.discard(given_up)
        changed(catalog, shards.topology(), KEPT + 1)
        held = [version for (version,) in catalog.connection.execute(DOCUMENTS)]
        assert given_up.version not in held
        assert catalog.next_version() == held[-1] + 1


def test_the_number_of_a_shard_that_left_stays_known(make_shards: MakeShards) -> None:
    shards = make_shards(2)
    with shards.writer() as (catalog, _):
        both = shards.topology()
        left = both.shards[1]
        # Long before it leaves, all that names it is forgotten but the last.
        both = changed(catalog, both, 3 * KEPT)
        one = replace(both, version=catalog.next_version(), shards=both.shards[:1])
        catalog.propose(one)
        catalog.record(one)
        changed(catalog, one, 6 * KEPT)

        def used(number: int) -> bool:
            document = Jsonb({"shards": [{"id": number}]})
            return value(catalog.connection, idjoin._USED, (document,)) is not None

        assert used(both.shards[0].id)
        assert used(left.id)
        assert not used(left.id + 1)
        assert value(catalog.connection, "SELECT count(*) FROM shardkit.topologies") == one.version + 6 * KEPT
