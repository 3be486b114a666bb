"""The rules of the protocol, each as a switch of the model: what is lost when one is taken away is a test."""

from __future__ import annotations

from enum import StrEnum


class Rule(StrEnum):
    """A rule, in the words of its reason."""

    FENCE = "a transaction begins behind the fence"
    CLOSING_LOCK = "who closes a shard waits for the transactions that began under the older fence"
    MARK_CLOSES = "a mark closes the target, so that nobody reads there without the ownership predicate"
    RULE_R = "all shards of a transaction are under one topology"
    GUARDS_FIRST = "a statement is sent when every shard of its route is held"
    OLD_SNAPSHOTS = "a snapshot older than a gain does not read what was gained"
    PREDICATE = "scattered statements carry the ownership predicate where arcs are in transit"
    OPEN_BESIDE = "the target is opened beside the old name, and waits for nobody"
    DRAIN = "a closing drains every older name of the shard"
    MARK_FIRST = "arcs are marked before the first row arrives"
    TOKEN = "every transaction of a mover on a shard writes its token first"
    LEASE = "every write to the catalog names the lease"
    TOKEN_BEFORE_LOOKING = "who settles or aborts writes its token on the source before it looks"
    LOOK = "a pending change is looked at before it is discarded"
    ONE_CHANGE = "one change is pending in the whole cluster"
    FRESH_NUMBERS = "numbers are never used again"
    GUARD = "rows are deleted and copied only behind the fence under which they are not owned"
    NEWEST_FENCE = "rows are deleted only behind the newest fence of a shard"
    EXPECTED_NAME = "a fence of another name, or a newer one than the change makes, stops the change"
    SLOT_LOCK = "who drops a slot waits for who makes it"
    WAIT_FOR_REPLAY = "the decision waits until the target has applied everything"
    LOCKED_COPY = "without replication, rows are copied while the source is locked"
    COMPARE = "rows are compared before the decision"
    DISABLE_AT_OPENING = "the opening disables the subscription"
    DROP_BEFORE_PURGE = "subscription and slot go before the purge's deletes"
    SLOT_BACK_FIRST = "the slot of the way back is there before the decision"
    ONE_DIRECTION = "the subscription there is dropped before the one back runs"
    DROP_BACK = "who finalizes or aborts drops the way back too"
    SAME_SERVERS = "a server that changed sends the transfer back"
    SYNCHRONOUS_DECISION = "the decision is committed synchronously"
    HUNG_SESSIONS = "the server ends a session that holds a fence and does nothing"
    STANDBYS_OF_TARGET = "the decision waits for the target's standbys"
    STANDBYS_OF_SOURCE = "the opening waits for the source's standbys"
    STANDBYS_BEFORE_PURGE = "the purge waits for the target's standbys to have the opening"


ALL = frozenset(Rule)


def without(*rules: Rule) -> frozenset[Rule]:
    """All rules but these."""
    return ALL - set(rules)
