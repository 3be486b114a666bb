"""The doctor's examination: looks at the catalog and every shard, and judges. Changes nothing, prints nothing."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import psycopg

from shardkit.core.errors import RetryLater, ShardkitError, ShardUnreachable
from shardkit.core.move import FINAL
from shardkit.core.placement import plan
from shardkit.core.topology import HomeTable, ReferenceTable, Shard, ShardedTable, Topology
from shardkit.rebalance import preflight
from shardkit.rebalance.mover import weights_of
from shardkit.storage import (
    claims,
    indoubt,
    inspection,
    migrate,
    numbering,
    references,
    replicas,
    servers,
    standing,
    tables,
)
from shardkit.storage.catalog import KEPT_HINT, Catalog
from shardkit.storage.connections import Connection, value
from shardkit.storage.leftovers import leftovers
from shardkit.storage.sameness import differing
from shardkit.storage.urls import redacted

from . import jobs
from .output import count, duration
from .reach import AT_ONCE, reach

CATALOG = "catalog"
PREPARED_SECONDS = 5.0
"""For so long no transaction that lives is being committed."""
SPLIT = "`shardkit ids split {}` makes the sequences of all shards disjoint."


class Level(StrEnum):
    """How a finding is judged."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "PROBLEM"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check of a shard, or of the catalog, found; ``next`` is what to do about it."""

    subject: str
    check: str
    level: Level
    detail: str
    next: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The finding for ``--json``: ``subject``, ``check``, ``level`` (ok, note, problem), ``detail``, ``next``."""
        return {
            "subject": self.subject,
            "check": self.check,
            "level": self.level.value.lower(),
            "detail": self.detail,
            "next": self.next,
        }


@dataclass(frozen=True)
class View:
    """A shard under examination, what the catalog says of it, and how tables are on another shard."""

    catalog: Catalog
    topology: Topology
    shard: Shard
    connection: Connection
    patterns: Mapping[tuple[str, str], tables.Table | None]
    running: frozenset[int]
    """Ids of the transfers that are not at their end."""
    at_work: bool
    """Whether a mover is at work, so that things may change under the examination."""

    def ok(self, check: str, detail: str) -> Finding:
        """All is well."""
        return Finding(self.shard.name, check, Level.OK, detail)

    def problem(self, check: str, detail: str, todo: str) -> Finding:
        """Something is wrong."""
        return Finding(self.shard.name, check, Level.PROBLEM, detail, todo)


def examine(catalog_url: str) -> list[Finding]:
    """Every finding: of the catalog first, then of each shard."""
    with Catalog.open(catalog_url, application="shardkit doctor") as catalog:
        findings = list(_catalog(catalog))
        topology = catalog.current()
        if topology is None:
            return findings
        job = catalog.running_job()
        running = frozenset(
            row.id for row in (catalog.transfers(job.id) if job is not None else ()) if row.phase not in FINAL
        )
        at_work = catalog.lease_holder() is not None
        with reach(topology.shards, "shardkit doctor") as reached:
            there = {
                number: each for number, each in reached.items() if not isinstance(each, ShardUnreachable)
            }
            patterns = _patterns(topology, next(iter(there.values()))) if there else {}

            def look(shard: Shard) -> list[Finding]:
                connection = reached[shard.id]
                if isinstance(connection, ShardUnreachable):
                    return [
                        Finding(shard.name, "reachable", Level.PROBLEM, connection.message, connection.hint)
                    ]
                # Transactions of several threads on one connection would run into each other.
                with Catalog.open(catalog_url, application="shardkit doctor") as own:
                    view = View(own, topology, shard, connection, patterns, running, at_work)
                    return list(_examine_shard(view))

            # Side by side, as it is waiting for servers.
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for found in pool.map(look, topology.shards):
                    findings += found
            findings += _references(topology, there)
        return findings


def _patterns(topology: Topology, connection: Connection) -> dict[tuple[str, str], tables.Table | None]:
    """How the tables are on one shard, with which those of the others are compared."""
    found: dict[tuple[str, str], tables.Table | None] = {}
    for name, table in topology.declared_tables.items():
        try:
            found[name] = tables.describe(connection, table)
        except psycopg.Error:  # told where that shard is examined
            found[name] = None
    return found


def _examine_shard(view: View) -> Iterator[Finding]:
    yield view.ok("reachable", redacted(view.shard.url))
    for name, check in CHECKS:
        try:
            yield from check(view)
        except RetryLater as error:
            yield Finding(view.shard.name, name, Level.NOTE, error.message, error.hint)
        except psycopg.Error as error:
            text = error.diag.message_primary or " ".join(str(error).split())
            yield view.problem(name, text, "Look at the shard's database: it is not as shardkit made it.")


# --- the catalog ---------------------------------------------------------------------------------------------------


def _catalog(catalog: Catalog) -> Iterator[Finding]:
    topology = catalog.current()
    version = f"topology {topology.version}" if topology is not None else "no shard yet"
    yield Finding(
        CATALOG, "reachable", Level.OK, f"{redacted(catalog.url)}, cluster {catalog.cluster_id()}, {version}"
    )
    if migrate.pending(catalog.url, "catalog"):
        yield Finding(
            CATALOG, "schema", Level.PROBLEM, "its tables are of an older shardkit", "`shardkit init`"
        )
    else:
        yield Finding(CATALOG, "schema", Level.OK, "up to date")
    yield _pending(catalog)
    yield _job(catalog)
    yield from _joining(catalog)
    if topology is not None:
        yield from _leaving(topology)
        yield from _declared(topology)
        yield _shares(catalog, topology)


def _pending(catalog: Catalog) -> Finding:
    proposal = catalog.proposed()
    if proposal is None:
        return Finding(CATALOG, "change", Level.OK, "none is pending")
    holder = catalog.lease_holder()
    detail = f"topology {proposal.version} is pending"
    if holder is not None:
        return Finding(CATALOG, "change", Level.OK, f"{detail}, made by {holder}")
    return Finding(CATALOG, "change", Level.PROBLEM, f"{detail}, and nobody is at work", standing.RESUME)


def _job(catalog: Catalog) -> Finding:
    job = catalog.running_job()
    if job is None:
        return Finding(CATALOG, "job", Level.OK, "none is unfinished")
    holder = catalog.lease_holder()
    if holder is not None:
        return Finding(CATALOG, "job", Level.OK, f"job {job.id} is run by {holder}")
    if catalog.is_kept(job):
        detail = f"the sources of job {job.id} keep the moved rows, and replication holds back WAL for them"
        return Finding(CATALOG, "job", Level.NOTE, detail, KEPT_HINT)
    if job.paused:
        return Finding(CATALOG, "job", Level.NOTE, f"job {job.id} is paused", jobs.RESUME)
    reason = f": {job.last_error}" if job.last_error else ""
    return Finding(
        CATALOG,
        "job",
        Level.PROBLEM,
        f"job {job.id} is unfinished and nobody works on it{reason}",
        jobs.RESUME,
    )


def _joining(catalog: Catalog) -> Iterator[Finding]:
    if catalog.lease_holder() is not None:
        return  # the mover at work may be the one that adds it
    for name, url in claims.stale(catalog):
        yield Finding(
            CATALOG,
            "joining",
            Level.PROBLEM,
            f"the database {redacted(url)} was claimed for shard {name}, which never joined",
            "`shardkit shard add` with this name and URL goes on; `DELETE FROM shardkit.shard` there gives it up.",
        )


def _leaving(topology: Topology) -> Iterator[Finding]:
    for shard in topology.shards:
        if shard.leaving:
            yield Finding(
                CATALOG,
                "leaving",
                Level.NOTE,
                f"shard {shard.name} is to leave",
                f"`shardkit shard remove {shard.name}` goes on; `shard reweight {shard.name}=WEIGHT` keeps it.",
            )


def _declared(topology: Topology) -> Iterator[Finding]:
    if not topology.declared_tables:
        yield Finding(
            CATALOG,
            "tables",
            Level.NOTE,
            "no table is declared",
            "`shardkit schema declare MODULE:ATTR` declares them.",
        )


def _references(topology: Topology, connections: Mapping[int, Connection]) -> Iterator[Finding]:
    """Whether the reference tables hold the same rows on all shards that answer."""
    for table in topology.references:
        try:
            found = differing(topology, connections, table)
        except RetryLater as error:
            yield Finding(CATALOG, "references", Level.NOTE, error.message, error.hint)
            continue
        except psycopg.Error as error:
            text = error.diag.message_primary or " ".join(str(error).split())
            yield Finding(
                CATALOG, "references", Level.PROBLEM, f"{table}: {text}", "Look at the table there."
            )
            continue
        if not found:
            yield Finding(CATALOG, "references", Level.OK, f"{table} is the same on every shard that answers")
            continue
        listed = ", ".join(f"{name}: {each.rows:,} rows" if each else name for name, each in found.items())
        yield Finding(
            CATALOG,
            "references",
            Level.PROBLEM,
            f"the rows of {table} differ ({listed})",
            "Find the shard that is right, and make the rows of the others equal, in one transaction each.",
        )


def _shares(catalog: Catalog, topology: Topology) -> Finding:
    placement = plan(topology, weights_of(topology))
    if placement.transfers and catalog.running_job() is None:
        return Finding(
            CATALOG,
            "shares",
            Level.NOTE,
            f"{count(placement.slots_moved, 'slot')} and pinned keys are not where weights and pins want them"
            if topology.pins
            else f"{count(placement.slots_moved, 'slot')} are not where the weights want them",
            "`shardkit rebalance run` moves them.",
        )
    return Finding(
        CATALOG,
        "shares",
        Level.OK,
        f"{count(len(topology.shards), 'shard')}, {count(len(topology.tokens), 'arc')}",
    )


# --- a shard -------------------------------------------------------------------------------------------------------


def _server(view: View) -> Iterator[Finding]:
    problems = preflight.server_problems(view.connection)
    for text in problems:
        yield view.problem(
            "server", text, "Correct the server or the role; until then no row can move here or away."
        )
    if not problems:
        version = view.connection.info.parameter_status("server_version")
        wal_level = servers.settings(view.connection, "wal_level")["wal_level"]
        slowly = "" if wal_level == "logical" else " (rows leave it in locked steps)"
        yield view.ok("server", f"PostgreSQL {version}, wal_level {wal_level}{slowly}, hash as the ring's")


def _identity(view: View) -> Iterator[Finding]:
    restore = "Restore the shard's database, or correct its URL: `shardkit shard set-url`."
    if value(view.connection, "SELECT to_regclass('shardkit.shard')") is None:
        yield view.problem("identity", "this database is no shard", restore)
        return
    row = view.connection.execute("SELECT cluster_id, shard_id, name FROM shardkit.shard").fetchone()
    if row != (view.catalog.cluster_id(), view.shard.id, view.shard.name):
        found = f"shard {row[2]!r} (id {row[1]}) of cluster {row[0]}" if row is not None else "nobody's"
        yield view.problem("identity", f"this database is {found}", restore)
    elif migrate.pending(view.shard.url, "shard"):
        yield view.problem(
            "identity",
            "its tables in schema shardkit are of an older shardkit",
            "`shardkit init` brings it up to date.",
        )
    else:
        yield view.ok("identity", f"shard id {view.shard.id} of this cluster")


def _standing(view: View) -> Iterator[Finding]:
    """Its fences, and its copy of the topology."""
    for found in standing.examine(view.catalog, view.shard, view.connection):
        if found.check == "identity":
            continue  # told with more by a check of its own
        if found.next is None:
            yield view.ok(found.check, found.detail)
        else:
            yield view.problem(found.check, found.detail, found.next)


def _in_transit(view: View) -> Iterator[Finding]:
    arcs = view.shard.in_transit
    if not arcs:
        yield view.ok("in transit", "no arc")
    elif view.running:
        yield view.ok("in transit", f"{count(len(arcs), 'arc')} of the unfinished job")
    else:
        yield view.problem(
            "in transit",
            f"{count(len(arcs), 'arc')} marked, and no job is unfinished",
            "Answers stay right, as sessions leave these arcs out; `shardkit verify --repair` removes what it can.",
        )


def _leftovers(view: View) -> Iterator[Finding]:
    found = leftovers(view.connection, view.catalog.cluster_id(), view.running)
    for left in found:
        yield view.problem("leftovers", f"{left.what} belongs to no unfinished transfer", left.remedy)
    if not found:
        yield view.ok("leftovers", "none")


def _transactions(view: View) -> Iterator[Finding]:
    left = [
        part for part in indoubt.parts(view.connection, view.shard) if part.age_seconds > PREPARED_SECONDS
    ]
    for part in left:
        yield view.problem(
            "transactions",
            f"{part.name}, which wrote several shards, has been prepared for {duration(part.age_seconds)}",
            "`shardkit transactions recover` ends what a crash left.",
        )
    if not left:
        yield view.ok("transactions", "none is in doubt")


def _tables(view: View) -> Iterator[Finding]:
    for table in view.topology.declared_tables.values():
        if isinstance(table, HomeTable):
            yield from _home_table(view, table)
            continue
        here = tables.describe(view.connection, table)
        pattern = view.patterns[table.schema, table.name]
        if isinstance(table, ReferenceTable):
            wrong = references.problems(table, here)
        else:
            wrong = tables.key_problems(table, here)
        if here is not None and pattern is not None:
            wrong += tables.differences(table, pattern, here)
        if wrong:
            todo = "Make the table as it is on the other shards, with the migrations or the models that made those."
            yield view.problem("tables", "; ".join(wrong), todo)
        else:
            yield view.ok("tables", f"{table} {table.description}")
        if isinstance(table, ShardedTable) and here is not None:
            for text in inspection.unique_without_key(view.connection, table):
                todo = "Put the shard key into it, or let the application do without."
                yield Finding(view.shard.name, "tables", Level.NOTE, text, todo)


def _ids(view: View) -> Iterator[Finding]:
    """Primary keys that servers number: whether no two shards give the same."""
    for table in view.topology.tables:
        split = numbering.is_split(view.topology, table)
        found = numbering.problems(view.connection, view.topology, table, view.shard.id)
        for text in found:
            yield view.problem("ids", text, SPLIT.format(shlex.quote(str(table))))
        if split is not None and not found:
            residue = f"what leaves {view.shard.id} when divided by {split.stride:,}"
            yield view.ok("ids", f"{table}.{split.column} is numbered by {residue}")
        elif split is None and not found and numbering.column_of(view.connection, table) is not None:
            yield Finding(
                view.shard.name,
                "ids",
                Level.NOTE,
                f"the primary key of {table} is numbered by this server, so no second shard can join",
                SPLIT.format(shlex.quote(str(table))),
            )


def _home_table(view: View, table: HomeTable) -> Iterator[Finding]:
    if table.shard != view.shard.name:
        return
    if tables.describe(view.connection, table) is None:
        yield view.problem(
            "tables", f"table {table} does not exist", "Restore it: its rows are at home here."
        )
    else:
        yield view.ok("tables", f"{table} {table.description}")


def _replicas(view: View) -> Iterator[Finding]:
    for url in view.shard.replicas:
        try:
            with replicas.connect(view.shard, url) as connection:
                replicas.check(view.catalog, view.shard, url, connection)
                found = replicas.condition(view.shard, view.connection, connection)
        except ShardkitError as error:
            todo = f"Mend it, or `shardkit shard replica {view.shard.name} URL --remove`."
            yield view.problem("replica", error.message, todo)
            continue
        behind = f"{redacted(url)}, {found.bytes_behind:,} bytes behind"
        if found.shows_fence or view.at_work:
            yield view.ok("replica", behind)
        else:
            yield view.problem(
                "replica",
                f"{behind}, and does not show {view.shard.fence.relation}",
                "Until it has replayed the last move there, nothing is read from it: see that its replay goes on.",
            )


CHECKS: tuple[tuple[str, Callable[[View], Iterator[Finding]]], ...] = (
    ("server", _server),
    ("identity", _identity),
    ("fence", _standing),
    ("in transit", _in_transit),
    ("leftovers", _leftovers),
    ("transactions", _transactions),
    ("tables", _tables),
    ("ids", _ids),
    ("replica", _replicas),
)
