"""The way back of a transfer whose source is kept: the replication from target to source, and a rollback along it.

While the source is kept the servers do all the work: what applications write on the target goes to the source, and
no mover runs. A rollback is a cutover like the first with the sides exchanged: the last writes, a comparison of all
rows by content, the decision by the target's fence, the opening of the source. Driven by `rebalance.transfer`, which
also takes the way back down where it was never used.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from shardkit.core.errors import MoverSuperseded, RollbackImpossible
from shardkit.core.move import Event, Mode
from shardkit.core.topology import ShardedTable
from shardkit.storage import change, openings, replication, sourceguard
from shardkit.storage.connections import transaction

from . import preflight
from .clearing import DDL
from .cutover import Cutover
from .opening import Opening, name_back
from .stream import Stream
from .verify import Verifier

if TYPE_CHECKING:
    from .transfer import TransferRun

FINALIZE = "`shardkit rebalance finalize` keeps the arcs where they are and deletes the rows from the source."


class WayBack:
    """The way back of one transfer."""

    def __init__(self, run: TransferRun) -> None:
        self._run = run
        self.stream = Stream(run, run.target_shard, run.source_shard, name_back(run.name), remedy=FINALIZE)
        self._verifier: Verifier | None = None

    # --- keeping the source ----------------------------------------------------------------------------------------

    def refuse_what_is_not_carried(self) -> None:
        """From before the first write that goes back, the target refuses what replication does not carry."""
        run = self._run
        for table in run.tables:
            install = partial(self._install_refusals, table)
            run.waits.with_lock_retries(f"the trigger on {table}", run.target_shard, install, table)

    def _install_refusals(self, table: ShardedTable) -> None:
        run = self._run
        with transaction(run.target, *DDL, step="install_refusals"):
            change.claim(run.target, run.around.token)
            sourceguard.install_refusals(run.target, run.row.id, table)

    def begin(self) -> None:
        """Replicate to the source what is written on the target since it opened."""
        run = self._run
        position = openings.read(run.target, run.row.id)
        if position is not None:  # else the target lost it, and more: a rollback will be refused
            self.stream.begin_at(position)

    def drop(self) -> None:
        """End it on both sides."""
        self.stream.drop()

    # --- a rollback ------------------------------------------------------------------------------------------------

    def require_possible(self) -> None:
        """`RollbackImpossible` where writes of the target may be missing on the source, or the reverse."""
        run = self._run
        stored = run.catalog.transfer(run.row.id).record.get("identities", {})
        now = run.identities()
        changed = sorted(name for name in now if now[name] != stored.get(name))
        if changed:
            raise RollbackImpossible(
                f"The server of shard {changed[0]} is another one than when the rows moved: it failed over or was "
                "restored, so it is not known whether the source has every write.",
                hint=FINALIZE,
                shard=changed[0],
            )
        if not replication.subscription_exists(self.stream.subscriber, self.stream.name):
            raise RollbackImpossible(
                f"Shard {run.source_shard.name} has no subscription {self.stream.name} any more.",
                hint=FINALIZE,
                shard=run.source_shard.name,
            )
        if self.stream.is_lost():
            raise RollbackImpossible(
                f"Shard {run.target_shard.name} has lost the slot {self.stream.name}, and with it writes that the "
                "source does not have.",
                hint=FINALIZE,
                shard=run.target_shard.name,
            )

    def decided(self) -> bool:
        """Whether the source owns the arcs, by the topology in force."""
        return self._run.topology().owned(self._run.row.source).issuperset(self._run.row.arcs)

    def catch_up(self) -> Event:
        """Note what is written from now on, and wait for what was written until now."""
        run = self._run
        self.require_possible()
        for index, table in enumerate(run.tables):
            install = partial(self._install, index, table)
            run.waits.with_lock_retries(f"the trigger on {table}", run.target_shard, install, table)
        self.stream.attend(True)
        self.stream.catch_up()
        return Event.CAUGHT_UP

    def _install(self, index: int, table: ShardedTable) -> None:
        run = self._run
        with transaction(run.target, *DDL, step="install_triggers_back"):
            change.claim(run.target, run.around.token)
            sourceguard.install(run.target, run.row.id, index, table, run.row.arcs)

    def verify(self) -> Event:
        """Compare both sides by content."""
        run = self._run
        self.require_possible()
        preflight.check_tables(
            run.topology(), run.tables, run.target_shard, run.source_shard, run.probes, Mode.LOGICAL
        )
        run.track.update(rows_expected=run.catalog.transfer(run.row.id).record["rows_expected"])
        self._verifier = run.verifier(self.stream)
        self._verifier.run()
        run.catalog.note(run.row.id, certificate_back=self._verifier.certificate)
        return Event.VERIFIED

    def cut_over(self) -> Event:
        """Hand the arcs back."""
        run = self._run
        run.settle()
        if self.decided():
            return Event.DECIDED
        self.require_possible()
        if self._verifier is None:
            return Event.POSTPONED  # what was noted as written is not known to this process: compare again
        opening = Opening(run.row.id, run.name, keeps_source=True, back=True)
        cutover = Cutover(run, self.stream, self._verifier, opening)
        if not cutover.attempt():
            return Event.POSTPONED
        run.catalog.note(
            run.row.id, pause_back_ms=cutover.pause_ms(), certificate_back=self._verifier.certificate
        )
        return Event.DECIDED

    def open(self) -> Event:
        """The source is open; whatever led here, the catalog must say so."""
        if not self.decided():
            raise MoverSuperseded("The catalog does not hold the topology that gives the arcs back.")
        return Event.OPENED

    def clear(self) -> Event:
        """Take down the way back, and the rows on the target, which does not own them any more."""
        run = self._run
        self.drop()
        run.clearing.remove_triggers(run.source_shard)
        certified = run.catalog.transfer(run.row.id).record.get("certificate_back", {}).get("rows", {})
        run.track.update(rows_expected=sum(certified.values()))
        run.clear_out(run.target_shard, partial(run.clearing.remove_triggers, run.target_shard))
        return Event.PURGED

    def stay(self) -> Event:
        """Take a rollback back that is not decided: the source is kept as before."""
        run = self._run
        run.claim(run.target_shard)
        run.settle()
        if self.decided():
            return Event.DECIDED
        run.clearing.remove_notes(run.target_shard)
        with transaction(run.target, *DDL, step="clear_notes"):
            change.claim(run.target, run.around.token)
            sourceguard.clear(run.target, run.row.id)
        self.stream.attend(False)
        return Event.UNDONE
