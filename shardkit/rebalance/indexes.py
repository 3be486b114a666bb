"""When the secondary indexes of a target are set aside, and put back: one transfer's part of it.

They are set aside only on a shard that owns no arc, before anything is copied there; and no transfer to that shard
compares rows before all of them are back, whichever transfer set them aside. So no application misses one. Where a
table has rows, or somebody holds it, its indexes stay as they are: that is only slower. `storage.setaside` has the
single acts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from shardkit.core.errors import MoveWaiting
from shardkit.core.move import FINAL, Phase
from shardkit.storage import inspection, setaside
from shardkit.storage.attended import attended
from shardkit.storage.setaside import SetAside, State

if TYPE_CHECKING:
    from .transfer import TransferRun

WORTH_WAITING = 2.0
"""Seconds that a table is waited for, to set its indexes aside; after them they are left."""
_COPYING_AT_MOST = (Phase.PLANNED, Phase.PREPARING, Phase.COPYING)
POLL = 0.2
SHORTLY = 0.02


class Indexing:
    """Of which shards indexes are set aside or put back now, and by one transfer only. One a mover."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: set[int] = set()
        self._building: set[int] = set()

    @contextmanager
    def alone(self, shard_id: int) -> Iterator[bool]:
        """Keep the other transfers off the indexes of a shard; False if one of them has them."""
        with self._lock:
            mine = shard_id not in self._held
            self._held.add(shard_id)
        try:
            yield mine
        finally:
            if mine:
                with self._lock:
                    self._held.discard(shard_id)

    @contextmanager
    def building(self, shard_id: int) -> Iterator[None]:
        """An index of a shard is being built: whoever else wants its table waits for as long as that takes."""
        self._building.add(shard_id)
        try:
            yield
        finally:
            self._building.discard(shard_id)

    def is_building(self, shard_id: int) -> bool:
        """Whether an index of a shard is being built."""
        return shard_id in self._building


class Indexes:
    """The target's secondary indexes, as one transfer sees to them."""

    def __init__(self, run: TransferRun) -> None:
        self._run = run

    # --- before the copy -------------------------------------------------------------------------------------------

    def set_aside(self) -> None:
        """Set the indexes of tables without rows aside, on a target that nobody uses yet."""
        run, indexing = self._run, self._run.around.indexing
        if not setaside.is_known(run.target):
            return
        while not indexing.is_building(run.row.target):
            with indexing.alone(run.row.target) as mine:
                if mine:
                    if not self._is_used():
                        self._set_all_aside()
                    return
            run.around.pause(SHORTLY)  # another transfer does it

    def _set_all_aside(self) -> None:
        run = self._run
        for table in run.tables:
            if not setaside.is_worth_it(run.target, table):
                continue
            try:
                run.waits.with_lock_retries(
                    f"the indexes of {table}",
                    run.target_shard,
                    partial(setaside.set_aside, run.target, table, run.around.token),
                    table,
                    inspection.Against.EVERYBODY,
                    patience=min(WORTH_WAITING, run.around.patience),
                )
            except MoveWaiting:
                run.waits.tell(None)  # the copy fills them as it goes

    def _is_used(self) -> bool:
        """Whether the target owns anything, or will while this transfer copies: another one has copied already."""
        run = self._run
        if run.topology().owned(run.row.target):
            return True
        return any(
            row.target == run.row.target and row.id != run.row.id and row.phase not in (*_COPYING_AT_MOST, *FINAL)
            for row in run.catalog.transfers(run.row.job_id)
        )

    # --- after it --------------------------------------------------------------------------------------------------

    def put_back(self, attend: Callable[[], None] = lambda: None) -> None:
        """Build whatever is set aside on the target; ``attend`` is called now and then while that lasts.

        The phase that is entered first keeps other transfers from setting anything aside behind this.
        """
        run, shard = self._run, self._run.target_shard
        while True:
            with run.around.indexing.alone(shard.id) as mine:
                if mine:
                    self._put_all_back(attend)
                    return
            run.waits.tell(f"another transfer builds the indexes on shard {shard.name}")
            attend()
            run.around.pause(POLL)

    def _put_all_back(self, attend: Callable[[], None]) -> None:
        run = self._run
        began = time.monotonic()
        found = setaside.noted(run.target)
        for index in found:
            self._put_back(index, attend)
        run.waits.tell(None)
        if found:
            run.catalog.note(run.row.id, index_seconds=time.monotonic() - began)

    def _put_back(self, index: SetAside, attend: Callable[[], None]) -> None:
        run, shard = self._run, self._run.target_shard
        token = run.around.token
        while True:
            state = setaside.state(run.target, index)
            if state is State.MISSING:
                self._build(index, attend)
            elif state is State.UNFINISHED:
                drop = partial(setaside.drop_unfinished, run.target, index, token)
                run.waits.with_lock_retries(f"what is there of the index {index}", shard, drop)
            else:
                if state is not State.BUILT:
                    self._leave(index, state)
                finish = partial(setaside.finish, run.target, index, token)
                return run.waits.with_lock_retries(f"the index {index}", shard, finish)

    def _build(self, index: SetAside, attend: Callable[[], None]) -> None:
        run, shard = self._run, self._run.target_shard
        # On a connection of its own: it waits for every transaction that may know the table without the index.
        connection = run.shards.get(shard)
        pid = connection.info.backend_pid
        what = f"the index {index} on shard {shard.name}"
        run.waits.tell(f"{what} is being built")

        def working() -> str:
            how_far = setaside.progress(run.target, pid)
            return f"{what} is being built" + (f" ({how_far})" if how_far else "")

        look_after = run.waits.looking_after(what, shard, pid, working)

        def look() -> None:
            attend()
            look_after()

        with run.around.indexing.building(shard.id):
            try:
                attended(connection, partial(setaside.build, connection, index, run.around.token), look)
            except psycopg.errors.LockNotAvailable:
                run.around.pause(POLL)  # the token's row, which a killed mover's statement still has

    def _leave(self, index: SetAside, state: State) -> None:
        """Say in the audit trail that an index does not come back."""
        run = self._run
        why = "its table has gone" if state is State.WITHOUT_TABLE else "there is another one of that name"
        with run.catalog.writing("catalog.note") as cursor:
            run.catalog.event(
                cursor, "index left", job=run.row.job_id, transfer=run.row.id, shard=run.target_shard.name,
                index=str(index), definition=index.definition, why=why,
            )  # fmt: skip
