"""`shard pin` and `unpin`: a key goes to a shard, stays there through what comes later, and goes back to its slot."""

from __future__ import annotations

import pytest

from shardkit.core.keyrange import hex_position, slot_of
from shardkit.core.ring import position
from shardkit.storage.connections import value
from tests.acceptance.conftest import Program
from tests.fix_shards import FencedWriter, MakeShards, Shards, fill, owner_of

USERS = 200
COUNT = "SELECT count(*) FROM public.users WHERE id = %s"


@pytest.fixture
def two(make_shards: MakeShards, folder: object, monkeypatch: pytest.MonkeyPatch) -> Shards:
    """Two shards that hold half of the rows each."""
    shards = make_shards(2)
    monkeypatch.setenv("SHARDKIT_CATALOG", shards.catalog_url)
    fill(shards.on("s1"), USERS)
    shards.move()
    return shards


def key_on(shards: Shards, name: str) -> int:
    return next(key for key in range(1, USERS) if owner_of(shards.topology(), key) == name)


def where(shards: Shards, key: int) -> list[str]:
    return [s.name for s in shards.topology().shards if value(shards.on(s.name), COUNT, (key,))]


def test_a_key_alone(two: Shards, call: Program) -> None:
    key = key_on(two, "s1")
    planned = (
        call("shard", "pin", str(key), "s2", "--exact", "--table", "users", "--plan-only", "--json")
        .ok()
        .document
    )
    assert planned["pin"] == {
        "key": str(key), "type": "int", "position": position(key), "position_hex": hex_position(position(key)),
        "slot": slot_of(position(key)), "exact": True, "shard": "s2",
        "shares": {"rows": 3, "keys": 1, "some": [str(key)]},
    }  # fmt: skip
    assert planned["plan"]["slots_moved"] == planned["plan"]["slots_minimum"] == 0
    (transfer,) = planned["plan"]["transfers"]
    place = hex_position(position(key))
    assert (transfer["source"], transfer["target"], transfer["arcs"]) == ("s1", "s2", [[place, place]])
    call("shard", "pin", str(key), "s2", "--exact").failed(2, "Nobody can be asked here")

    writers = [FencedWriter(two, number, 2, USERS) for number in range(2)]
    for writer in writers:
        writer.start()
    try:
        done = call("shard", "pin", str(key), "s2", "--exact", "--yes", "--json").ok().document
        assert done["job"]["state"] == "done"
        assert done["job"]["kind"] == f"pin position {place} to s2"
        assert done["next"] is None
        assert where(two, key) == ["s2"]
        # It stays while everything else goes, and a shard of weight 0 may hold it.
        call("shard", "reweight", "s2=0", "--yes").ok()
        assert where(two, key) == ["s2"]
        assert value(two.on("s2"), "SELECT count(*) FROM public.users") == 1
    finally:
        for writer in writers:
            writer.ending.set()
        for writer in writers:
            writer.join()
    for writer in writers:
        writer.check()
    two.assert_clean()
    assert call("route", str(key), "--json").ok().document["shard"] == "s2"
    listed = call("shard", "list", "--json").ok().document
    assert listed["pins"] == [
        {"shard": "s2", "slot": slot_of(position(key)), "position_hex": place, "there": True}
    ]
    assert f"Pinned: position {place} to s2" in call("shard", "list").ok().out
    call("doctor").ok()

    call("shard", "remove", "s2", "--yes").failed(3, "pinned to it: a key in slot", "`shardkit shard unpin`")
    call("shard", "pin", str(key), "s1", "--yes").failed(
        3, f"The position {place} is pinned to s2", "holds it"
    )

    back = call("shard", "unpin", str(key), "--mode", "locked", "--yes", "--json").ok().document
    assert back["unpinned"]["exact"] is True
    assert where(two, key) == ["s1"]
    call("shard", "unpin", str(key), "--yes").failed(3, "is pinned")
    call("shard", "remove", "s2", "--yes").ok()
    two.assert_clean()


def test_a_slot(two: Shards, call: Program) -> None:
    key = key_on(two, "s2")
    slot = slot_of(position(key))
    done = call("shard", "pin", str(key), "s1", "--yes", "--json").ok().document
    assert done["pin"]["exact"] is False
    assert done["plan"]["slots_moved"] == done["plan"]["slots_minimum"] == 2, "there and, for the share, back"
    assert done["job"]["kind"] == f"pin slot {slot} to s1"
    assert where(two, key) == ["s1"]
    topology = two.topology()
    assert {s.name: topology.owned(s.id).width >> 48 for s in topology.shards} == {"s1": 32_768, "s2": 32_768}
    call("shard", "pin", str(key), "s2", "--exact", "--yes").failed(
        3, f"The slot {slot} is pinned to s1", "lies in it"
    )
    # Pinned to where it is: recorded, and nothing moves. Pinned to another: it goes there.
    assert call("shard", "pin", str(key), "s1", "--json").ok().document["job"] is None
    call("shard", "pin", str(key), "s2", "--yes").ok()
    assert where(two, key) == ["s2"]
    two.assert_clean()
    told = call("shard", "unpin", str(key), "--yes").ok()
    assert "Nothing to do." in told.out


def test_what_cannot_be_pinned(two: Shards, call: Program) -> None:
    call("shard", "pin", "x", "s1", "--yes").failed(2, "'x' is no key of a declared table")
    call("shard", "pin", "5", "s9", "--yes").failed(3, "There is no shard 's9'")
    call("shard", "pin", "5", "s1", "--table", "nothing", "--yes").failed(
        2, "No sharded table is named 'nothing'"
    )
    call("shard", "pin", "5", "s1", "--table", "users", "--type", "text", "--yes").failed(
        2, "exclude each other"
    )
    call("shard", "unpin", "5", "--yes").failed(3, "Neither the key '5' nor its slot")
    assert call("shard", "pin", "-5", "s1", "--plan-only", "--json").ok().document["pin"]["key"] == "-5"
