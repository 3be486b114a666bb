"""A mover in a process of its own: ``python -m tests.memoryworker CATALOG URL``; prints its peak memory in bytes.

While the rows move, all users on the source, at URL, are written: once as the copy ends, once when a table has been
compared and what was written meanwhile has still to be.
"""

from __future__ import annotations

import resource
import sys

from shardkit.core.move import Mode, Phase
from shardkit.rebalance.mover import Mover
from shardkit.rebalance.progress import Progress
from shardkit.storage.connections import connect


def main(catalog: str, source: str) -> None:
    written: set[Phase] = set()

    def write_everything(progress: Progress) -> None:
        now = progress.phase is Phase.CATCHING_UP or (progress.phase is Phase.VERIFYING and progress.rows > 0)
        if now and progress.phase not in written:
            written.add(progress.phase)
            with connect(source) as connection:
                connection.execute("UPDATE public.users SET n = n + 1")

    with Mover(catalog, patience=300.0, listener=write_everything) as mover:
        mover.start("rebalance", mode=Mode.LOGICAL)
        assert mover.run().state == "done"
    assert written == {Phase.CATCHING_UP, Phase.VERIFYING}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak if sys.platform == "darwin" else peak * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
