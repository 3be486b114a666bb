"""The development servers: they start, crash, recover, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

import shardkit
from shardkit.core.errors import ServerFailed, UsageError
from shardkit.dev import Cluster, Clusters, processes, scratch
from tests.fix_postgres import FreshDatabase, NewCluster

CHECKOUT = Path(shardkit.__file__).parent.parent
DEADLINE_SECONDS = 30


def eventually(true: Callable[[], Any], what: str) -> None:
    """Wait until `true()`; fail at the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not true():
        assert time.monotonic() < deadline, f"not in {DEADLINE_SECONDS} s: {what}"
        time.sleep(0.01)


def one(cluster: Cluster, query: str, dbname: str = "postgres") -> Any:
    """The single value of a query."""
    with psycopg.connect(cluster.conninfo(dbname), autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]


def run(cluster: Cluster, *statements: str, dbname: str = "postgres") -> None:
    with psycopg.connect(cluster.conninfo(dbname), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def segment(data_dir: Path) -> str:
    """The id of the System V segment of a running server: what it has outside its folders."""
    return processes.read_pid_file(data_dir)[6].split()[1]


def all_segments() -> set[str]:
    """The ids of this machine's."""
    return {row.split()[1] for row in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


class Parent:
    """Another Python process that starts clusters."""

    def __init__(self, body: str, *, path: Path = CHECKOUT, **environment: str) -> None:
        imports = "from shardkit.dev import Cluster, Clusters, scratch"
        program = f"import os, sys\nsys.path.insert(0, {str(path)!r})\n{imports}\n{body}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            cwd="/",
        )

    def fields(self) -> list[str]:
        """The next line that it prints, split at tabs."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return line.rstrip("\n").split("\t")

    def paths(self) -> list[Path]:
        return [Path(name) for name in self.fields()]

    def end(self, signum: signal.Signals | None = None) -> tuple[int, str]:
        """Send the signal; (exit status, stderr) when it has ended."""
        if signum is not None:
            self.process.send_signal(signum)
        _, stderr = self.process.communicate(timeout=DEADLINE_SECONDS)
        return self.process.returncode, stderr

    def discard(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


NewParent = Callable[..., Parent]


@pytest.fixture
def new_parent() -> Iterator[NewParent]:
    parents: list[Parent] = []

    def start(*arguments: Any, **options: Any) -> Parent:
        parents.append(Parent(*arguments, **options))
        return parents[-1]

    yield start
    for parent in parents:
        parent.discard()


@pytest.fixture
def temporary(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder for TMPDIR that the servers' user can enter (pytest's tmp_path is private), named by the parameter."""
    folder = Path("/tmp") / f"{os.getpid()}{getattr(request, 'param', '')}"
    folder.mkdir()
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


ON_DISK = "scratch._ROOMY = 2**62  # memory is never roomy enough, so TMPDIR is taken\n"

TWO_THEN_WAIT = """
with Clusters(2) as clusters:
    print(*(cluster.data_dir for cluster in clusters), sep="\\t", flush=True)
    sys.stdin.read()
"""


# --- start, stop, settings ---------------------------------------------------------------------------------------


def test_three_start_in_parallel_and_go() -> None:
    started = time.perf_counter()
    with Clusters(3) as clusters:
        print(f"three servers took connections after {time.perf_counter() - started:.2f} s")
        assert len(clusters) == 3
        assert all(cluster.running for cluster in clusters)
        identifiers = {
            one(cluster, "SELECT system_identifier FROM pg_control_system()") for cluster in clusters
        }
        assert len(identifiers) == 3
        assert {one(cluster, "SHOW wal_level") for cluster in clusters} == {"logical"}
        data_dirs = [cluster.data_dir for cluster in clusters]
        sockets = [cluster.socket_dir for cluster in clusters]
        segments = {segment(data_dir) for data_dir in data_dirs}
        assert segments <= all_segments()
    for folder in (*data_dirs, *sockets):
        assert not folder.exists()
        assert processes.server_processes(folder) == []
    assert not segments & all_segments()


def test_close_may_be_repeated_and_ends_it(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    cluster.close()
    cluster.close()
    assert "closed" in repr(cluster)
    with pytest.raises(UsageError, match="cannot be started again"):
        cluster.start()


def test_no_program_of_the_path_is_needed(new_cluster: NewCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert one(new_cluster(), "SELECT 1") == 1


def test_restart_keeps_rows_and_takes_settings(new_cluster: NewCluster) -> None:
    cluster = new_cluster(settings={"wal_level": "replica", "fsync": True, "work_mem": "5MB"})
    run(cluster, "CREATE TABLE t AS SELECT 7 AS x")
    url = cluster.url()
    assert [one(cluster, f"SHOW {name}") for name in ("wal_level", "fsync", "work_mem")] == [
        "replica",
        "on",
        "5MB",
    ]
    cluster.settings["work_mem"] = "6MB"
    cluster.restart()
    assert one(cluster, "SHOW work_mem") == "6MB"
    assert one(cluster, "SELECT x FROM t") == 7
    assert cluster.url() == url


def test_alter_system_goes_over_the_settings(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    run(cluster, "ALTER SYSTEM SET wal_retrieve_retry_interval = '7s'")
    cluster.restart()
    assert one(cluster, "SHOW wal_retrieve_retry_interval") == "7s"


def test_start_and_stop_do_nothing_where_nothing_is_to_do(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    pid = cluster.pid
    cluster.start()
    assert cluster.pid == pid
    cluster.stop()
    cluster.stop()
    assert not cluster.running
    with pytest.raises(UsageError, match="is not running"):
        cluster.kill()


def test_a_server_that_refuses_its_settings_says_why_and_keeps_its_rows(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    run(cluster, "CREATE TABLE t AS SELECT 7 AS x")
    cluster.settings["max_connektions"] = 5
    cluster.stop()
    with pytest.raises(ServerFailed, match='unrecognized configuration parameter "max_connektions"'):
        cluster.start()
    del cluster.settings["max_connektions"]
    cluster.start()
    assert one(cluster, "SELECT x FROM t") == 7


@pytest.mark.parametrize(("name", "value"), [("a = b", "1"), ("work_mem", "1\nfsync = on"), ("", "1")])
def test_a_setting_that_breaks_the_file_is_refused(new_cluster: NewCluster, name: str, value: str) -> None:
    with pytest.raises(UsageError, match="cannot be a setting"):
        new_cluster(settings={name: value})


def test_a_setting_is_quoted(new_cluster: NewCluster) -> None:
    cluster = new_cluster(settings={"shardkit.test": r"it's a \ 'b'"})
    assert one(cluster, "SHOW shardkit.test") == r"it's a \ 'b'"


def test_a_thread_may_not_start_a_server(new_cluster: NewCluster) -> None:
    """The kernel would stop it with the thread."""
    cluster = new_cluster()
    cluster.stop()
    errors: list[BaseException] = []

    def start() -> None:
        try:
            cluster.start()
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "from the main thread only" in str(errors[0])
    cluster.start()


# --- access ------------------------------------------------------------------------------------------------------


def test_urls_carry_no_password(servers: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    server = servers[0]
    assert server.password not in server.url() + server.conninfo()
    assert server.url("a b") == (f"postgresql://postgres@/a%20b?host={server.socket_dir}&port={server.port}")
    assert stat.S_IMODE(server.passfile.stat().st_mode) == 0o600
    psycopg.connect(server.url()).close()
    psycopg.connect(server.url(), password=server.password, passfile="/dev/null").close()
    monkeypatch.delenv("PGPASSFILE")
    psycopg.connect(server.conninfo()).close()
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(server.url(), passfile="/dev/null")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(server.url(), password="guess")


def test_tcp(new_cluster: NewCluster, servers: Clusters) -> None:
    cluster = new_cluster(tcp=True)
    with psycopg.connect(cluster.url(tcp=True)) as connection:
        assert connection.info.host == "127.0.0.1"
    psycopg.connect(cluster.conninfo(tcp=True)).close()
    psycopg.connect(cluster.url()).close()
    with pytest.raises(UsageError, match="has a socket only"):
        servers[0].url(tcp=True)


def test_a_taken_port_is_left_for_another(new_cluster: NewCluster) -> None:
    first = new_cluster(tcp=True)
    second = Cluster(tcp=True)
    try:
        second.port = first.port
        second.start()
        assert second.port != first.port
        psycopg.connect(second.url(tcp=True)).close()
    finally:
        second.close()


def test_servers_replicate_to_each_other_without_a_password(
    servers: Clusters, fresh_database: FreshDatabase
) -> None:
    for index, name in ((0, "source"), (1, "target")):
        fresh_database(index, name)
        run(servers[index], "CREATE TABLE t (x int PRIMARY KEY)", dbname=name)
    run(servers[0], "INSERT INTO t VALUES (7)", "CREATE PUBLICATION p FOR TABLE t", dbname="source")
    conninfo = servers[0].conninfo("source")
    run(servers[1], f"CREATE SUBSCRIPTION s CONNECTION '{conninfo}' PUBLICATION p", dbname="target")
    eventually(lambda: one(servers[1], "SELECT count(*) FROM t", "target") == 1, "the row is copied")
    run(servers[0], "INSERT INTO t VALUES (8)", dbname="source")
    eventually(lambda: one(servers[1], "SELECT count(*) FROM t", "target") == 2, "the row is applied")
    # Both go in spite of the subscription and its slot, in the order that would hold the source.
    Cluster.drop_databases([(servers[0], "source"), (servers[1], "target")])
    assert one(servers[0], "SELECT count(*) FROM pg_replication_slots WHERE database = 'source'") == 0
    assert one(servers[1], "SELECT count(*) FROM pg_database WHERE datname IN ('source', 'target')") == 0


def test_a_database_in_use_is_dropped(servers: Clusters) -> None:
    name = 'In "use"'
    servers[2].create_database(name)
    with psycopg.connect(servers[2].conninfo(name)) as connection:
        connection.execute("CREATE TABLE t (x int)")
        connection.execute("PREPARE TRANSACTION 'left over'")
    with psycopg.connect(servers[2].conninfo(name)) as connection:
        connection.execute("SELECT 1")
        servers[2].drop_database(name)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    servers[2].drop_database(name)
    assert one(servers[2], "SELECT count(*) FROM pg_prepared_xacts") == 0


# --- crashes -----------------------------------------------------------------------------------------------------


def test_a_killed_server_recovers_what_was_committed(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    run(cluster, "CREATE TABLE t (x int)", "INSERT INTO t SELECT generate_series(1, 10000)")
    with (
        closing(psycopg.connect(cluster.conninfo())) as idle,
        closing(psycopg.connect(cluster.conninfo())) as busy,
    ):
        idle.execute("INSERT INTO t VALUES (0)")
        busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 1000000000)")
        busy.pgconn.flush()
        cluster.kill()
    assert processes.server_processes(cluster.data_dir) == []
    assert not cluster.running
    with pytest.raises(UsageError, match="is not running"):
        print(cluster.pid)
    cluster.start()
    assert one(cluster, "SELECT count(*) FROM t") == 10000


def test_an_immediate_shutdown_recovers(new_cluster: NewCluster) -> None:
    cluster = new_cluster()
    run(cluster, "CREATE TABLE t AS SELECT 7 AS x")
    cluster.kill(signal.SIGQUIT)
    cluster.start()
    assert one(cluster, "SELECT x FROM t") == 7


def test_a_crashed_server_may_be_closed() -> None:
    with Cluster() as cluster:
        left = segment(cluster.data_dir)
        cluster.kill()
        assert left in all_segments()
    assert left not in all_segments()


# --- the end of the parent ---------------------------------------------------------------------------------------


def test_kill_9_of_the_parent_stops_the_servers_and_the_next_start_sweeps(new_parent: NewParent) -> None:
    parent = new_parent(TWO_THEN_WAIT)
    data_dirs = parent.paths()
    segments = {segment(data_dir) for data_dir in data_dirs}
    assert parent.end(signal.SIGKILL)[0] == -signal.SIGKILL
    eventually(lambda: not any(map(processes.server_processes, data_dirs)), "no server process")
    assert new_parent("Cluster().close()").end() == (0, "")
    gone(data_dirs, segments)


def test_servers_that_outlived_their_parent_are_stopped_by_the_sweep(new_parent: NewParent) -> None:
    """As where the kernel does not tell them of its death (macOS)."""
    parent = new_parent(TWO_THEN_WAIT)
    data_dirs = parent.paths()
    segments = {segment(data_dir) for data_dir in data_dirs}
    for pid in [pid for data_dir in data_dirs for pid in processes.server_processes(data_dir)]:
        os.kill(pid, signal.SIGSTOP)  # so it cannot act on the death signal
    parent.end(signal.SIGKILL)
    assert new_parent("Cluster().close()").end() == (0, "")
    gone(data_dirs, segments)


def test_ctrl_c_leaves_nothing(new_parent: NewParent) -> None:
    parent = new_parent(TWO_THEN_WAIT)
    data_dirs = parent.paths()
    segments = {segment(data_dir) for data_dir in data_dirs}
    status, stderr = parent.end(signal.SIGINT)
    assert (status, stderr.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")
    assert not any(data_dir.parent.parent.exists() for data_dir in data_dirs)
    gone(data_dirs, segments)


def gone(data_dirs: list[Path], segments: set[str]) -> None:
    """Nothing is left of the servers. (A sweep by another process may be at it: wait for that.)"""
    eventually(
        lambda: not any(data_dir.parent.parent.exists() for data_dir in data_dirs), "the folders are gone"
    )
    assert not any(map(processes.server_processes, data_dirs))
    assert not segments & all_segments()


def test_ctrl_c_while_starting_leaves_nothing(new_parent: NewParent, temporary: Path) -> None:
    parent = new_parent(ON_DISK + TWO_THEN_WAIT, TMPDIR=str(temporary))
    eventually(lambda: list(temporary.glob("*/template0/base")), "initdb is at work")
    assert parent.end(signal.SIGINT)[0] != 0
    assert list(temporary.iterdir()) == []


def test_ctrl_c_ends_what_the_server_s_programs_have_started(new_parent: NewParent, tmp_path: Path) -> None:
    """As the servers of initdb: one that lived on would write into the folder while it is removed."""
    noted = tmp_path / "pid"
    program = f"sleep 60 & echo $! > {noted}; wait"
    parent = new_parent(f"from shardkit.dev.workspace import _run\n_run('/bin/sh', '-c', {program!r})")
    eventually(lambda: noted.exists() and noted.read_text().endswith("\n"), "it has started one")
    assert parent.end(signal.SIGINT)[0] == -signal.SIGINT
    assert_ended(noted)


INTERRUPTED_AS_IT_STARTS = """
import signal, subprocess
from pathlib import Path
start = subprocess.Popen._execute_child
def interrupted(self, *arguments, **options):
    start(self, *arguments, **options)
    Path(NOTED).write_text(str(self.pid))
    os.kill(os.getpid(), signal.SIGINT)
subprocess.Popen._execute_child = interrupted
from shardkit.dev.workspace import _run
_run("/bin/sleep", "60")
"""


def test_ctrl_c_ends_a_program_that_has_only_just_been_started(new_parent: NewParent, tmp_path: Path) -> None:
    """Where nobody knows yet that it has."""
    noted = tmp_path / "pid"
    parent = new_parent(f"import os\nNOTED = {str(noted)!r}" + INTERRUPTED_AS_IT_STARTS)
    status, stderr = parent.end()
    assert (status, stderr.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")
    assert_ended(noted)


def assert_ended(noted: Path) -> None:
    where = Path(f"/proc/{noted.read_text().strip()}/cwd")

    def is_gone() -> bool:
        try:
            return not os.readlink(where)
        except OSError:
            return True  # of a zombie too

    eventually(is_gone, "it has ended")  # killed it was before; to end takes the system a moment


def test_an_exit_without_close_leaves_nothing(new_parent: NewParent) -> None:
    parent = new_parent(
        "cluster = Cluster()\ncluster.start()\nprint(cluster.data_dir, flush=True)\nsys.exit(3)"
    )
    (data_dir,) = parent.paths()
    assert parent.end() == (3, "")
    assert not data_dir.parent.parent.exists()


def test_a_living_process_keeps_its_clusters(new_cluster: NewCluster, new_parent: NewParent) -> None:
    cluster = new_cluster()
    assert new_parent("Cluster().close()").end() == (0, "")
    assert cluster.data_dir.parent.parent not in scratch.sweep()
    assert one(cluster, "SELECT 1") == 1


def test_a_forked_child_neither_stops_the_servers_nor_keeps_the_folder(new_parent: NewParent) -> None:
    parent = new_parent("""
cluster = Cluster()
cluster.start()
if not (child := os.fork()):
    cluster.close()
    if not os.fork():
        sys.stdin.read()  # outlives the parent
    sys.exit(0)
os.waitpid(child, 0)
print(cluster.data_dir, cluster.running, sep="\\t", flush=True)
sys.stdin.read()
""")
    name, running = parent.fields()
    assert running == "True"
    assert processes.server_processes(Path(name))
    parent.process.kill()
    parent.process.wait(DEADLINE_SECONDS)
    scratch.sweep()
    eventually(lambda: not Path(name).exists(), "the folder is gone")


# --- where it runs -----------------------------------------------------------------------------------------------

ONE_QUERY = """
import psycopg, shardkit
with Cluster() as cluster:
    psycopg.connect(cluster.conninfo()).close()
    psycopg.connect(cluster.url(), passfile=str(cluster.passfile)).close()
    print(shardkit.__file__, cluster.data_dir, cluster.socket_dir, sep="\\t", flush=True)
"""


@pytest.mark.parametrize("temporary", [" a 'b', \"c\" \\ ü", "-long" * 24, " " * 90], indirect=True)
def test_odd_folders(new_parent: NewParent, tmp_path: Path, temporary: Path) -> None:
    """A checkout and a TMPDIR whose paths have everything in them; sockets still get a short and plain path."""
    checkout = tmp_path / 'a checkout, it\'s "here"'
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "shardkit", checkout / "shardkit", ignore=ignore)
    parent = new_parent(ON_DISK + ONE_QUERY, path=checkout, TMPDIR=str(temporary))
    module, data_dir, socket_dir = parent.paths()
    assert parent.end() == (0, "")
    assert module.is_relative_to(checkout)
    assert data_dir.is_relative_to(temporary)
    assert not socket_dir.is_relative_to(temporary)
    assert list(temporary.iterdir()) == []
    assert not socket_dir.parent.parent.exists()


def test_a_plain_temporary_folder_holds_the_sockets_too(new_parent: NewParent, temporary: Path) -> None:
    parent = new_parent(ON_DISK + ONE_QUERY, TMPDIR=str(temporary))
    assert all(path.is_relative_to(temporary) for path in parent.paths()[1:])
    assert parent.end() == (0, "")


def test_binaries_below_a_private_folder(servers: Clusters, tmp_path: Path) -> None:
    """A virtual environment in /root: root can run it, the servers' user cannot, and nothing there is changed."""
    home = tmp_path / "home"
    site = home / "site-packages"
    original = servers[0].binaries.folder.parent
    package = site / original.parent.name
    ignore = shutil.ignore_patterns("include", "pgxs", "__pycache__")
    shutil.copytree(original, package / original.name, symlinks=True, ignore=ignore)
    libraries = original.parent.with_name(f"{original.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, site / libraries.name)
    home.chmod(0o700)
    before = permissions(tmp_path)
    with Cluster(binaries=package / original.name / "bin") as cluster:
        psycopg.connect(cluster.conninfo()).close()
        used = cluster.binaries.folder
        assert used.is_relative_to(home) == (os.geteuid() != 0)
        assert permissions(tmp_path) == before
        assert os.stat(f"/proc/{cluster.pid}").st_uid != 0
    assert permissions(tmp_path) == before


def permissions(folder: Path) -> dict[str, tuple[int, int, int]]:
    paths = [folder, *folder.parents, *folder.rglob("*")]
    return {
        str(path): (status.st_mode, status.st_uid, status.st_gid)
        for path in paths
        for status in [path.lstat()]
    }
