"""A network that fails on request: a TCP proxy between libpq and a PostgreSQL server, in a thread of its own.

It tells connections apart by the first packet of the protocol: a server that copies from another (a subscription) asks
for ``replication``, all others are commands and applications. So the way of either can fail alone.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

PEER, CLIENT = "peer", "client"
"""The two kinds of connections."""


class Proxy:
    """Listens on a port of 127.0.0.1 and passes everything to the socket at ``upstream``; close it in the end."""

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._lanes = {PEER: _Lane(), CLIENT: _Lane()}
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    # --- what fails ------------------------------------------------------------------------------------------------

    def cut(self, kind: str) -> None:
        """Reset every connection of a kind and refuse new ones."""
        self._on_loop(self._lanes[kind].cut)

    def blackhole(self, kind: str) -> None:
        """Keep the connections of a kind open and pass nothing, in either direction; new ones get no answer."""
        self._on_loop(lambda: self._lanes[kind].open(to_server=False, to_client=False))

    def mute(self, kind: str) -> None:
        """Pass what is sent to the server, and nothing back: what is done there nobody learns."""
        self._on_loop(lambda: self._lanes[kind].open(to_server=True, to_client=False))

    def heal(self) -> None:
        """Pass everything again; what was held back arrives."""
        for lane in self._lanes.values():
            self._on_loop(partial(lane.open, to_server=True, to_client=True))

    def connections(self, kind: str) -> int:
        """How many connections of a kind are open."""
        return len(self._lanes[kind].links)

    def close(self) -> None:
        """End everything, the thread too."""
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- on the loop -----------------------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _on_loop(self, act: Callable[[], None]) -> None:
        async def run() -> None:
            act()

        self._do(run())

    async def _close(self) -> None:
        self._server.close()
        for lane in self._lanes.values():
            lane.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._carry(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.readexactly(8)
        (length,) = struct.unpack_from("!I", first)
        first += await reader.readexactly(length - 8)
        lane = self._lanes[PEER if b"replication\0" in first else CLIENT]
        if lane.refuses:
            raise ConnectionResetError
        server_reader, server_writer = await asyncio.open_unix_connection(str(self._upstream))
        link = (writer, server_writer)
        lane.links.add(link)
        try:
            await lane.to_server.wait()
            server_writer.write(first)
            await asyncio.gather(
                _pump(reader, server_writer, lane.to_server), _pump(server_reader, writer, lane.to_client)
            )
        finally:
            lane.links.discard(link)
            for end in link:
                _reset(end)


class _Lane:
    """The state of one kind of connections."""

    def __init__(self) -> None:
        self.links: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.to_server, self.to_client = asyncio.Event(), asyncio.Event()
        self.open(to_server=True, to_client=True)

    def open(self, *, to_server: bool, to_client: bool) -> None:
        self.refuses = False
        for event, is_open in ((self.to_server, to_server), (self.to_client, to_client)):
            if is_open:
                event.set()
            else:
                event.clear()

    def cut(self) -> None:
        self.open(to_server=True, to_client=True)  # whoever waits finds out
        self.refuses = True
        for link in list(self.links):
            for end in link:
                _reset(end)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
    while data := await reader.read(1 << 16):
        await gate.wait()
        writer.write(data)
        await writer.drain()
    await gate.wait()
    raise ConnectionResetError  # neither side of this protocol goes on alone


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, as a host that has forgotten the connection answers."""
    transport = writer.transport
    if transport.is_closing():
        return
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None and connection.family == socket.AF_INET:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
