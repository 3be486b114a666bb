"""What makes rows of a table unfit to move that its own description does not tell: what refers to it, who alters it
now, what its partitions are.

Asked by the preflight. Nothing here waits for a lock, and nothing changes a table.
"""

from __future__ import annotations

from shardkit.core.topology import HomeTable, ReferenceTable, ShardedTable, Topology

from .connections import Connection
from .predicate import relation

_REFERENCES = """
SELECT k.conname,
       (SELECT nspname FROM pg_namespace WHERE oid = other.relnamespace), other.relname,
       ARRAY(SELECT a.attname::text FROM unnest(k.conkey) WITH ORDINALITY u (attnum, place)
             JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.attnum ORDER BY u.place),
       ARRAY(SELECT a.attname::text FROM unnest(k.confkey) WITH ORDINALITY u (attnum, place)
             JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = u.attnum ORDER BY u.place)
FROM pg_constraint k
JOIN pg_class other ON other.oid = coalesce(pg_partition_root(k.confrelid)::oid, k.confrelid)
WHERE k.contype = 'f' AND k.conparentid = 0 AND k.conrelid = to_regclass(%(name)s)
ORDER BY 1
"""
_REFERRERS = """
SELECT DISTINCT k.conname, (SELECT nspname FROM pg_namespace WHERE oid = other.relnamespace), other.relname
FROM pg_constraint k
JOIN pg_class other ON other.oid = coalesce(pg_partition_root(k.conrelid)::oid, k.conrelid)
WHERE k.contype = 'f' AND k.conparentid = 0 AND k.confrelid = to_regclass(%(name)s)
ORDER BY 1
"""
# By numbers of tables, as a name could only be looked up under a lock that DDL holds. Vacuum truncates under such a
# lock too.
_DDL = """
SELECT coalesce('prepared transaction ' || quote_literal(x.gid),
                'pid ' || l.pid || ', user ' || a.usename || ', application ' ||
                coalesce(nullif(a.application_name, ''), '-') || ': ' || left(a.query, 80), 'a session')
FROM pg_locks l
JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
-- A prepared transaction has no process; its lock on its own number says which it is.
LEFT JOIN pg_locks t ON l.pid IS NULL AND t.pid IS NULL AND t.locktype = 'transactionid'
    AND t.virtualtransaction = l.virtualtransaction
LEFT JOIN pg_prepared_xacts x ON x.transaction = t.transactionid
WHERE n.nspname = %(schema)s AND c.relname = %(table)s
  AND l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.mode = 'AccessExclusiveLock' AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
  AND clock_timestamp() - coalesce(a.xact_start, x.prepared) > make_interval(secs => %(seconds)s)
ORDER BY coalesce(a.xact_start, x.prepared) LIMIT 1
"""
_PARTITIONS = """
SELECT c.relkind = 'f', c.oid::regclass::text, coalesce(pg_get_expr(c.relpartbound, c.oid), ''),
       coalesce(pg_get_partkeydef(c.oid), ''), t.level
FROM pg_partition_tree(%(name)s::regclass) t JOIN pg_class c ON c.oid = t.relid
ORDER BY t.level, 2
"""


def foreign_keys(connection: Connection, table: ShardedTable, topology: Topology) -> list[str]:
    """Why foreign keys of the table, or to it, would point at rows of another shard once rows have moved. Copies and
    purges check none."""
    name = relation(table).as_string(connection)
    reasons = []
    for constraint, schema, other, mine, theirs in connection.execute(_REFERENCES, {"name": name}):
        known = topology.declared_tables.get((schema, other))
        what = f"foreign key {constraint} of {table} refers to {schema}.{other}"
        if known is None:
            reasons.append(f"{what}, which is not declared, so its rows would not come along")
        elif isinstance(known, HomeTable):
            reasons.append(f"{what}, whose rows are on shard {known.shard} alone")
        elif isinstance(known, ShardedTable) and (
            (table.key, known.key) not in zip(mine, theirs, strict=True) or table.key_type != known.key_type
        ):
            reasons.append(f"{what} without the shard keys, so that the other row may be on another shard")
    for constraint, schema, other in connection.execute(_REFERRERS, {"name": name}):
        known = topology.declared_tables.get((schema, other))
        if known is None:
            reasons.append(
                f"{schema}.{other}, which is not declared, refers to {table} by {constraint}: its rows would stay"
            )
        elif isinstance(known, HomeTable | ReferenceTable):
            reasons.append(f"{schema}.{other}, which is not sharded, refers to {table} by {constraint}")
    return reasons


def ddl(connection: Connection, table: ShardedTable, seconds: float) -> str | None:
    """A session, in words, that has been altering the table for longer than ``seconds``; it can only be read after."""
    found = connection.execute(
        _DDL, {"schema": table.schema, "table": table.name, "seconds": seconds}
    ).fetchone()
    return None if found is None else str(found[0])


def partitions(source: Connection, target: Connection, table: ShardedTable) -> list[str]:
    """Why rows of the source's partitions could not be published, or would find none on the target."""
    name = relation(table).as_string(source)
    here = source.execute(_PARTITIONS, {"name": name}).fetchall()
    there = target.execute(_PARTITIONS, {"name": name}).fetchall()
    reasons = [
        f"partition {part} of table {table} is a foreign table, whose rows replication does not see"
        for found in (here, there)
        for is_foreign, part, *_ in found
        if is_foreign
    ]
    keys = [{(key, level) for *_, key, level in found if key} for found in (here, there)]
    bounds = [{(bound, level) for _, _, bound, _, level in found if level} for found in (here, there)]
    if ("DEFAULT", 1) not in bounds[1]:
        if keys[0] != keys[1]:
            reasons.append(f"table {table} is partitioned in another way on the target")
        reasons += [
            f"table {table} has no partition {bound} on the target"
            for bound, _ in sorted(bounds[0] - bounds[1])
        ]
    return reasons
