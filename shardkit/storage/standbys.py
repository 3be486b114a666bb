"""Physical standbys of a server, as the server itself sees them: which are there, and which lack a position of its WAL.

A standby that takes over brings back what it had. So what would make two owners of a key, or none, if it were
forgotten there, has to be on the standbys before the next step is taken elsewhere. Only looks, and waits.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from .connections import Connection, value

# Logical replication runs in a database, that of a whole server in none. (Its slot would not tell: a subscription's
# walsender lets it go before it ends.) What only keeps WAL (pg_receivewal, a base backup) reports no replay.
_FROM_STANDBYS = """
FROM pg_stat_replication r JOIN pg_stat_activity a USING (pid)
WHERE a.datid IS NULL AND r.replay_lsn IS NOT NULL
"""
_STANDBYS = f"""
SELECT coalesce(nullif(r.application_name, ''), 'walreceiver') || coalesce(' at ' || host(r.client_addr), ''),
       coalesce(r.flush_lsn >= %s::pg_lsn, false) {_FROM_STANDBYS}
"""
_LAG = f"SELECT max(pg_wal_lsn_diff(pg_current_wal_lsn(), r.replay_lsn))::bigint {_FROM_STANDBYS}"

_LONGEST_POLL = 0.02
Known = Mapping[str, int]
"""Standbys that are expected: how many by each name, which several can share."""


def flushed(connection: Connection) -> str:
    """The position up to which the server's WAL is on disk: each synchronous commit so far lies before it."""
    return str(value(connection, "SELECT pg_current_wal_flush_lsn()::text"))


def connected(connection: Connection) -> Known:
    """The standbys that stream from the server now; each from its first report on."""
    return Counter(name for name, _ in connection.execute(_STANDBYS, ("0/0",)))


def lag(connection: Connection) -> int | None:
    """Bytes that the slowest standby has not replayed; None if none is connected."""
    found = value(connection, _LAG)
    return None if found is None else int(found)


def lacking(connection: Connection, position: str, known: Known) -> list[str]:
    """Those of ``known``, and of any that came since, which have not flushed ``position``, in words."""
    there, have = Counter[str](), Counter[str]()
    for name, has in connection.execute(_STANDBYS, (position,)):
        there[name] += 1
        have[name] += bool(has)
    wanted = {name: max(there[name], known.get(name, 0)) for name in {*there, *known}}
    return [
        f"{name} (behind)" if there[name] >= wanted[name] else f"{name} (gone)"
        for name in sorted(wanted)
        if have[name] < wanted[name]
    ]


def wait(
    connection: Connection, known: Known, seconds: float, tell: Callable[[str], None] = lambda names: None
) -> str:
    """Wait until ``known`` standbys, and those that come, have all that is committed now: the names of those that lack
    something after so many seconds, else an empty text. ``tell`` is called with the names at each look."""
    if not known:
        return ""
    position = flushed(connection)
    deadline = time.monotonic() + seconds
    poll = 0.001
    while missing := lacking(connection, position, known):
        names = ", ".join(missing)
        if time.monotonic() > deadline:
            return names
        tell(names)
        time.sleep(poll)
        poll = min(poll * 1.5, _LONGEST_POLL)
    return ""
