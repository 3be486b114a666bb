"""Statements that may wait for other transactions for long: run in a thread, so that someone looks after them.

PostgreSQL gives no reason while it waits, and a statement_timeout would begin the wait anew. So whoever waits looks
about meanwhile, tells the reason, and cancels the statement when nobody has the patience any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import psycopg

from .connections import Connection


def attended(
    connection: Connection, act: Callable[[], None], look: Callable[[], None], every: float = 0.2
) -> None:
    """Run ``act``, which works on ``connection``, and call ``look`` until it has ended.

    ``look`` uses another connection. What either raises is raised; if it is ``look``, the statement is cancelled first.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="attended statement")
    thread.start()
    try:
        thread.join(every)
        while thread.is_alive():
            look()
            thread.join(every)
    except BaseException:
        while thread.is_alive():
            with suppress(psycopg.Error):  # the server may be gone; then the statement ends by itself
                connection.cancel_safe(timeout=5.0)
            thread.join(0.5)
        raise
    if raised:
        raise raised[0]
