"""The gRPC calls to one address: connects when a call needs it, and again after the end of a connection."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Final

from stages.deep import http2
from stages.deep.grpc_connection import GrpcCall, GrpcConnection, GrpcError, grpc_call
from stages.deep.replicas import Address

# Time limit for connecting, with the handshake of TLS and the server's first settings. A refused connection fails at
# once.
CONNECT_S_MAX: Final = 2.0
# How long the end of a channel waits for its sockets.
_CLOSE_S_MAX: Final = 1.0


class GrpcChannel:
    """Calls to one server, which share a connection. Create it and use it on an asyncio loop.

    - `address`: of the server.
    - `tls`: the settings of TLS; None: without.
    - `keepalive_s`, `keepalive_timeout_s`: see `GrpcOptions`.

    A call that finds no connection waits until there is one, or fails with `UNAVAILABLE` if none can be made. There is
    one attempt at a time, and none without a call.
    """

    def __init__(
        self, address: Address, tls: ssl.SSLContext | None, keepalive_s: float, keepalive_timeout_s: float
    ) -> None:
        self._address, self._tls = address, tls
        # a final dot ends the search for a name, and is no part of it
        self._host = address.host.removesuffix(".")
        self._keepalive_s, self._keepalive_timeout_s = keepalive_s, keepalive_timeout_s
        self._connection: GrpcConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._waiting: deque[GrpcCall] = deque()
        # with those that the server ends, until their calls have ended
        self._connections: set[GrpcConnection] = set()
        self._headers: dict[str, bytes] = {}
        self._closed = False

    def call(self, path: str, message: bytes, ended: Callable[[bytes | GrpcError], None]) -> GrpcCall:
        """Start a call of a method, `/package.Service/Method`.

        `ended` gets the answer or the error, once, but not before this method returns, and not after `cancel`.
        """
        call = grpc_call(self._headers_of(path), message, ended)
        connection = self._connection
        if self._closed:
            asyncio.get_running_loop().call_soon(ended, GrpcError("UNAVAILABLE", "the connection was closed"))
        elif connection is not None and connection.takes_calls and not self._waiting:
            connection.send(call)
        else:
            self._waiting.append(call)
            self._connect()
        return call

    async def ask(self, path: str, message: bytes, limit_s: float) -> bytes:
        """The answer to a call. Raises GrpcError; after `limit_s` seconds with status `DEADLINE_EXCEEDED`."""
        answer: asyncio.Future[bytes | GrpcError] = asyncio.get_running_loop().create_future()

        def ended(outcome: bytes | GrpcError) -> None:
            if not answer.done():
                answer.set_result(outcome)

        call = self.call(path, message, ended)
        try:
            async with asyncio.timeout(limit_s):
                outcome = await answer
        except TimeoutError:
            raise GrpcError("DEADLINE_EXCEEDED", f"no answer for {limit_s:g} s") from None
        finally:
            self.cancel(call)
        if isinstance(outcome, GrpcError):
            raise outcome
        return outcome

    def cancel(self, call: GrpcCall) -> None:
        """Cancel a call. No effect on one that has ended."""
        if call in self._waiting:
            self._waiting.remove(call)
        for connection in self._connections:
            connection.cancel(call)

    async def close(self) -> None:
        """End the connections; all calls fail."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        for connection in list(self._connections):
            connection.close()
        self._fail_waiting(GrpcError("UNAVAILABLE", "the connection was closed"))
        if self._connections:
            await asyncio.wait([connection.closed for connection in self._connections], timeout=_CLOSE_S_MAX)

    def _headers_of(self, path: str) -> bytes:
        if path not in self._headers:
            address = self._address
            self._headers[path] = http2.encode_headers(
                {
                    ":method": "POST",
                    ":scheme": "https" if self._tls is not None else "http",
                    ":path": path,
                    # a request names the configured host, not the address that it resolves to
                    ":authority": f"{self._host}:{address.port}" if address.host != address.ip else address.target,
                    "te": "trailers",
                    "content-type": "application/grpc",
                }
            )
        return self._headers[path]

    def _connect(self) -> None:
        usable = self._connection is not None and not self._connection.ends
        if self._connecting is None and not usable and not self._closed:
            self._connecting = asyncio.create_task(self._make_connection())

    async def _make_connection(self) -> None:
        connection = GrpcConnection(self._send_waiting)
        loop = asyncio.get_running_loop()
        problem = None
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                transport, _ = await loop.create_connection(
                    lambda: connection,
                    self._address.ip,
                    self._address.port,
                    ssl=self._tls,
                    # the certificate must be that of the configured host
                    server_hostname=self._host if self._tls is not None else None,
                )
                self._connections.add(connection)
                connection.closed.add_done_callback(lambda _: self._connections.discard(connection))
                self._check_protocol(transport)
                self._keep_alive(transport.get_extra_info("socket"))
                await connection.ready
        except TimeoutError:
            problem = f"no connection within {CONNECT_S_MAX:g} s"
        except GrpcError as error:
            problem = error.text
        except OSError as error:
            problem = _text(error)
        finally:
            self._connecting = None
        if problem is None:
            self._connection = connection
            self._send_waiting()
        else:
            # first, since the end of a connection makes another one for what waits
            self._fail_waiting(GrpcError("UNAVAILABLE", problem))
            connection.close()

    def _check_protocol(self, transport: asyncio.Transport) -> None:
        encrypted = transport.get_extra_info("ssl_object")
        if encrypted is not None and encrypted.selected_alpn_protocol() != "h2":
            raise GrpcError("UNAVAILABLE", "the server's TLS offers no HTTP/2")

    def _keep_alive(self, connected: socket.socket) -> None:
        """Let the kernel find a peer that is gone: by probes while idle, and by data without an acknowledgement."""
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(int(self._keepalive_s), 1))
        timeout_ms = max(int(self._keepalive_timeout_s * 1e3), 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)

    def _send_waiting(self) -> None:
        """Send what waits, as far as the connection takes it; where it has ended, make another one."""
        connection = self._connection
        while self._waiting and connection is not None and connection.takes_calls:
            connection.send(self._waiting.popleft())
        if self._waiting:
            self._connect()

    def _fail_waiting(self, error: GrpcError) -> None:
        waiting, self._waiting = self._waiting, deque()
        for call in waiting:
            call.ended(error)


def _text(error: OSError) -> str:
    if error.errno and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)  # asyncio's text repeats the address
    return error.strerror or str(error) or type(error).__name__
