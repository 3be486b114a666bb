"""What an ORM user does with a session: the same over shards, with rows in transit, as on one plain database.

Most works run on both and are compared (`tests.twins`); what reaches the shards is counted.
"""

from __future__ import annotations

import uuid
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from sqlalchemy import bindparam, delete, event, func, insert, inspect, literal, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError, InvalidRequestError, NoResultFound
from sqlalchemy.orm import (
    aliased,
    contains_eager,
    defer,
    joinedload,
    load_only,
    raiseload,
    selectinload,
    subqueryload,
)
from sqlalchemy.orm.exc import StaleDataError

from shardkit.core.errors import CrossShardWrite, UnroutableQuery
from tests.fix_sharded import InSession
from tests.fix_twins import Same
from tests.sharded import affected
from tests.twins import (
    KEYS,
    Country,
    File,
    Made,
    Post,
    PostTag,
    Setting,
    Tag,
    Twins,
    User,
    post_tags,
    sending,
    shown,
)

posts, users = Post.metadata.tables["post"], User.metadata.tables["User"]

WITH_POSTS = 8
"""A user with three posts, two tags and two files."""


def counting(session: Any) -> AbstractContextManager[Any]:
    """What is sent, of a session over shards; nothing of a plain one."""
    return sending(session) if hasattr(session, "cluster") else nullcontext()


# --- loading -------------------------------------------------------------------------------------------------------


def test_get_and_get_one(twins: Twins, same: Same) -> None:
    def work(session: Any) -> Any:
        with counting(session) as sent:
            found = [session.get(User, key) for key in (4, *twins.in_transit()[:3], 12345)]
            found += [session.get(Post, (8, 1)), session.get(Post, {"user_id": 8, "id": 2})]
            found += [session.get_one(User, 4), session.get_one(Tag, (-(2**63), 1))]
            assert sent is None or len(sent) == 8
        with pytest.raises(NoResultFound):
            session.get_one(User, 12345)
        found.append(session.get(User, 8, options=[selectinload(User.posts)], with_for_update=True).posts)
        found.append(session.get(User, 8, populate_existing=True))
        return found

    same(work)


def test_refresh_and_expire(twins: Twins, same: Same) -> None:
    """Each asks the owner of the key alone."""

    def work(session: Any) -> Any:
        user, post = session.get_one(User, 8), session.get_one(Post, (8, 1))
        with counting(session) as sent:
            session.refresh(user)
            session.refresh(post, ["title"])
            session.refresh(user, ["posts"])
            session.refresh(user, with_for_update={"key_share": True})
            session.expire(user, ["name"])
            session.expire(post)
            found = [user.name, post.title, user.posts]
            session.expire_all()
            found += [user.rank, post.likes, post.user is user]
            assert sent is None or set(sent.shards()) == {twins.owner(8)}
        return found

    same(work)


def test_an_entity_whose_primary_key_is_not_its_key(twins: Twins, same: Same) -> None:
    """Refreshes and expired loads go to one shard by the key that the instance knows; so do writes."""

    def work(session: Any) -> Any:
        file = session.scalars(select(File).where(File.user_id == WITH_POSTS).order_by(File.name)).first()
        with counting(session) as sent:
            session.refresh(file)
            session.expire(file, ["name", "size"])
            found = [file.name]
            session.expire(file)
            found.append(file.size)
            session.expire_all()
            found.append(file.user.name)
            file.size = 77
            session.flush()
            session.expire(file)
            found.append(file.size)
            session.delete(file)
            session.flush()
            assert sent is None or set(sent.shards()) == {twins.owner(WITH_POSTS)}
        return [found, session.scalars(select(File).where(File.user_id == WITH_POSTS)).all()]

    same(work)


def test_an_expired_key_is_not_forgotten_by_a_commit(twins: Twins, in_shards: InSession) -> None:
    def work(session: Any) -> None:
        file = session.scalars(select(File).where(File.user_id == WITH_POSTS)).first()
        session.commit()
        with sending(session) as sent:
            assert file.name.startswith("f")
        assert sent.shards() == [twins.owner(WITH_POSTS)]

    in_shards(work)


