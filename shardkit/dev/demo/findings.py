"""The comparison of the end: every acknowledged write against every row that the shards hold. Pure.

Rows come from `endcheck`, expectations from the clients' ledgers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shardkit.core.topology import Topology

from .content import Key, Layout, columns
from .ledger import Expected


class Stored(NamedTuple):
    """A row as a shard holds it: its key, the other columns by name, the position of its shard key."""

    shard: int
    table: str
    key: Key
    columns: dict[str, Any]
    position: int


@dataclass
class Findings:
    """What is wrong, each as a sentence."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)
    misplaced: list[str] = field(default_factory=list)
    rows: int = 0


def examine(expected: Expected, layout: Layout, topology: Topology, rows: Iterable[Stored]) -> Findings:
    """Compare all rows of all shards with what was acknowledged.

    ``lost``: acknowledged, and nowhere. ``doubled``: on two shards. ``stale``: not as acknowledged last, or deleted and
    there. ``unwritten``: never written by a client. ``misplaced``: on a shard that does not own the position.
    """
    found = Findings()
    names = {shard.id: shard.name for shard in topology.shards}
    held: dict[tuple[str, Key], int] = {}
    for row in rows:
        found.rows += 1
        where = f"{row.table} {row.key} on shard {names[row.shard]}"
        if (row.table, row.key) in held:
            found.doubled.append(f"{where} is also on shard {names[held[row.table, row.key]]}")
        held[row.table, row.key] = row.shard
        if topology.ring.owner_at(row.position) != row.shard:
            found.misplaced.append(f"{where} belongs to shard {names[topology.ring.owner_at(row.position)]}")
        _examine_row(found, expected, layout, row, where)
    for table, keys in expected.rows.items():
        for key, revision in keys.items():
            if (table, key) not in held and revision is not None and not expected.allows(table, key, None):
                found.lost.append(f"{table} {key}, acknowledged at revision {revision}")
    return found


def _examine_row(found: Findings, expected: Expected, layout: Layout, row: Stored, where: str) -> None:
    revision = row.columns["revision"]
    if not expected.allows(row.table, row.key, revision):
        if row.key not in expected.rows.get(row.table, {}):
            found.unwritten.append(f"{where}, at revision {revision}")
            return
        last = expected.rows[row.table][row.key]
        wanted = "deleted" if last is None else f"at revision {last}"
        found.stale.append(f"{where} is at revision {revision}, and was acknowledged last as {wanted}")
    elif row.columns != columns(layout, row.table, row.key, revision):
        found.stale.append(f"{where} has columns that are not those of its revision {revision}")
