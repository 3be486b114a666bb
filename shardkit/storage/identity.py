"""Which database is which shard: what a shard says of itself, against what the topology says of it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from shardkit.core.errors import IncompatibleServer


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """Whose shard a database must say it is, in its one row of ``shardkit.shard``.

    ``cluster`` is None where it is not known, and then not compared.
    """

    shard_id: int
    name: str
    cluster: UUID | None

    def check(self, cluster: UUID, shard_id: int, name: str) -> None:
        """`IncompatibleServer` if a database says that it is another shard."""
        if shard_id != self.shard_id or self.cluster not in (None, cluster):
            raise self.refusal(f"shard {name!r} (id {shard_id}) of catalog {cluster}")

    def refusal(self, found: str) -> IncompatibleServer:
        """The error for a database that is ``found`` instead."""
        return IncompatibleServer(
            f"The database of shard {self.name} (id {self.shard_id}) is {found}.",
            hint="`shardkit shard set-url` corrects the URL of the shard; or correct what its host name points to.",
            shard=self.name,
        )