def test_a_row_that_was_inserted_again_under_another_key(same: Same) -> None:
    """It is the same object: its primary key is."""

    def work(session: Any) -> Any:
        table = File.metadata.tables["file"]
        file = session.scalars(select(File).where(File.user_id == WITH_POSTS).order_by(File.name)).first()
        found = []
        for key in (4, 9, 30):
            session.execute(table.delete().where(table.c.id == file.id, table.c.user_id == file.user_id))
            session.execute(table.insert().values(id=file.id, user_id=key, name=f"of {key}"))
            if key == 9:
                session.refresh(file)
            else:
                session.expire(file)
                assert session.get(File, file.id) is file
            found.append((file.user_id, file.name))
            file.size = key
            session.flush()
        session.execute(table.delete().where(table.c.user_id == 30))
        session.expire(file)
        identity = inspect(file).identity
        return [*found, session.get(File, identity[0])]

    same(work, mode="best_effort")


LOADERS: dict[str, tuple[Any, int]] = {
    "lazy": ([], 1 + 3),
    "selectin": ([selectinload(User.posts).selectinload(Post.tags), selectinload(User.files)], 1 + 3),
    "joined": ([joinedload(User.posts).joinedload(Post.tags), joinedload(User.files)], 1),
    "subquery": ([subqueryload(User.posts).subqueryload(Post.tags), subqueryload(User.files)], 1 + 3),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_collections_of_one_key(twins: Twins, same: Same, loader: str) -> None:
    """However they are loaded, on one shard, in as many statements as one database gets."""
    options, _ = LOADERS[loader]
    counts: list[int] = []

    def work(session: Any) -> Any:
        with count_of(session, counts), counting(session) as sent:
            user = session.scalars(select(User).where(User.id == WITH_POSTS).options(*options)).unique().one()
            found = [user, user.posts, [post.tags for post in user.posts], user.files]
            assert sent is None or set(sent.shards()) == {twins.owner(WITH_POSTS)}
        return found

    same(work)
    assert counts[0] == counts[1]


def count_of(session: Any, counts: list[int]) -> AbstractContextManager[Any]:
    """Append the number of statements that a session of either kind sends in the block."""
    return _Count(session, counts)


class _Count:
    def __init__(self, session: Any, counts: list[int]) -> None:
        self._counts = counts
        if hasattr(session, "cluster"):
            shards = session.cluster.topology.shards
            self._engines = [session.engines.shard(shard) for shard in shards]
        else:
            self._engines = [session.get_bind()]
        self._number = 0

    def _note(self, *_: Any) -> None:
        self._number += 1

    def __enter__(self) -> None:
        for engine in self._engines:
            event.listen(engine, "before_cursor_execute", self._note)

    def __exit__(self, *_: Any) -> None:
        for engine in self._engines:
            event.remove(engine, "before_cursor_execute", self._note)
        self._counts.append(self._number)


@pytest.mark.parametrize("loader", LOADERS)
def test_collections_of_every_key(same: Same, loader: str) -> None:
    """Not one statement for each pair of shards: at most one a shard for each that one database gets."""
    options, _ = LOADERS[loader]
    counts: list[int] = []

    def work(session: Any) -> Any:
        statement = select(User).where(User.rank < 3).order_by(User.id).options(*options)
        with count_of(session, counts):
            found = session.scalars(statement).unique().all()
            return [[user, user.posts, [post.tags for post in user.posts]] for user in found]

    same(work)
    plain, sharded = counts
    # One a shard and one that makes the answer; a lazy load is one statement as ever.
    assert sharded == plain + 3 if loader == "lazy" else sharded <= 4 * plain


def test_many_to_one_and_back(twins: Twins, same: Same) -> None:
    def work(session: Any) -> Any:
        post = session.get_one(Post, (8, 1))
        with counting(session) as sent:
            user = post.user
            assert user.posts[1] is post
            assert sent is None or sent.shards() == [twins.owner(8)] * 2
        loaded = session.scalars(
            select(Post).options(joinedload(Post.user, innerjoin=True)).order_by(Post.user_id, Post.id)
        ).all()
        return [user, [(post.user_id, post.user.name) for post in loaded]]

    same(work)


def test_relationships_to_reference_and_home_tables(twins: Twins, same: Same) -> None:
    def work(session: Any) -> Any:
        user = session.get_one(User, 8)
        with counting(session) as sent:
            found = [user.country and user.country.name]
            assert sent is None or set(sent.shards()) <= {twins.owner(8)}
        ordered = select(User).order_by(User.id)
        for options in (
            [joinedload(User.country)],
            [selectinload(User.country)],
            [subqueryload(User.country)],
        ):
            session.expunge_all()
            found.append(
                [one.country and one.country.code for one in session.scalars(ordered.options(*options))]
            )
        session.expunge_all()
        for options in ([], [selectinload(User.setting)]):
            session.expunge_all()
            found.append(
                [one.setting and one.setting.value for one in session.scalars(ordered.options(*options))]
            )
        found.append(session.scalars(select(Setting)).all())
        found.append(
            session.execute(
                select(Country.name, func.count()).join(User, User.country_code == Country.code)
                .group_by(Country.name).order_by(Country.name)
            ).all()
        )  # fmt: skip
        return found

    same(work)


def test_options_and_shapes_of_results(same: Same) -> None:
    def work(session: Any) -> Any:
        ordered = select(User).order_by(User.id)
        other = aliased(Post)
        found: list[Any] = [
            [one.name for one in session.scalars(ordered.options(load_only(User.name)))],
            [one.rank for one in session.scalars(ordered.options(defer(User.rank)).limit(5))],
            session.execute(select(User.id, Post).join(User.posts).order_by(Post.user_id, Post.id)).all(),
            session.execute(ordered.limit(3)).mappings().all()[0]["User"],
            session.execute(select(User.id, User.name).order_by(User.id)).columns(1).all(),
            [len(part) for part in session.scalars(ordered).partitions(10)],
            session.scalars(ordered).fetchmany(4),
            session.scalars(ordered).unique().all(),
        ]
        eager = (
            select(User).join(User.posts.of_type(other)).where(other.likes > 1).order_by(User.id, other.id)
        ).options(contains_eager(User.posts.of_type(other)))
        session.expunge_all()
        found.append(
            [
                [one, one.posts]
                for one in session.scalars(eager, execution_options={"populate_existing": True}).unique()
            ]
        )
        session.expunge_all()
        user = session.scalars(ordered.options(raiseload(User.posts)).limit(1)).one()
        with pytest.raises(InvalidRequestError):
            user.posts  # noqa: B018
        found.append(session.query(User).filter(User.rank == 2).order_by(User.id).all())
        found.append(session.query(User).filter_by(id=4).one())
        found.append(session.query(func.count(User.id)).scalar())
        found.append(session.query(Post).filter(Post.user_id == 8).count())
        found.append(session.query(User).get(4) is session.get(User, 4))
        return found

    with pytest.warns(DeprecationWarning, match="legacy"):
        same(work)


def test_a_dynamic_condition_on_a_collection(twins: Twins, same: Same) -> None:
    """`with_parent`-like conditions: any, has, contains, an object as the key."""

    def work(session: Any) -> Any:
        user, tag = session.get_one(User, 8), session.get_one(Tag, (8, 1))
        with counting(session) as sent:
            found = [
                session.scalars(select(Post).where(Post.user == user).order_by(Post.id)).all(),
                session.scalars(select(Post).where(Post.tags.contains(tag)).order_by(Post.id)).all(),
            ]
            assert sent is None or sent.shards()[0] == twins.owner(8)
        found.append(
            session.scalars(select(User).where(User.posts.any(Post.likes > 2)).order_by(User.id)).all()
        )
        found.append(
            session.scalars(
                select(Post).where(Post.user.has(User.rank == 1)).order_by(Post.user_id, Post.id)
            ).all()
        )
        return found

    same(work)


# --- writing -------------------------------------------------------------------------------------------------------


def all_of(session: Any, key: int) -> Any:
    """Every row of a key."""
    session.flush()
    found = []
    for table in (users, posts, Tag.metadata.tables["tag"], post_tags):
        column = table.c.id if table is users else table.c.user_id
        found.append(
            session.execute(select(table).where(column == key).order_by(*table.primary_key.columns)).all()
        )
    found.append(
        session.execute(select(File.name, File.size).where(File.user_id == key).order_by(File.name)).all()
    )
    return found


def test_a_flush_of_mixed_objects(same: Same) -> None:
    """Parents first, children by their parents' keys, whatever the order in which they were added."""

    def work(session: Any) -> Any:
        user = User(id=500, name="new")
        tags = [Tag(user_id=500, id=number, label=f"t{number}") for number in range(3)]
        made = [Post(user=user, id=number, title=f"p{number}", tags=tags[:number]) for number in range(4)]
        session.add_all([*reversed(made), File(user=user, name="f"), *tags, user, Made(id=500, n=3)])
        session.flush()
        user.posts.remove(made[0])
        made[1].title = "changed"
        made[2].tags.remove(tags[0])
        made[3].tags = [tags[2]]
        session.delete(user.files[0])
        session.delete(session.get_one(Made, 500))
        return all_of(session, 500)

    same(work, mode="best_effort")


def test_a_flush_over_several_shards(same: Same) -> None:
    def work(session: Any) -> Any:
        tags = {key: Tag(user_id=key, id=9, label="z") for key in range(500, 520)}
        for key, tag in tags.items():
            session.add(User(id=key, name=f"n{key}", posts=[Post(id=1, tags=[tag]), Post(id=2, tags=[tag])]))
        session.flush()
        for key, tag in tags.items():
            tag.posts[0].title = "first"
            tag.posts = tag.posts[key % 3 :]
        found = [all_of(session, key) for key in tags]
        for key, tag in tags.items():
            session.delete(session.get_one(User, key))
            session.flush()
            session.expire(tag)
        return [found, [all_of(session, key) for key in tags]]

    same(work, mode="best_effort")


def test_a_flush_over_several_shards_in_mode_single(in_shards: InSession, twins: Twins) -> None:
    first, second = (next(key for key in KEYS if twins.owner(key) == name) for name in ("s0", "s1"))

    def work(session: Any) -> None:
        session.get_one(User, first).name = "changed"
        session.get_one(User, second).name = "changed"
        with pytest.raises(CrossShardWrite), sending(session) as sent:
            session.flush()
        assert not sent.shards("UPDATE")

    in_shards(work)


def test_an_association_table(twins: Twins, same: Same) -> None:
    """``secondary`` with the key in it: links are made, removed and reordered on the shard of their key."""

    def work(session: Any) -> Any:
        post = session.get_one(Post, (8, 2))
        with counting(session) as sent:
            post.tags.append(Tag(user_id=8, id=33, label="thirty-three"))
            session.flush()
            post.tags.remove(post.tags[0])
            session.flush()
            session.expire(post)
            found = [post.tags, post.tags[-1].posts]
            post.tags = []
            session.flush()
            tag = session.get_one(Tag, (8, 2))
            tag.posts.append(post)
            session.flush()
            assert sent is None or set(sent.shards()) == {twins.owner(8)}
            assert sent is None or len(sent.shards("INSERT INTO post_tag")) == 2
        return [found, all_of(session, 8)]

    same(work)


def test_an_association_with_a_reference_table(twins: Twins, same: Same) -> None:
    """The links are on the shard of their user; what they lead to is on each."""

    def work(session: Any) -> Any:
        user = session.get_one(User, 8)
        italy = session.get_one(Country, "it")
        with counting(session) as sent:
            user.visited.append(italy)
            user.visited.remove(user.visited[0])
            session.flush()
            session.expire(user)
            found = [user.visited]
            assert sent is None or set(sent.shards()) == {twins.owner(8)}
        for loader in (selectinload, joinedload, subqueryload):
            session.expunge_all()
            people = session.scalars(select(User).order_by(User.id).options(loader(User.visited))).unique()
            found.append([[user.id, user.visited] for user in people])
        found.append(
            session.execute(
                select(Country.code, func.count())
                .join(User.visited)
                .group_by(Country.code)
                .order_by(Country.code)
            ).all()
        )
        found.append(sorted(session.scalars(select(User.id).where(User.visited.any(Country.code == "it")))))
        return found

    same(work)


def test_links_to_another_key_are_refused_by_the_foreign_key(same: Same) -> None:
    """One key a row: a link between two keys names a row that is not there, on shards and on one database."""

    def work(session: Any) -> Any:
        post = session.get_one(Post, (8, 2))
        post.tags.append(session.get_one(Tag, (9, 1)))
        with pytest.raises(IntegrityError):
            session.flush()
        session.rollback()
        return all_of(session, 8)

    same(work, mode="best_effort")


def test_an_association_that_is_gone(same: Same) -> None:
    """A link that somebody else removed is noticed."""

    def work(session: Any) -> Any:
        post = session.get_one(Post, (8, 2))
        assert post.tags
        session.execute(post_tags.delete().where(post_tags.c.user_id == 8))
        post.tags = []
        with pytest.raises(StaleDataError):
            session.flush()

    same(work)


def test_the_association_as_an_entity(same: Same) -> None:
    def add(session: Any) -> Any:
        session.execute(delete(PostTag).where(PostTag.user_id == 8))  # type: ignore[attr-defined]
        session.add(PostTag(user_id=8, post_id=0, tag_id=1))
        session.flush()
        link = session.get_one(PostTag, (8, 0, 1))
        found = [link.post, link.tag]
        session.delete(link)
        return [found, all_of(session, 8)]

    same(add)


def test_cascades_and_passive_deletes(twins: Twins, same: Same) -> None:
    """Files are deleted by the session, posts by the server, tags not at all."""

    def work(session: Any) -> Any:
        user = session.get_one(User, WITH_POSTS)
        kept = session.get_one(Tag, (WITH_POSTS, 1))
        with counting(session) as sent:
            session.delete(user)
            session.flush()
            assert sent is None or not sent.shards("DELETE FROM post")
            assert sent is None or set(sent.shards()) == {twins.owner(WITH_POSTS)}
        other = session.get_one(User, 4)
        orphan = other.posts.pop()
        session.flush()
        return [inspect(orphan).deleted or inspect(orphan).detached, kept.label,
                all_of(session, WITH_POSTS), all_of(session, 4)]  # fmt: skip

    same(work, mode="best_effort")


def test_merge(twins: Twins, same: Same) -> None:
    """Loaded and new, with what hangs on them."""

    def work(session: Any) -> Any:
        session.get_one(User, 8)
        with counting(session) as sent:
            merged = session.merge(
                User(
                    id=8,
                    name="merged",
                    posts=[Post(user_id=8, id=0, title="m"), Post(user_id=8, id=7, title="n")],
                )
            )
            session.flush()
            assert sent is None or set(sent.shards()) == {twins.owner(8)}
        made = session.merge(User(id=501, name="fresh"))
        detached = session.get_one(User, 4)
        session.expunge(detached)
        detached.name = "from outside"
        again = session.merge(detached)
        session.merge(File(id=uuid.UUID(int=99), user_id=8, name="f", size=1))
        return [merged, made, again, all_of(session, 8), all_of(session, 501), all_of(session, 4)]

    same(work, mode="best_effort")


def test_bulk_writes(same: Same) -> None:
    """By the ORM and by Core; rows of all shards."""
    new = range(600, 630)

    def work(session: Any) -> Any:
        session.execute(insert(User), [{"id": key, "name": f"n{key}"} for key in new])
        session.execute(users.insert(), [{"id": key + 100, "name": "core"} for key in new])
        session.execute(users.insert().values([{"id": key + 200, "name": "values"} for key in new]))
        session.execute(update(User), [{"id": key, "name": "changed", "rank": key} for key in new[:20]])
        session.execute(
            users.update().where(users.c.id == bindparam("which")).values(score=bindparam("score")),
            [{"which": key, "score": key} for key in new],
        )
        session.execute(
            users.delete().where(users.c.id == bindparam("which")), [{"which": key} for key in new[25:]]
        )
        counts = [
            affected(session.execute(update(User).where(User.id.between(700, 900)).values(rank=User.id % 7))),
            affected(session.execute(delete(User).where(User.id.in_(new[20:23])))),
            affected(session.execute(delete(User).where(User.rank == 3, User.id.between(600, 900)))),
            affected(
                session.execute(update(users).where(users.c.id.between(600, 605)).values(name="between"))
            ),
        ]
        return [counts, session.execute(select(users).where(users.c.id >= 600).order_by(users.c.id)).all()]

    same(work, mode="best_effort")


def test_returning(same: Same) -> None:
    new = [620, 605, 611, 640, 600]

    def work(session: Any) -> Any:
        by_rows = insert(User).returning(User, sort_by_parameter_order=True)
        made = session.scalars(by_rows, [{"id": key, "name": "r"} for key in new]).all()
        assert all(one in session for one in made)
        updated = session.execute(
            update(User)
            .where(User.id.between(600, 700))
            .values(rank=User.id - 600)
            .returning(User.id, User.rank)
        ).all()
        assert [one.rank for one in made] == [20, 5, 11, 40, 0]
        one = session.scalars(update(User).where(User.id == 605).values(name="one").returning(User)).one()
        assert one is made[1]
        assert one.name == "one"
        deleted = session.scalars(delete(User).where(User.id > 610, User.id < 700).returning(User.id)).all()
        return [
            made,
            sorted(updated),
            sorted(deleted),
            session.scalar(insert(User).values(id=650, name="x").returning(User.id)),
            session.execute(
                insert(Post)
                .values([{"user_id": 650, "id": 1}, {"user_id": 605, "id": 1}])
                .returning(Post.user_id)
            ).all(),
        ]

    same(work, mode="best_effort")


def test_upserts(same: Same) -> None:
    def work(session: Any) -> Any:
        made = upsert(User)
        made = made.on_conflict_do_update(
            index_elements=[User.id],
            set_={"name": made.excluded.name, "rank": User.rank + 1},
            where=User.rank < 3,
        )
        rows = [{"id": key, "name": "upserted"} for key in (*KEYS[:12], 700, 701)]
        session.execute(made, rows)
        session.execute(upsert(User).values(rows).on_conflict_do_nothing(index_elements=["id"]))
        session.execute(upsert(Post).values(user_id=8, id=0, title="x").on_conflict_do_nothing())
        one = made.values(id=4, name="again").returning(User.name)
        return [
            session.scalars(one).all(),
            session.execute(select(users).order_by(users.c.id)).all(),
            all_of(session, 8),
        ]

    same(work, mode="best_effort")


@pytest.mark.filterwarnings("ignore:.* statement has a cartesian product")
def test_update_from_and_delete_using(same: Same) -> None:
    """The second table has the key of the first, or is a reference table."""

    def work(session: Any) -> Any:
        counts = [
            affected(session.execute(statement, execution_options={"synchronize_session": False}))
            for statement in (
                update(Post).where(Post.user_id == User.id, User.rank == 1).values(title=User.name),
                update(User)
                .where(User.country_code == Country.code, Country.name == "DE")
                .values(name=Country.name),
                update(Post).where(Post.user_id == 8, User.id == 8).values(likes=User.rank),
                delete(post_tags).where(
                    post_tags.c.user_id == Tag.user_id, Tag.label == "y", Tag.id == post_tags.c.tag_id
                ),
                delete(PostTag).where(PostTag.user_id == User.id, User.rank == 2),  # type: ignore[attr-defined]
                delete(Post).where(
                    Post.user_id.in_(select(User.id).where(User.id == Post.user_id, User.rank == 2))
                ),
                delete(Post).where(~select(User.id).where(User.id == Post.user_id, User.rank > 0).exists()),
            )
        ]
        return [counts, *(session.execute(select(table).order_by(*table.primary_key.columns)).all()
                          for table in (users, posts, post_tags))]  # fmt: skip

    same(work, mode="best_effort")


def test_insert_from_select(twins: Twins, same: Same, in_shards: InSession) -> None:
    """The key of the new rows is that of the rows they are made of: of one key, of several, of all."""
    names = ["user_id", "id", "label"]
    some = select(Post.user_id, Post.id + 50, func.coalesce(Post.title, "z"))
    busy = select(User.id, func.count() + 90, func.max(Post.title)).join(User.posts)
    statements = {
        "one key": insert(Tag).from_select(
            names, select(Post.user_id, Post.id + 150, literal("one")).where(Post.user_id == 8)
        ),
        "all": insert(Tag).from_select(names, some.where(Post.likes > 1, Post.title.is_not(None))),
        "several keys": insert(Tag.metadata.tables["tag"]).from_select(
            names, select(users.c.id, literal(70), users.c.name).where(users.c.id.in_(KEYS))
        ),
        "groups": insert(Tag).from_select(names, busy.where(Post.title.is_not(None)).group_by(User.id)),
        "an upsert": upsert(Tag)
        .from_select(names, select(Tag.user_id, Tag.id, literal("again")).where(Tag.id == 1))
        .on_conflict_do_update(index_elements=["user_id", "id"], set_={"label": "again"}),
        "no row": insert(Tag).from_select(names, some.where(Post.user_id.in_([]))),
        "the same table": insert(Post).from_select(
            ["user_id", "id", "title"], select(Post.user_id, Post.id + 30, Post.title)
        ),
    }

    def work(session: Any) -> Any:
        counts = [affected(session.execute(statement)) for statement in statements.values()]
        returned = insert(Tag).from_select(names, some.with_only_columns(
            Post.user_id, Post.id + 200, func.upper(Post.title)).where(Post.title.is_not(None)))  # fmt: skip
        rows = session.execute(returned.returning(Tag.user_id, Tag.id)).all()
        return [
            counts,
            sorted(shown(rows), key=str),
            session.scalars(select(Tag).order_by(Tag.user_id, Tag.id)).all(),
            session.scalars(select(Post).order_by(Post.user_id, Post.id)).all(),
        ]

    same(work, mode="best_effort")

    def refused(session: Any) -> None:
        limited = some.order_by(Post.user_id, Post.id).limit(5)
        for wrong in (
            limited,
            some.with_only_columns(Post.likes, Post.id + 50, literal("z")),
            some.with_only_columns(Post.user_id + 1, Post.id + 50, literal("z")),
            some.with_only_columns(literal(8), Post.id + 50, literal("z")),
            some.with_only_columns(Post.user_id, func.row_number().over(order_by=Post.id), literal("z")),
            select(literal(1), literal(2), literal("z")),
            some.join(User, User.rank == Post.likes),
            some.with_only_columns(User.id, Post.id, literal("z")).join(User, User.rank == Post.likes),
        ):
            with pytest.raises(UnroutableQuery):
                session.execute(insert(Tag).from_select(names, wrong))
        with pytest.raises(UnroutableQuery):
            session.execute(insert(File).from_select(["user_id", "name"], select(User.id, User.name)))

    in_shards(refused, mode="best_effort")


def test_synchronized_updates_and_deletes(same: Same) -> None:
    """Objects of the session follow statements over several shards."""

    def work(session: Any) -> Any:
        loaded = session.scalars(select(Post).order_by(Post.user_id, Post.id)).all()
        session.execute(update(Post).where(Post.likes > 1).values(title="many", likes=Post.likes + 10))
        titles = [(post.title, post.likes) for post in loaded]
        session.execute(delete(post_tags))
        session.execute(delete(Post).where(Post.likes > 12))
        found = [titles, [post in session for post in loaded]]
        people = session.scalars(select(User).order_by(User.id)).all()
        # What Python cannot evaluate, the shards return: together with what is asked for, from all or few of them.
        for condition in (func.length(User.name) == 1, User.id.between(2, 5), User.name.like("%zzz")):
            changed = update(User).where(condition).values(rank=func.coalesce(User.rank, 0) + 10)
            session.execute(changed)
            found.append([one.rank for one in people])
            for returned in (User, User.id, func.lower(User.name)):
                rows = session.execute(changed.returning(returned)).all()
                found += [sorted(shown(rows), key=str), [one.rank for one in people]]
            session.execute(
                delete(File).where(File.user_id.in_(select(User.id).where(User.id == File.user_id)))
            )
            removed = delete(Tag).where(Tag.label.like("x%"), Tag.user_id.between(3, 6)).returning(Tag.id)
            found.append(sorted(session.scalars(removed)))
        return found

    same(work, mode="best_effort")


def test_what_python_makes_on_update_is_made_once(in_shards: InSession) -> None:
    """All rows of a statement have the same value, and so have the objects of the session."""

    def work(session: Any) -> None:
        session.add_all(made := [Made(id=key, n=key) for key in range(30)])
        session.flush()
        for statement in (
            update(Made).values(n=1),
            update(Made).where(Made.id.between(0, 100)).values(n=2),
            update(Made.metadata.tables["made"]).values(n=3),
            update(Made).where(Made.id.in_(list(range(30)))).values(n=4),
        ):
            session.execute(statement)
            ((n, tick),) = set(session.execute(select(Made.n, Made.tick)).all())
            if "plugin_subject" in statement._propagate_attrs:
                assert {(one.n, one.tick) for one in made} == {(n, tick)}

    in_shards(work, mode="best_effort")


def test_locks(twins: Twins, same: Same, in_shards: InSession) -> None:
    def work(session: Any) -> Any:
        some = select(User).order_by(User.id)
        return [
            session.scalars(select(User).where(User.id == 8).with_for_update()).one(),
            session.scalars(select(User).where(User.id == 8).with_for_update(nowait=True)).one(),
            session.scalars(some.where(User.rank == 1).with_for_update(skip_locked=True)).all(),
            session.scalars(some.where(User.id.in_(KEYS[:9])).with_for_update(read=True)).all(),
            session.scalars(
                select(Post).join(User).where(User.id == 8).with_for_update(of=User).order_by(Post.id)
            ).all(),
            session.scalars(
                select(Post).where(Post.user_id == 8).order_by(Post.id).limit(1).with_for_update(skip_locked=True)
            ).all(),
        ]  # fmt: skip

    same(work)

    def locked(session: Any) -> None:
        admin = twins.sharded.shards.get(twins.topology.named(twins.owner(8)))
        with admin.transaction():
            admin.execute('SELECT FROM public."User" WHERE id = 8 FOR UPDATE')
            with pytest.raises(Exception, match="could not obtain lock"):
                session.scalars(select(User).where(User.name != "no name").with_for_update(nowait=True)).all()
            session.rollback()
            with pytest.raises(Exception, match="could not obtain lock"):
                session.scalars(select(User).where(User.id == 8).with_for_update(nowait=True)).all()
            session.rollback()
            skipping = select(User.id).with_for_update(skip_locked=True).order_by(User.id)
            assert session.scalars(skipping).all() == [key for key in KEYS if key != 8]

    in_shards(locked)
