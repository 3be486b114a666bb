"""Sequences that number the rows of a table: each server has its own, and rows that move bring their numbers along."""

from __future__ import annotations

from collections.abc import Sequence as Pairs
from dataclasses import dataclass

from psycopg import sql

from shardkit.core.topology import ShardedTable

from .connections import Connection
from .predicate import relation

MARGIN = 1_000
"""So many numbers are left out between what moved and what the target gives out, where there are enough."""

# Of identity and serial columns, and of defaults that name a sequence of nobody's.
_SEQUENCES = """
SELECT a.attname,
       coalesce(pg_get_serial_sequence(%(table)s, a.attname), (
           SELECT s.oid::regclass::text FROM pg_depend p JOIN pg_class s ON s.oid = p.refobjid AND s.relkind = 'S'
           WHERE p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid AND p.refclassid = 'pg_class'::regclass
           LIMIT 1))
FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = %(table)s::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""
# Its columns are its own; the start in pg_sequence is not that of RESTART or setval.
_STATE = sql.SQL("""
SELECT {name}, q.last_value, s.seqincrement, s.seqmin, s.seqmax, s.seqcycle, CASE WHEN q.is_called THEN q.last_value END
FROM {sequence} q, pg_sequence s WHERE s.seqrelid = {name}::regclass
""")


@dataclass(frozen=True, slots=True)
class Sequence:
    """A sequence as it is now; ``last`` is what it gave out last, None if nothing yet: ``start`` comes first then."""

    name: str
    start: int
    step: int
    minimum: int
    maximum: int
    cycles: bool
    last: int | None

    @property
    def ascending(self) -> bool:
        """Whether its numbers grow."""
        return self.step > 0

    def _left(self, number: int) -> int:
        """How many numbers lie beyond ``number``, in steps of this sequence; negative if it is out of bounds."""
        return (self.maximum - number if self.ascending else number - self.minimum) // abs(self.step)

    def beyond(self, given: int) -> int | None:
        """The number to go on after, so that ``given`` and what came before it are not given out again.

        None if this sequence is beyond already. It is one of the numbers that this sequence gives: two shards may share
        numbers by steps (one has the odd ones, the other the even). `ValueError` if none is left after ``given``.
        """
        base = self.start if self.last is None else self.last
        missing = (given - base) if self.ascending else (base - given)
        if missing < 0 or (missing == 0 and self.last is not None):
            return None
        steps = -(-missing // abs(self.step))
        number = base + steps * self.step
        left = self._left(number)
        if left < 1:
            raise ValueError(f"sequence {self.name} has no number left beyond {given}")
        return number + min(MARGIN, left // 2) * self.step

    def problem(self, source: Sequence) -> str | None:
        """Why this sequence, on a target, cannot go on where ``source`` is."""
        if self.ascending != source.ascending:
            return f"sequence {self.name} counts up on one side and down on the other"
        if source.last is None or source.cycles:
            return None
        try:
            self.beyond(source.last)
        except ValueError as error:
            return f"{error}, which the source's has given out already"
        return None


def of_table(connection: Connection, table: ShardedTable) -> dict[str, str]:
    """The sequence of each column that has one, by the column's name."""
    name = relation(table).as_string(connection)
    rows = connection.execute(_SEQUENCES, {"table": name}).fetchall()
    return {column: sequence for column, sequence in rows if sequence is not None}


def shared(
    source: Connection, target: Connection, table: ShardedTable, apart: frozenset[str] = frozenset()
) -> list[tuple[str, str]]:
    """The sequences, of source and target, of each column that is numbered on both; without those of the target that
    are ``apart``: they never give what others give, and to set them on would only use them up."""
    theirs = of_table(target, table)
    found = [(ours, theirs[column]) for column, ours in of_table(source, table).items() if column in theirs]
    return [(ours, other) for ours, other in found if other not in apart]


def states(connection: Connection, names: list[str]) -> dict[str, Sequence]:
    """Sequences as they are now, by name."""
    if not names:
        return {}
    # The names are as the server writes them: qualified and quoted.
    each = [_STATE.format(name=sql.Literal(name), sequence=sql.SQL(name)) for name in dict.fromkeys(names)]
    found = connection.execute(sql.SQL(" UNION ALL ").join(each))
    return {row[0]: Sequence(*row) for row in found}


def problems(
    source: Connection, target: Connection, table: ShardedTable, apart: frozenset[str] = frozenset()
) -> list[str]:
    """Why the target could not number rows of the table after a move."""
    pairs = shared(source, target, table, apart)
    ours = states(source, [mine for mine, _ in pairs])
    theirs = states(target, [other for _, other in pairs])
    found = [theirs[other].problem(ours[mine]) for mine, other in pairs]
    return [text for text in found if text is not None]


def pass_over(source: Connection, target: Connection, pairs: Pairs[tuple[str, str]]) -> None:
    """Set each target sequence beyond what its source sequence has given out, unless it is there already.

    One that has run to its end since the preflight is set there: it then gives out nothing, instead of doubles.
    """
    if not pairs:
        return
    ours = states(source, [mine for mine, _ in pairs])
    for mine, other in pairs:
        given = ours[mine].last
        if given is None:
            continue
        sequence = states(target, [other])[other]
        try:
            number = sequence.beyond(given)
        except ValueError:
            number = None if sequence.cycles else sequence.maximum if sequence.ascending else sequence.minimum
        if number is not None:
            # Others may draw numbers meanwhile.
            behind = sql.SQL("<" if sequence.ascending else ">")
            target.execute(
                sql.SQL(
                    "SELECT setval({name}::regclass, {number}) WHERE "
                    "coalesce(pg_sequence_last_value({name}::regclass) {behind} {number}, true)"
                ).format(name=sql.Literal(other), number=sql.Literal(number), behind=behind)
            )
