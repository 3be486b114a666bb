"""What a session does about statements that ask all shards, and what it tells of statements without sending them."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.orm import scoped_session

import shardkit
from shardkit.core.errors import ScatterRefused, UnroutableQuery, UsageError
from shardkit.orm import scatterpolicy
from tests.fix_sharded import InSession
from tests.sharded import Post, ShardedCluster, User


def line_after(count: int = 1) -> tuple[str, int]:
    """Where a line after that of the caller is."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_code.co_filename, frame.f_back.f_lineno + count


def test_a_warning_names_the_line_that_sent_it(in_session: InSession) -> None:
    def work(session: shardkit.ShardSession) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            here = line_after()
            session.scalars(select(User).where(User.name == "Ada")).all()
            session.scalars(select(User).where(User.id == 1)).all()
            session.scalars(select(User).where(User.id.in_([1, 2, 3]))).all()
            session.get(User, 5)
        (warning,) = caught
        assert warning.category is shardkit.ScatterWarning
        assert (warning.filename, warning.lineno) == here
        assert "asks all shards" in str(warning.message)

    in_session(work, scatter="warn")


def test_a_refusal_is_for_all_or_for_one(in_session: InSession) -> None:
    everyone = select(User)

    def refusing(session: shardkit.ShardSession) -> None:
        here = line_after(2)
        with pytest.raises(ScatterRefused) as caught:
            session.scalars(everyone)
        assert (caught.value.fields["file"], caught.value.fields["line"]) == here
        assert isinstance(caught.value, UnroutableQuery)
        # Nothing was opened for it.
        assert not session.shards.scope.participants
        assert session.scalars(everyone, execution_options={"scatter": "allow"}).all() == []
        assert session.scalars(everyone.execution_options(scatter="allow")).all() == []
        assert session.get(User, 1) is None
        with pytest.raises(ScatterRefused):
            session.execute(delete(User).where(User.name == "x"))
        greatest = select(func.max(User.name)).scalar_subquery()
        with pytest.raises(ScatterRefused):
            session.scalar(select(func.count()).where(User.name == greatest))

    def allowing(session: shardkit.ShardSession) -> None:
        with pytest.raises(ScatterRefused):
            session.scalars(everyone, execution_options={"scatter": "refuse"})
        assert session.scalars(everyone).all() == []

    in_session(refusing, scatter="refuse")
    in_session(allowing)


def test_a_policy_is_one_of_three(cluster: shardkit.ShardCluster) -> None:
    wrong: Any = "never"
    with pytest.raises(UsageError, match="'never' is no policy"):
        cluster.sessionmaker(scatter=wrong)()
    with cluster.sessionmaker()() as session, pytest.raises(UsageError):
        session.execute(select(User), execution_options={"scatter": "never"})


def test_scatters_are_counted(in_session: InSession) -> None:
    found: list[scatterpolicy.Scattered] = []

    def work(session: shardkit.ShardSession) -> None:
        for _ in range(3):
            session.scalar(select(func.count()).select_from(User))
        session.scalars(select(User).where(User.id == 1))

    scatterpolicy.listeners.append(found.append)
    try:
        in_session(work)
    finally:
        scatterpolicy.listeners.clear()
    assert [scattered.file for scattered in found] == [__file__] * 3
    assert len({scattered.line for scattered in found}) == 1


def test_a_test_suite_asserts_that_none_is_left(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["shardkit.testing"]')
    pytester.makepyfile(
        """
        import pytest
        from sqlalchemy import select
        from shardkit.orm.scatterpolicy import met

        def ask():
            met(select(1), "it is asked", "allow")

        def test_it(scatters):
            assert not scatters
            ask()
            assert [scattered.file for scattered in scatters] == [__file__]

        @pytest.mark.scatter
        def test_marked():
            ask()

        def test_quiet(scatters):
            assert scatters == []
        """
    )
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=3)
    strict = pytester.runpytest_subprocess("-q", "--no-scatter")
    strict.assert_outcomes(passed=3, errors=1)
    strict.stdout.fnmatch_lines(["*1 statements asked all shards:*", "*it is asked: SELECT 1*"])


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_tells_shards_reason_what_is_sent_and_what_is_merged(
    sharded: ShardedCluster, cluster: shardkit.ShardCluster
) -> None:
    key = sharded.keys("s1", 1)[0]
    with cluster.sessionmaker()() as session:
        one = shardkit.explain(session, select(User).where(User.id == key).order_by(User.name))
        assert one.shards == ("s1",)
        assert one.merged is None
        assert "bound to one shard key" in one.reason

        top = shardkit.explain(session, select(User.id).order_by(User.score.desc()).limit(10))
        assert sorted(top.shards) == ["s0", "s1", "s2"]
        assert "users.id" in top.reason
        assert all("LIMIT" in sent and "ORDER BY users.score DESC" in sent for sent in top.sent.values())
        assert top.merged == "sorted, cut to LIMIT and OFFSET"

        names = shardkit.explain(session, select(User.id).order_by(User.name))
        assert names.merged == "sorted by one shard"
        groups = shardkit.explain(session, select(User.name, func.count()).group_by(User.name))
        assert groups.merged == "parts of groups combined by one shard"
        total = shardkit.explain(session, select(func.count()).select_from(User))
        assert total.merged == "totals added up"
        pulled = shardkit.explain(session, select(User).join(Post, Post.caption == User.name))
        assert pulled.merged == "rows of public.users, public.posts read from all, statement run by one"
        keys = [sharded.keys(name, 1)[0] for name in ("s0", "s1", "s2")]
        rows = shardkit.explain(session, insert(User).values([{"id": n, "name": "x"} for n in keys]))
        assert len(rows.shards) == 3
        written = shardkit.explain(session, update(User).values(score=1))
        assert "decided about on the shard of its users.id" in written.reason
        assert "SELECT" in str(pulled)
        assert str(one).startswith("s1: all sharded tables are bound")
        with pytest.raises(UnroutableQuery):
            shardkit.explain(session, text("SELECT 1"))
        # Nothing was sent.
        assert not session.shards.scope.participants
    scoped = scoped_session(cluster.sessionmaker())
    assert shardkit.explain(scoped, select(User).where(User.id == key)).shards == ("s1",)
    asynchronous = cluster.async_sessionmaker()()
    assert shardkit.explain(asynchronous, select(User).where(User.id == key)).shards == ("s1",)
