"""`shardkit ids split`: from one database with serial ids to two shards, by the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkit.storage.connections import connect
from tests.acceptance.conftest import Program
from tests.acceptance.test_cli_doctor import one_problem, problems
from tests.fix_postgres import FreshDatabase

MODELS = """
from sqlalchemy import BigInteger, Identity, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardkit import sharded


class Base(DeclarativeBase):
    pass


@sharded(by="user_id")
class Post(Base):
    __tablename__ = "My posts"
    __table_args__ = (UniqueConstraint("user_id", "id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(BigInteger)


@sharded(by="user_id")
class Other(Base):
    __tablename__ = "others"
    __table_args__ = (UniqueConstraint("user_id", "id"),)
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    user_id: Mapped[int] = mapped_column(BigInteger)
"""
POSTS = "public.My posts"


@pytest.fixture
def adopted(catalog: str, fresh_database: FreshDatabase, folder: Path, call: Program) -> str:
    """URL of a database with rows that is the only shard."""
    (folder / "numbered.py").write_text(MODELS)
    url = fresh_database(0)
    call("init").ok()
    call("shard", "add", "one", url, "--yes").ok()
    call("schema", "declare", "numbered:Base", "--create").ok()
    with connect(url) as connection:
        connection.execute('INSERT INTO public."My posts" (user_id) SELECT g FROM generate_series(1, 100) g')
    return url


def test_from_one_database_to_two_shards(adopted: str, fresh_database: FreshDatabase, call: Program) -> None:
    notes = [
        finding for finding in call("doctor", "--json").ok().document["findings"] if finding["check"] == "ids"
    ]
    assert [note["level"] for note in notes] == ["note", "note"]
    assert "`shardkit ids split 'public.My posts'`" in notes[0]["next"]

    url = fresh_database(1)
    add = ("shard", "add", "two", url, "--yes", "--models", "numbered:Base")
    call(*add).failed(
        3, "A second shard would number rows as the first does", "ids split 'public.My posts' public.others"
    )

    call("ids", "split").failed(2, "stdin is no terminal", "--yes")
    plan = call("ids", "split", "--plan-only", "--json").ok().document
    assert plan["changed"] is False
    assert [(each["name"], each["shards_max"], each["floor"], each["split"]) for each in plan["tables"]] == [
        ("My posts", 64, 100, False),
        ("others", 1024, 0, False),
    ]
    assert plan["tables"][0]["shards"] == [
        {"name": "one", "sequence": 'public."My posts_id_seq"', "next": 128, "left": 33_554_430}
    ]
    call("ids", "split", "nothing", "--yes").failed(2, "'nothing' is no declared sharded table")

    done = call("ids", "split", "My posts", "--shards", "16", "--yes", "--json").ok()
    assert [(each["name"], each["shards_max"], each["split"]) for each in done.document["tables"]] == [
        ("My posts", 16, True)
    ]
    assert done.document["changed"] is True
    assert done.document["next"] is None
    call("ids", "split", "My posts", "--shards", "24", "--yes").failed(
        3, "only a multiple of that can follow"
    )
    assert "2 tables split." in call("ids", "split", "--yes").ok().out
    again = call("ids", "split", "--json").ok().document
    assert (again["changed"], [each["split"] for each in again["tables"]]) == (False, [True, True])

    call(*add).ok()
    assert problems(call) == []
    with connect(url) as two, connect(adopted) as one:
        for number, connection in enumerate((one, two)):
            (made,) = connection.execute("SELECT nextval('public.\"My posts_id_seq\"')").fetchall()
            assert made[0] % 16 == number
        two.execute('ALTER SEQUENCE public."My posts_id_seq" INCREMENT 5')
        subject, check, detail = one_problem(call)
        assert (subject, check) == ("two", "ids")
        assert "it counts by 5 instead of 16" in detail
        call("ids", "split", POSTS, "--yes").ok()
        assert problems(call) == []
        two.execute('ALTER TABLE public."My posts" ALTER id DROP DEFAULT')
        found = {(each["subject"], each["check"]) for each in problems(call)}
        assert ("two", "ids") in found


def test_nothing_to_split(catalog: str, fresh_database: FreshDatabase, call: Program) -> None:
    call("init").ok()
    call("ids", "split", "--yes").failed(3, "has no shard yet")
    call("shard", "add", "one", fresh_database(0), "--yes", "--models", "models:Base").ok()
    call("schema", "declare", "models:Base").ok()
    assert "No sharded table has a primary key that a server alone numbers." in call("ids", "split").ok().out
    call("ids", "split", "users", "--yes").failed(2, "needs no split")
