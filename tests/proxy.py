"""A TCP proxy that makes trouble on demand: it cuts, pauses, delays, slows and refuses connections.

After toxiproxy (github.com/Shopify/toxiproxy), in process: one thread runs all connections of a proxy.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Self

from cascade.local_parts import free_ports

CONNECTIONS_MAX = 256
CHUNK_BYTES = 64 * 1024
# Chunks on their way, a direction of a connection: a megabyte, then the sender feels it.
CHUNKS_MAX = 16
# With a limit, so many seconds' worth of bytes go at a time.
LIMIT_STEP_S = 0.05
NO_TARGET_S = 0.5
CALL_TIMEOUT_S = 10.0
# SO_LINGER, on, 0 s: closing sends a reset, as a middlebox that drops its table would, instead of a polite end.
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class _Pair:
    """The two ends of one connection through the proxy."""

    client: asyncio.StreamWriter
    target: asyncio.StreamWriter


class Proxy:
    """Passes connections to 127.0.0.1:`port` on to a target; a context manager.

    `pause` lets connections be made and passes nothing; `delay` (seconds) and `limit` (bytes a second, 0: none) hold
    for each direction of each connection; `cut` resets all connections; `refuse` does so and makes no new ones until
    `accept`. `heal` ends all of it. `made` counts the connections there ever were.
    """

    def __init__(self, target_host: str, target_port: int) -> None:
        self.port = free_ports(1)[0]
        self.made = 0
        self.delay_s = 0.0
        self.limit_bytes_per_s = 0.0
        self._target = target_host, target_port
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._paused: int | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        self.accept()

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._pairs)

    def cut(self) -> None:
        """Reset all connections."""
        self._call(self._cut())

    def pause(self, connections: int | None = None) -> None:
        """Pass nothing in both directions until `resume`. `connections`: only the first so many stop; None: all."""
        self._paused = connections
        self._call(self._set_flowing(False))

    def resume(self) -> None:
        """Pass on what waits, and what comes."""
        self._call(self._set_flowing(True))

    def delay(self, seconds: float) -> None:
        """Each byte arrives so much later; the rate stays."""
        self.delay_s = seconds

    def limit(self, bytes_per_s: float) -> None:
        """Pass no more than this, a direction of a connection; 0: as fast as it goes."""
        self.limit_bytes_per_s = bytes_per_s

    def refuse(self) -> None:
        """Reset all connections, and refuse new ones."""
        self._call(self._refuse())

    def accept(self) -> None:
        """Take connections again."""
        self._call(self._accept())

    def heal(self) -> None:
        """End every trouble."""
        self.delay(0.0)
        self.limit(0.0)
        self.resume()
        self.accept()

    def close(self) -> None:
        """End all connections and the thread."""
        self._call(self._refuse())
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT_S)

    async def _set_flowing(self, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _accept(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, limit=CHUNK_BYTES)

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _cut(self) -> None:
        for pair in list(self._pairs):
            _reset(pair.client)
            _reset(pair.target)

    async def _end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._pass_on(reader, writer)
        finally:
            self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._pairs) >= CONNECTIONS_MAX:
            _reset(writer)
            return
        try:
            target_reader, target_writer = await asyncio.open_connection(*self._target, limit=CHUNK_BYTES)
        except OSError:
            # a client takes the connection for made, and begins anew without a pause when it is reset
            await asyncio.sleep(NO_TARGET_S)
            _reset(writer)
            return
        pair = _Pair(writer, target_writer)
        self._pairs.add(pair)
        self.made += 1
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._carry(reader, target_writer, self.made))
                directions.create_task(self._carry(target_reader, writer, self.made))
        except* OSError:
            # one end is gone without a word: so it looks to the other
            _reset(writer)
            _reset(target_writer)
        finally:
            self._pairs.discard(pair)
            writer.close()
            target_writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        """One direction of the connection with this number, from 1 on, until its sender ends it."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_MAX)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._take(reader, waiting))
            both.create_task(self._give(waiting, writer, number))

    async def _take(self, reader: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes]]) -> None:
        octets = b"-"
        while octets:
            octets = await reader.read(CHUNK_BYTES)
            await waiting.put((self._loop.time() + self.delay_s, octets))

    async def _give(
        self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, number: int
    ) -> None:
        while True:
            due_s, octets = await waiting.get()
            await asyncio.sleep(max(due_s - self._loop.time(), 0.0))
            if self._paused is None or number <= self._paused:
                await self._flowing.wait()
            if not octets:
                writer.write_eof()
                return
            await self._write(octets, writer)

    async def _write(self, octets: bytes, writer: asyncio.StreamWriter) -> None:
        sent = 0
        while sent < len(octets):
            limit = self.limit_bytes_per_s
            step = max(int(limit * LIMIT_STEP_S), 1) if limit else len(octets)
            piece = octets[sent : sent + step]
            if limit:
                await asyncio.sleep(len(piece) / limit)
            writer.write(piece)
            await writer.drain()
            sent += step


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
