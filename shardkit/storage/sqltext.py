"""Transaction commands in SQL text: what would end, begin or unwind a transaction behind the session's back; and what
only reads.

Pure. The guard asks before it lets a statement through; it never changes one.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache


class Control(Enum):
    """What a text does to the transaction it runs in."""

    READ = "read"
    """Nothing, and it leaves nothing behind that others would miss if the transaction ended a moment later."""
    NONE = "none"
    UNWIND = "unwind"
    """It rolls back to a savepoint."""
    END = "end"
    """It begins or ends a transaction."""


# What is read as no more than a read: one SELECT that locks no row and names no function for locks.
_READ = re.compile(r"\s*(?:select|with)\b", re.IGNORECASE)
_MORE = re.compile(r"\b(?:update|share|insert|delete|merge|into)\b|advisory|;", re.IGNORECASE)
_SUSPECT = re.compile(r"begin|start|commit|end|rollback|abort|prepare", re.IGNORECASE)

# Comments that nest are skipped by hand. A text that ends within a quote falls through to the last branch, so that
# its rest is read as statements: refused rather than let through.
_TOKEN = re.compile(
    r"""
      (?P<skip> --[^\n]* | \s+
        | [eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*"
        | \$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$ )
    | (?P<comment> /\* )
    | (?P<semicolon> ; )
    | (?P<word> [^\W\d][\w$]* )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)

_CACHED_LENGTH = 16_384
_ENDS = {"begin", "start", "commit", "end", "abort"}


def control(query: bytes) -> Control:
    """What a text as it is sent, one or several statements, does to its transaction; the gravest of them counts."""
    return _cached(query) if len(query) <= _CACHED_LENGTH else _control(query)


def _control(query: bytes) -> Control:
    # Words and signs that matter are ASCII; what others stand for in the client's encoding does not matter.
    text = query.decode("utf-8", "replace")
    found = {_of_statement(words) for words in _statements(text)} if _SUSPECT.search(text) else set()
    for kind in (Control.END, Control.UNWIND):
        if kind in found:
            return kind
    return Control.READ if _READ.match(text) and not _MORE.search(text) else Control.NONE


_cached = lru_cache(maxsize=4096)(_control)


def _statements(text: str) -> list[list[str]]:
    """The first words, at most three and in lower case, of each statement of a text."""
    statements: list[list[str]] = [[]]
    complete = False
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        assert match is not None  # the last branch takes any character
        place = match.end()
        kind = match.lastgroup
        if kind == "comment":
            place = _after_comment(text, place)
        elif kind == "semicolon":
            statements.append([])
            complete = False
        elif kind == "word" and not complete:
            statements[-1].append(match.group().lower())
            complete = len(statements[-1]) == 3
        elif kind == "other":
            complete = True
    return statements


def _after_comment(text: str, place: int) -> int:
    depth = 1
    while depth:
        opening, closing = text.find("/*", place), text.find("*/", place)
        if closing < 0:
            return len(text)
        if 0 <= opening < closing:
            depth, place = depth + 1, opening + 2
        else:
            depth, place = depth - 1, closing + 2
    return place


def _of_statement(words: list[str]) -> Control:
    match words:
        case ["rollback", "to", *_] | ["rollback", "work" | "transaction", "to", *_]:
            return Control.UNWIND
        case ["rollback", *_] | ["prepare", "transaction", *_]:
            return Control.END
        case [first, *_] if first in _ENDS:
            return Control.END
        case _:
            return Control.NONE
