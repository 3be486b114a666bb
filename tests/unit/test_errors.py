"""The tree of errors, and that `docs/errors.md` says of each what the class says."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest

from shardkit.core import errors
from shardkit.core.errors import (
    CommitUnknown,
    DeclarationError,
    KeyTypeError,
    Refused,
    RetryLater,
    ShardkitError,
    ShardUnreachable,
    UsageError,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "errors.md"


def tree(root: type[ShardkitError] = ShardkitError) -> Iterator[type[ShardkitError]]:
    """The class and all below it that shardkit defines, in the order of the source."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


CLASSES = list(tree())
each = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.code)


# --- the document ---------------------------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    """The text below each heading of the second level, blanks as one."""
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(parts[::2]) == len(set(parts[::2])), "a heading of docs/errors.md is there twice"
    return {code: " ".join(text.split()) for code, text in zip(parts[::2], parts[1::2], strict=True)}


@each
def test_the_document_says_what_the_class_says(cls: type[ShardkitError]) -> None:
    message, hint = cls.default_message(), cls.default_hint()
    assert documented().get(cls.code) == f"{message} {hint}", (
        f"\n\nin docs/errors.md, this is to stand for {cls.__name__}:\n\n## {cls.code}\n\n{message}\n\n{hint}\n"
    )


def test_the_document_has_no_error_that_there_is_not() -> None:
    unknown = documented().keys() - {cls.code for cls in CLASSES}
    assert not unknown, f"remove from docs/errors.md: {', '.join(sorted(unknown))}"


# --- every class ----------------------------------------------------------------------------------------------------


def test_no_two_errors_share_a_code() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)


@each
def test_an_error_has_a_message_and_a_remedy(cls: type[ShardkitError]) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cls.code)
    paragraphs = [part for part in (cls.__doc__ or "").split("\n\n") if part.strip()]
    assert len(paragraphs) == 2, (
        f"the docstring of {cls.__name__} is the message, an empty line, and the remedy"
    )
    assert all(paragraph.strip().endswith(".") for paragraph in paragraphs)


@each
def test_the_kinds_agree_on_what_a_command_ends_with(cls: type[ShardkitError]) -> None:
    assert cls.exit_code in (
        errors.EXIT_BUG,
        errors.EXIT_USAGE,
        errors.EXIT_REFUSED,
        errors.EXIT_VERIFY,
        errors.EXIT_RETRY,
    )
    if issubclass(cls, UsageError):
        assert cls.exit_code == errors.EXIT_USAGE
    if issubclass(cls, UsageError | Refused):
        assert not cls.retryable
    if cls.retryable:
        assert cls.exit_code == errors.EXIT_RETRY


@each
def test_an_error_survives_pickling_and_copying(cls: type[ShardkitError]) -> None:
    error = cls("Shard east does not answer.", hint="Start it.", name="east", tried=3)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is cls
        assert str(again) == str(error)
        assert again.as_dict() == error.as_dict()


# --- one error ------------------------------------------------------------------------------------------------------


def test_a_bare_error_speaks_for_itself() -> None:
    error = ShardUnreachable()
    assert str(error) == (
        "A shard does not answer.\n"
        "Check the server and the URL (`shardkit shard set-url` changes it); keys of other shards are not affected."
    )
    assert error.fields == {}
    assert pickle.loads(pickle.dumps(error)).as_dict() == error.as_dict()


def test_a_case_replaces_the_message_and_keeps_the_remedy() -> None:
    error = ShardUnreachable("Shard east does not answer.", name="east")
    assert str(error).splitlines() == ["Shard east does not answer.", ShardUnreachable.default_hint()]
    assert error.args == ("Shard east does not answer.",)


def test_the_code_is_the_name_in_words() -> None:
    assert ShardkitError.code == "shardkit"
    assert CommitUnknown.code == "commit-unknown"
    assert KeyTypeError.code == "key-type-error"


def test_the_branches_are_caught_as_such() -> None:
    assert issubclass(KeyTypeError, TypeError)
    assert issubclass(DeclarationError, UsageError)
    assert issubclass(CommitUnknown, RetryLater)
    # It may have been committed, so doing it again is not safe by itself.
    assert not CommitUnknown.retryable


def test_an_error_for_programs() -> None:
    key = UUID(int=5)
    error = ShardUnreachable(
        "No answer.", hint="Wait.", name="east", tried=3, keys=(key, None), more={1: b"x"}
    )
    told = error.as_dict()
    assert json.loads(json.dumps(told)) == told
    assert told == {
        "error": "shard-unreachable",
        "message": "No answer.",
        "hint": "Wait.",
        "retryable": True,
        "name": "east",
        "tried": 3,
        "keys": [str(key), None],
        "more": {"1": "b'x'"},
    }
