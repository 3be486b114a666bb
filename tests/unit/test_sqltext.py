"""Transaction commands in SQL text: found where they are statements, left alone where they are words."""

from __future__ import annotations

import pytest

from shardkit.storage.sqltext import Control, control

HARMLESS = [
    "",
    "SELECT 1",
    "SELECT 'commit'",
    "SELECT 'it''s; commit'",
    r"SELECT E'\'; commit; --'",
    'SELECT 1 AS "commit; rollback"',
    'SELECT 1 AS "a"";commit"',
    "SELECT $$ ; commit; $$",
    "SELECT $tag$ ; commit; $$ ; $tag$",
    "DO $body$ BEGIN PERFORM 1; COMMIT; END $body$",
    "SELECT 1 -- ; commit",
    "SELECT 1 /* ; commit /* ; rollback */ ; end */",
    "SELECT CASE WHEN true THEN 1 END",
    "SELECT commit FROM begin",
    "INSERT INTO commits VALUES (%(end)s)",
    "SAVEPOINT begin",
    "RELEASE SAVEPOINT commit",
    "PREPARE plan AS SELECT 1",
    "SET TRANSACTION READ ONLY",
    "SELECT $1; SELECT $2",
    "LOCK TABLE ends",
]
READING = [
    "SELECT 1",
    "\n select users.id, users.updated_at, users.shared FROM users WHERE users.id = $1",
    "WITH few AS (SELECT id FROM users LIMIT 3) SELECT * FROM few",
    "SELECT CASE WHEN true THEN 1 END",
]
MORE_THAN_READING = [
    "",
    "SELECT id FROM users FOR UPDATE",
    "SELECT id FROM users FOR NO KEY UPDATE SKIP LOCKED",
    "SELECT id FROM users for share",
    "SELECT id FROM users FOR KEY SHARE OF users",
    "SELECT pg_try_advisory_xact_lock(1)",
    "SELECT id INTO TEMPORARY few FROM users",
    "WITH gone AS (DELETE FROM users RETURNING id) SELECT * FROM gone",
    "WITH new AS (INSERT INTO users DEFAULT VALUES RETURNING id) SELECT * FROM new",
    "SELECT 1; DROP TABLE users",
    "SAVEPOINT one",
    "DECLARE c CURSOR FOR SELECT 1",
    "LOCK TABLE users",
    "/* SELECT */ TRUNCATE users",
]
ENDING = [
    "COMMIT",
    "commit;",
    "  \n\tCommit",
    "END",
    "ABORT",
    "BEGIN",
    "START TRANSACTION",
    "ROLLBACK",
    "ROLLBACK WORK",
    "rollback transaction",
    "ROLLBACK AND CHAIN",
    "ROLLBACK PREPARED 'x'",
    "COMMIT PREPARED 'x'",
    "PREPARE TRANSACTION 'x'",
    "SELECT 1; COMMIT; SELECT 2",
    ";;commit",
    "/* a */ -- b\n commit",
    "/* /* nested */ */ commit",
    "SELECT '--'; commit",
    "SELECT $$x$$; commit",
    "SELECT nameE'x\\'; commit; --'",
    "SELECT 1 AS é; commit",
    "SELECT 'never closed; commit",
    "SELECT $tag$ never closed; commit",
    "SELECT x$1$; commit; $1$",
]
UNWINDING = [
    "ROLLBACK TO x",
    "rollback to savepoint x",
    "ROLLBACK WORK TO x",
    "SELECT 1; ROLLBACK TRANSACTION TO x",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless(text: str) -> None:
    assert control(text.encode()) in (Control.NONE, Control.READ)


@pytest.mark.parametrize("text", READING)
def test_reading(text: str) -> None:
    assert control(text.encode()) is Control.READ


@pytest.mark.parametrize("text", MORE_THAN_READING)
def test_more_than_reading(text: str) -> None:
    assert control(text.encode()) is Control.NONE


@pytest.mark.parametrize("text", ENDING)
def test_ending(text: str) -> None:
    assert control(text.encode()) is Control.END


@pytest.mark.parametrize("text", UNWINDING)
def test_unwinding(text: str) -> None:
    assert control(text.encode()) is Control.UNWIND


def test_the_gravest_counts() -> None:
    assert control(b"ROLLBACK TO x; COMMIT") is Control.END


def test_a_comment_that_is_never_closed_hides_nothing_that_the_server_would_run() -> None:
    assert control(b"SELECT 1; /* never closed; commit") is Control.NONE


def test_texts_too_long_to_keep() -> None:
    assert control(b"SELECT 1; " * 20_000 + b"COMMIT") is Control.END
    assert control(b"SELECT 'commit'; " * 20_000) is Control.NONE


def test_other_encodings() -> None:
    assert control("SELECT 'é'; commit".encode("latin-1")) is Control.END
    assert control("SELECT 'é; commit'".encode("latin-1")) is Control.NONE
    assert control("SELECT 'é'".encode("latin-1")) is Control.READ
