"""One transaction over several shards: who takes part, who has written, in which order they end.

A `Scope` lives as long as the outermost transaction of a session. The guarded connections of `storage.guard` report
to it; the session asks it. It sends nothing itself.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

from shardkit.core.errors import CrossShardWrite
from shardkit.core.topology import Fence

Mode = Literal["single", "two_phase", "best_effort"]
"""How many shards a transaction may write: one; several that are committed all or none; or several that are committed
one after the other."""
MODES: tuple[Mode, ...] = get_args(Mode)


class Participant(Protocol):
    """A connection of the scope, in a transaction behind a fence."""

    shard_id: int
    shard_name: str
    held: tuple[Fence, ...]
    """Fences it holds a lock on: the guard's first, then those locked in addition."""
    sent: bool
    """Whether a statement was sent in this transaction after the guard."""
    wrote: bool


class Scope:
    """The participants of one transaction, by shard."""

    __slots__ = ("committed", "failed", "mode", "participants")

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.participants: dict[int, Participant] = {}
        self.committed: list[str] = []
        """Names of the shards whose writes are committed."""
        self.failed = False
        """Whether its end has failed, so that nothing of it may be committed any more."""

    def writers(self) -> list[Participant]:
        """The participants that have written, by the numbers of their shards."""
        return sorted((one for one in self.participants.values() if one.wrote), key=lambda one: one.shard_id)

    def writer(self) -> Participant | None:
        """A participant that has written, if there is one."""
        return next((one for one in self.participants.values() if one.wrote), None)

    def admit_write(self, participant: Participant) -> None:
        """A write is about to be sent; `CrossShardWrite` if this transaction may not write there."""
        if not participant.wrote:
            self.admit_writes(participant.shard_id, participant.shard_name)
            participant.wrote = True

    def admit_writes(self, shard_id: int, name: str, *, beside: str | None = None) -> None:
        """Whether a write to this shard is allowed beside what was written, and beside a write to another shard that
        the same statement makes; `CrossShardWrite` if not."""
        if self.mode != "single":
            return
        writer = self.writer()
        if writer is not None and writer.shard_id != shard_id:
            beside = writer.shard_name
        if beside is not None:
            raise CrossShardWrite(
                f"This transaction writes to shard {beside} and would also write to shard {name}.",
                written=beside,
                shard=name,
            )
