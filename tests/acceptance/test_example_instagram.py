"""The Instagram example over HTTP: the monolith and the four services, by processes of their own on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Event
from uuid import uuid4

import httpx
import pytest
from psycopg import sql

import shardkit
from examples.instagram import passwords
from examples.instagram.__main__ import SERVICES
from examples.instagram.databases import MODELS
from examples.instagram.tokens import TokenInvalid, Tokens
from shardkit.dev import Clusters
from shardkit.rebalance.preflight import ALLOW_FSYNC_OFF
from shardkit.storage.connections import connect
from tests.fix_instagram import PLACES, ROOT, SECRET, SHARDS, Web, here, rows, served
from tests.sharded import until

pytestmark = pytest.mark.usefixtures("empty_instagram")


@pytest.fixture(scope="module")
def services(instagram: dict[str, str]) -> Iterator[Web]:
    """The four services, on shards."""
    with ExitStack() as ends:
        apps = [served(f"services.{name}", SHARDKIT_CATALOG=instagram["catalog"]) for name in SERVICES]
        yield Web(*map(ends.enter_context, apps))


@pytest.fixture(scope="module", params=["plain monolith", "sharded monolith", "sharded services"])
def web(request: pytest.FixtureRequest, instagram: dict[str, str]) -> Iterator[Web]:
    """The application in each of its shapes."""
    if request.param == "sharded services":
        yield request.getfixturevalue("services")
        return
    where = {"DATABASE_URL": instagram["plain"]}
    if request.param == "sharded monolith":
        where = {"SHARDKIT_CATALOG": instagram["catalog"]}
    with served("web", **where) as client:
        yield Web(client)


# --- passwords and tokens ------------------------------------------------------------------------------------------


def test_a_password_matches_itself_alone() -> None:
    kept = passwords.hashed("correct horse")
    assert kept != passwords.hashed("correct horse")
    assert "horse" not in kept
    assert passwords.matches("correct horse", kept)
    assert not passwords.matches("correct horsf", kept)


def test_a_token_is_its_makers_and_ends() -> None:
    user = uuid4()
    tokens = Tokens(SECRET)
    token = tokens.make(user)
    assert tokens.user(token) == user
    with pytest.raises(TokenInvalid, match="too old"):
        tokens.user(tokens.make(user, seconds=-2))
    forged = [
        Tokens("another secret of theirs").make(user),
        "",
        "AAAA",
        "\u00e4",
        token[:-4],
        "B" + token[1:],
    ]
    for text in forged:
        with pytest.raises(TokenInvalid):
            tokens.user(text)


# --- over HTTP -----------------------------------------------------------------------------------------------------


def test_register_log_in_profile(web: Web) -> None:
    ada = web.join("ada")
    web.write(ada, "first")
    assert web.users.put("/profile", json={"bio": "analyst \U0001f9ee"}, headers=ada).status_code == 200
    found = web.users.get("/users/ada").json()
    assert (found["name"], found["bio"], found["posts"]) == ("ada", "analyst \U0001f9ee", 1)
    assert "password" not in found
    again = web.users.post("/register", json={"name": "ada", "password": "another"})
    assert (again.status_code, again.json()) == (409, {"error": "the name ada is taken"})
    assert web.users.post("/login", json={"name": "ada", "password": "another"}).status_code == 401
    assert web.users.post("/login", json={"name": "bob", "password": "another"}).status_code == 401
    assert web.users.get("/users/bob").status_code == 404


def test_posts_comments_likes(web: Web) -> None:
    ada, bob = web.join("ada"), web.join("bob")
    first, second = web.write(ada, "first"), web.write(bob, "second")
    for headers, text in ((bob, "well said"), (ada, "thanks")):
        answer = web.comments.post(f"/posts/{first}/comments", json={"text": text}, headers=headers)
        assert answer.status_code == 201
    for headers in (bob, ada, bob):
        assert web.likes.put(f"/posts/{first}/like", headers=headers).status_code == 204
    assert web.likes.delete(f"/posts/{first}/like", headers=ada).status_code == 204
    found = web.comments.get(f"/posts/{first}/comments").json()
    assert [(comment["user"], comment["text"]) for comment in found] == [
        ("bob", "well said"),
        ("ada", "thanks"),
    ]
    assert web.likes.get(f"/posts/{first}/likes").json() == ["bob"]
    feed = web.posts.get("/feed").json()
    assert [(post["id"], post["user"], post["comments"], post["likes"]) for post in feed] == [
        (second, "bob", 0, 0),
        (first, "ada", 2, 1),
    ]
    assert web.posts.get("/feed", params={"before": second}).json() == feed[1:]
    assert web.posts.get("/users/ada/posts").json() == feed[1:]
    assert web.posts.get(f"/posts/{second}").json() == feed[0]


def test_what_is_asked_wrongly_is_refused(web: Web) -> None:
    ada = web.join("ada")
    post = web.write(ada, "first")
    stale = {"Authorization": f"Bearer {Tokens(SECRET).make(uuid4(), seconds=-2)}"}
    forged = {"Authorization": f"Bearer {Tokens('another secret of theirs').make(uuid4())}"}
    for headers in ({}, stale, forged, {"Authorization": "Basic YTpi"}):
        for answer in (
            web.posts.post("/posts", json={"text": "x"}, headers=headers),
            web.users.put("/profile", json={"bio": "x"}, headers=headers),
            web.comments.post(f"/posts/{post}/comments", json={"text": "x"}, headers=headers),
            web.likes.put(f"/posts/{post}/like", headers=headers),
        ):
            assert answer.status_code == 401, answer.text
            assert answer.json()["error"]
    for body in (
        "",
        "[]",
        "{",
        "7",
        "{}",
        '{"text": 7}',
        '{"text": ""}',
        r'{"text": "a\u0000b"}',
        r'{"text": "\ud800"}',
    ):
        assert web.posts.post("/posts", content=body, headers=ada).status_code == 400, body
    assert web.posts.post("/posts", json={"text": "x" * 2001}, headers=ada).status_code == 400
    for name in ("Ada", "a b", "x" * 31, "\u00e4"):
        answer = web.users.post("/register", json={"name": name, "password": "x"})
        assert answer.status_code == 400, name
    assert web.posts.get("/feed", params={"before": "yesterday"}).status_code == 400
    assert web.posts.get(f"/posts/{uuid4()}").status_code == 404
    assert web.posts.get("/posts/7").status_code == 404
    assert web.users.get("/users/a%00b").status_code == 404
    assert web.posts.get("/users/a%00b/posts").status_code == 404
    assert web.comments.get(f"/posts/{uuid4()}/comments").status_code == 404
    assert web.likes.put(f"/posts/{uuid4()}/like", headers=ada).status_code == 404
    assert len(web.posts.get("/feed").json()) == 1


def test_many_want_one_name(web: Web) -> None:
    def register(number: int) -> int:
        said = {"name": "ada", "password": f"password {number}"}
        return web.users.post("/register", json=said).status_code

    with ThreadPoolExecutor(8) as threads:
        codes = sorted(threads.map(register, range(8)))
    assert codes == [201] + [409] * 7
    logins = [
        web.users.post("/login", json={"name": "ada", "password": f"password {number}"})
        for number in range(8)
    ]
    assert sorted(answer.status_code for answer in logins) == [200] + [401] * 7


def test_a_shard_that_is_away_takes_its_own_posts_along(servers: Clusters, instagram: dict[str, str]) -> None:
    with served("web", SHARDKIT_CATALOG=instagram["catalog"]) as client:
        web = Web(client)
        posts = [web.write(web.join(f"user{number}"), "text") for number in range(12)]
        with connect(instagram["two"]) as connection:
            away = {str(post) for (post,) in connection.execute("SELECT id FROM public.posts")}
        assert 0 < len(away) < len(posts)
        codes = {post: 503 if post in away else 200 for post in posts}
        with closed(servers, "two"):
            assert {post: client.get(f"/posts/{post}").status_code for post in posts} == codes
            assert client.get("/feed").status_code == 503
        until(lambda: client.get("/feed").status_code == 200, "the shard is asked again")
        assert {client.get(f"/posts/{post}").status_code for post in posts} == {200}


@contextmanager
def closed(servers: Clusters, name: str) -> Iterator[None]:
    """A database takes no connections in the block and has none."""
    database = f"instagram_{name}"
    statement = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    with connect(servers[PLACES[name]].url("postgres")) as connection:
        connection.execute(statement.format(sql.Identifier(database), sql.SQL("false")))
        try:
            ended = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s"
            connection.execute(ended, (database,))
            yield
        finally:
            connection.execute(statement.format(sql.Identifier(database), sql.SQL("true")))


def test_users_notice_nothing_of_a_shard_that_joins(
    services: Web, instagram: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writers do not stop while keys move; what was acknowledged is there afterwards."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv(ALLOW_FSYNC_OFF, "1")
    ended = Event()

    def live(number: int) -> list[str]:
        headers = services.join(f"user{number}")
        written: list[str] = []
        while not ended.is_set() or not written:
            post = services.write(headers, "text")
            said = services.comments.post(f"/posts/{post}/comments", json={"text": "me"}, headers=headers)
            liked = services.likes.put(f"/posts/{post}/like", headers=headers)
            assert (said.status_code, liked.status_code) == (201, 204), said.text + liked.text
            written.append(post)
        return written

    with ThreadPoolExecutor(3) as threads:
        writers = [threads.submit(live, number) for number in range(3)]
        try:
            arguments = ["shard", "add", "three", instagram["three"], "--models", MODELS, "--yes"]
            here(*arguments, "--catalog", instagram["catalog"])
        finally:
            ended.set()
        written = [post for writer in writers for post in writer.result()]
    for post in written:
        found = services.posts.get(f"/posts/{post}").json()
        assert (found["comments"], found["likes"]) == (1, 1)
    assert sum(rows(instagram[name], "posts") for name in SHARDS) == len(written)
    with shardkit.connect(instagram["catalog"]) as cluster:
        assert [shard.name for shard in cluster.topology.shards] == ["one", "two", "three"]


# --- the document --------------------------------------------------------------------------------------------------


def test_the_readme_shows_what_it_does(instagram: dict[str, str]) -> None:
    text = (ROOT / "examples" / "instagram" / "README.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    start, *lines = "".join(blocks).splitlines()
    assert start == "$ python -m examples.instagram monolith"
    known: dict[str, str] = {}
    answers: list[str] = []
    with served("web", SHARDKIT_CATALOG=instagram["catalog"]) as client:
        for line in lines:
            if line.startswith("$ curl "):
                answers += curl(client, line, known).splitlines()
            elif line.startswith("$ "):  # a variable gets the one value of the last answer
                name = line[2:].partition("=")[0]
                (known[name],) = json.loads(answers[-1]).values()
    shown = [line for line in lines if not line.startswith("$")]
    assert [normal(line) for line in answers] == [normal(line) for line in shown]
    assert len(shown) > 8


def curl(client: httpx.Client, line: str, known: dict[str, str]) -> str:
    """What a command line with curl prints."""
    for name in known:
        line = line.replace(f"${name}", known[name])
    method, headers, data, url = None, {}, None, ""
    words = iter(shlex.split(line)[2:])
    for word in words:
        if word == "-X":
            method = next(words)
        elif word == "-H":
            header, _, content = next(words).partition(": ")
            headers[header] = content
        elif word == "-d":
            data = next(words)
        else:
            assert word.startswith("http://localhost:8000/")
            url = word.removeprefix("http://localhost:8000")
    method = method or ("GET" if data is None else "POST")
    return client.request(method, url, content=data, headers=headers).text


def normal(line: str) -> str:
    """A line without what differs from run to run."""
    line = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", line)
    line = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", "TIME", line)
    return re.sub(r'"token":"[\w=-]{60,}"', '"token":"TOKEN"', line)


@contextmanager
def launched(*arguments: str) -> Iterator[dict[str, str]]:
    """`python -m examples.instagram`, ended as by Ctrl-C; the URL of each application."""
    command = [sys.executable, "-m", "examples.instagram", *arguments, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with process:
        assert process.stdout is not None
        try:
            urls: dict[str, str] = {}
            for line in process.stdout:
                name, _, url = line.strip().partition(": ")
                if url.startswith("http"):
                    urls[name] = url
                if len(urls) == (len(SERVICES) if "services" in arguments else 1):
                    break
            yield urls
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.stdout.read()
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["monolith"], ["services"], ["services", "--plain"]])
def test_it_is_launched_in_every_shape(arguments: list[str]) -> None:
    with launched(*arguments) as urls:
        assert list(urls) == (["web"] if arguments == ["monolith"] else list(SERVICES))
        answers = [httpx.get(f"{url}/feed", timeout=30, trust_env=False) for url in urls.values()]
        feeds = [answer.json() for answer in answers if answer.status_code == 200]
        assert feeds == [[]]  # the one who serves it
