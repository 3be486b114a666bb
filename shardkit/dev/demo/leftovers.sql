-- What a finished move has no use for, on one shard: (kind, name). None may be left.
-- Older fences beside the one in force are no leftovers: the next change that needs it drains them.
SELECT 'replication slot' AS kind, slot_name::text AS name FROM pg_replication_slots
UNION ALL
SELECT 'replication origin', roname::text FROM pg_replication_origin
UNION ALL
SELECT 'publication', pubname::text FROM pg_publication
UNION ALL
SELECT 'subscription', subname::text FROM pg_subscription
UNION ALL
SELECT 'prepared transaction', gid::text FROM pg_prepared_xacts
UNION ALL
SELECT 'trigger', tgname::text FROM pg_trigger WHERE NOT tgisinternal
UNION ALL
SELECT 'index', relname::text FROM pg_class WHERE starts_with(relname, 'shardkit_identity_')
UNION ALL
SELECT 'function', p.oid::regprocedure::text
FROM pg_proc p
JOIN pg_namespace n ON n.oid = p.pronamespace
WHERE n.nspname = 'shardkit' AND starts_with(p.proname, 'note_')
UNION ALL
SELECT 'mark of a moved arc', transfer_id::text FROM shardkit.moved
UNION ALL
SELECT 'marker', relname::text FROM pg_class
WHERE relnamespace = 'shardkit'::regnamespace AND relname ~ '^mov(ing|ed)_[0-9]'
UNION ALL
SELECT 'note of a written key', key FROM shardkit.changed
UNION ALL
SELECT 'replica identity', relation FROM shardkit.replica_identity
UNION ALL
SELECT 'index that was set aside', name FROM shardkit.set_aside
