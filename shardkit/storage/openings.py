"""Where in its WAL a target opened: what the replication back to the source begins with.

What lies before came from the source, and would come back to it; what lies after is the application's. The position
is written by the opening itself, before anybody can write under the new fence, so it lies between the two; an opening
that is made once more, by whoever settles it after a crash, leaves the first. Every function works on the target.
"""

from __future__ import annotations

from .connections import Connection, value


def write(target: Connection, transfer: int) -> None:
    """Keep the position of the caller's transaction, which opens, unless one is kept already."""
    target.execute(
        "INSERT INTO shardkit.opened (transfer_id, lsn) VALUES (%s, pg_current_wal_insert_lsn()) "
        "ON CONFLICT DO NOTHING",
        (transfer,),
    )


def read(target: Connection, transfer: int) -> str | None:
    """The position that was kept."""
    found = value(target, "SELECT lsn::text FROM shardkit.opened WHERE transfer_id = %s", (transfer,))
    return None if found is None else str(found)


def forget(target: Connection, transfer: int) -> None:
    """The way back is not needed any more."""
    target.execute("DELETE FROM shardkit.opened WHERE transfer_id = %s", (transfer,))
