"""What a server is: version, settings, identity; and whether its hash is the one the ring computes."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from shardkit.core.errors import IncompatibleServer
from shardkit.core.ring import position

from .connections import Connection, value

MINIMUM_VERSION = 150000

# One value for each branch of the hash functions: both folds of an integer, every tail length class of bytes.
VECTORS: tuple[int | str | UUID, ...] = (
    0,
    -1,
    2**63 - 1,
    -(2**63),
    "",
    "shardkit",
    "\N{GRINNING FACE} twelve bytes and more",
    UUID("00112233-4455-6677-8899-aabbccddeeff"),
)
_VECTOR_QUERY = """
SELECT hashint8extended(%s, 0), hashint8extended(%s, 0), hashint8extended(%s, 0), hashint8extended(%s, 0),
       hashtextextended(%s, 0), hashtextextended(%s, 0), hashtextextended(%s, 0), uuid_hash_extended(%s, 0)
"""


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """Which history of which database system this is: it changes when a standby takes over."""

    system: str
    timeline: int


def identity(connection: Connection) -> ServerIdentity:
    """The identity of the server now."""
    # By the name of the WAL file: what the control file says is that of the last checkpoint, so late after a promotion.
    row = connection.execute(
        "SELECT (SELECT system_identifier FROM pg_control_system())::text, "
        "('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int"
    ).fetchone()
    assert row is not None
    return ServerIdentity(row[0], row[1])


def settings(connection: Connection, *names: str) -> dict[str, str]:
    """Settings as ``SHOW`` prints them."""
    rows = connection.execute(
        "SELECT name, current_setting(name) FROM unnest(%s::text[]) name", (list(names),)
    )
    return dict(rows.fetchall())


def replicates_logically(connection: Connection) -> bool:
    """Whether rows can leave the server by logical replication; else they move in locked steps."""
    return bool(value(connection, "SHOW wal_level") == "logical")


def check_hash(connection: Connection) -> None:
    """Compare the known vectors; `IncompatibleServer` for a server that hashes differently (a big-endian one)."""
    row = connection.execute(_VECTOR_QUERY, VECTORS).fetchone()
    wanted = tuple(position(key) for key in VECTORS)
    if row != wanted:
        wrong = [
            repr(key) for key, found, want in zip(VECTORS, row or (), wanted, strict=False) if found != want
        ]
        raise IncompatibleServer(
            f"This server hashes {', '.join(wrong)} otherwise than the ring, so keys would be sought on wrong shards.",
            hint="Shards must run on little-endian machines with PostgreSQL's own hash functions.",
        )


def check_server(connection: Connection) -> None:
    """Whether the server can be a shard: version, a primary, its hash.

    `IncompatibleServer` names all reasons.
    """
    reasons = []
    version = connection.info.server_version
    if version < MINIMUM_VERSION:
        reasons.append(f"it runs PostgreSQL {version // 10000}, and 15 or newer is needed")
    if value(connection, "SELECT pg_is_in_recovery()"):
        reasons.append("it is a standby")
    if reasons:
        raise IncompatibleServer(
            f"This server cannot be a shard: {'; '.join(reasons)}.", hint="Correct that and try again."
        )
    check_hash(connection)
