"""A client process of the demo: ``python -m shardkit.dev.demo CONFIGURATION``.

It opens the cluster as an application would, loads its users, waits for the word, and works until it is told to stop.
The demo talks to it by lines on its stdin (``start``, ``stop``) and reads JSON lines from its stdout; an end of stdin
means that the demo is gone. What it did is in its ledger and its measures, in the demo's folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from sqlalchemy import insert
from sqlalchemy.orm import Session, sessionmaker

from shardkit import connect
from shardkit.orm.cluster import ShardCluster

from .book import Change
from .content import Layout
from .ledger import Ledger
from .measures import Measures
from .models import MODELS
from .operations import next_operation
from .outcome import ClientReport
from .worker import Worker

THINKING = 0.005
"""Seconds that a worker pauses between two operations, on average."""
_CHUNK = 100
"""Users that are loaded in one transaction."""
_TOLD = 0.25
"""Seconds between two reports."""
_KEPT = 20
"""Errors and wrong reads that a client describes; it counts them all."""


@dataclass(frozen=True)
class Configuration:
    """What a client is told at its start. It is asynchronous if ``tasks``: its workers are then tasks of one loop."""

    catalog: str
    folder: str
    number: int
    workers: tuple[int, ...]
    tasks: bool
    layout: Layout
    seed: int

    def dump(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `dump`."""
        values = json.loads(text)
        return cls(**{**values, "workers": tuple(values["workers"]), "layout": Layout(**values["layout"])})

    @property
    def ledger(self) -> Path:
        """Where the client's ledger is."""
        return Path(self.folder, f"ledger-{self.number}.jsonl")

    @property
    def measures(self) -> Path:
        """Where the client's measures will be."""
        return Path(self.folder, f"measures-{self.number}")


class Client:
    """The workers of one process, and what they did."""

    def __init__(self, configuration: Configuration, ledger: Ledger) -> None:
        self._configuration = configuration
        self._ledger = ledger
        self._workers = [
            Worker(number, configuration.layout, configuration.seed) for number in configuration.workers
        ]
        self._measures = Measures()
        self._errors = 0
        self._described: list[str] = []
        self._reported = 0.0
        self._began, self._ended = threading.Event(), threading.Event()

    # --- the demo's word -------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Follow the demo's words; run by a thread."""
        # Not sys.stdin: a thread that waits in it holds its lock, and the interpreter needs that to exit.
        while words := os.read(0, 1024).split():
            if b"start" in words:
                self._began.set()
            if b"stop" in words:
                self._ended.set()
                return
        os._exit(1)  # the demo is gone, and nobody will ask for what we know

    def _tell(self, event: str, **values: Any) -> None:
        print(json.dumps({"event": event, **values}), flush=True)  # noqa: T201

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._reported > _TOLD:
            self._reported = now
            self._tell("progress", operations=len(self._measures), errors=self._errors)

    def finish(self) -> None:
        """Hand over what was measured and found."""
        self._measures.save(self._configuration.measures)
        stale = [found for worker in self._workers for found in worker.stale]
        report = ClientReport(len(self._measures), self._errors, self._described, len(stale), stale[:_KEPT])
        self._tell("done", **asdict(report))

    # --- one operation ---------------------------------------------------------------------------------------------

    def _succeeded(self, worker: Worker, changes: list[Change]) -> None:
        self._ledger.acknowledged(changes)
        worker.committed(changes)

    def _failed(self, worker: Worker, changes: list[Change] | None, error: Exception) -> None:
        """``changes`` are None if the error came before COMMIT was sent, so that nothing was written."""
        self._errors += 1
        if len(self._described) < _KEPT:
            self._described.append(f"{type(error).__module__}.{type(error).__name__}: {error}")
        if changes:
            self._ledger.unknown(changes)
            worker.unknown(changes)

    # --- threads of its own: none ----------------------------------------------------------------------------------

    def run(self, cluster: ShardCluster) -> None:
        """Load, wait, work: one operation after the other."""
        sessions = cluster.sessionmaker()
        (worker,) = self._workers
        for rows in worker.loads(cluster.topology.ring.owner, _CHUNK):
            with sessions() as session:
                changes = _insert(session, rows)
                session.commit()
            self._succeeded(worker, changes)
        self._tell("loaded")
        self._began.wait()
        while not self._ended.is_set():
            self._operate(worker, sessions)
            self._progress()
            self._ended.wait(_thinking(worker))

    def _operate(self, worker: Worker, sessions: sessionmaker[Any]) -> None:
        operation = next_operation(worker)
        changes: list[Change] | None = None
        began = time.monotonic()
        try:
            with sessions() as session:
                changes = operation(worker, session)
                session.commit()
        except Exception as error:
            self._failed(worker, changes, error)
        else:
            self._succeeded(worker, changes)
        self._measures.add(began, time.monotonic())

    # --- tasks of one loop -----------------------------------------------------------------------------------------

    async def run_tasks(self, cluster: ShardCluster) -> None:
        """The same with a task for each worker, on the asynchronous session."""
        await asyncio.gather(*(self._load_task(cluster, worker) for worker in self._workers))
        self._tell("loaded")
        await asyncio.to_thread(self._began.wait)
        await asyncio.gather(*(self._work_task(cluster, worker) for worker in self._workers))
        await cluster.adispose()

    async def _load_task(self, cluster: ShardCluster, worker: Worker) -> None:
        sessions = cluster.async_sessionmaker()
        for rows in worker.loads(cluster.topology.ring.owner, _CHUNK):
            async with sessions() as session:
                changes = await session.run_sync(_insert, rows)
                await session.commit()
            self._succeeded(worker, changes)

    async def _work_task(self, cluster: ShardCluster, worker: Worker) -> None:
        sessions = cluster.async_sessionmaker()
        while not self._ended.is_set():
            operation = partial(next_operation(worker), worker)
            changes: list[Change] | None = None
            began = time.monotonic()
            try:
                async with sessions() as session:
                    changes = await session.run_sync(operation)
                    await session.commit()
            except Exception as error:
                self._failed(worker, changes, error)
            else:
                self._succeeded(worker, changes)
            self._measures.add(began, time.monotonic())
            self._progress()
            await asyncio.sleep(_thinking(worker))


def _thinking(worker: Worker) -> float:
    return worker.random.expovariate(1 / THINKING)


def _insert(session: Session, rows: dict[str, list[dict[str, Any]]]) -> list[Change]:
    """Bulk inserts of rows by table; the changes that they are."""
    changes = []
    for table, model in MODELS.items():
        if rows[table]:
            session.execute(insert(model), rows[table])
        key = [column.name for column in model.__table__.primary_key]
        changes += [Change(table, tuple(one[name] for name in key), one["revision"]) for one in rows[table]]
    return changes


def main(arguments: Sequence[str]) -> None:
    """Run the client that the configuration describes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the demo's to handle
    configuration = Configuration.parse(arguments[0])
    cluster = connect(configuration.catalog)
    with Ledger(configuration.ledger) as ledger:
        client = Client(configuration, ledger)
        threading.Thread(target=client.listen, daemon=True).start()
        if configuration.tasks:
            asyncio.run(client.run_tasks(cluster))
        else:
            client.run(cluster)
        cluster.dispose()
        client.finish()
