"""The gRPC calls to one address, by grpcio; their ends come back to an asyncio loop.

A call is a future of grpcio and not a coroutine of grpc.aio: that takes three quarters of the CPU time, and no thread
runs while there is no call (decision 14).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from stages.deep.replicas import Address

GrpcCall = Any
"""A call under way: grpcio's future."""


class GrpcError(Exception):
    """A call that failed. `status`: name of the gRPC status, such as `UNAVAILABLE`. `text`: the reason, one line."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


class GrpcChannel:
    """Calls to one server, which share a connection. Create it and use it on an asyncio loop.

    - `address`: of the server.
    - `credentials`: of gRPC, for TLS; None: without.
    - `arguments`: options of the channel, by gRPC's names.
    """

    def __init__(self, address: Address, credentials: Any, arguments: Sequence[tuple[str, int | str]]) -> None:
        import grpc

        self._loop = asyncio.get_running_loop()
        self._channel = (
            grpc.insecure_channel(address.target, arguments)
            if credentials is None
            else grpc.secure_channel(address.target, credentials, arguments)
        )
        self._methods: dict[str, Any] = {}
        self._open: dict[GrpcCall, Callable[[bytes | GrpcError], None]] = {}
        self._closed = False

    def call(self, path: str, message: bytes, ended: Callable[[bytes | GrpcError], None]) -> GrpcCall:
        """Start a call of a method, `/package.Service/Method`.

        `ended` gets the answer or the error, once, but not before this method returns, and not after `cancel`.
        """
        if self._closed:
            self._loop.call_soon(ended, GrpcError("UNAVAILABLE", "the connection was closed"))
            return None
        if path not in self._methods:
            self._methods[path] = self._channel.unary_unary(path)
        call = self._methods[path].future(message)
        self._open[call] = ended
        call.add_done_callback(self._done)
        return call

    def _done(self, call: GrpcCall) -> None:
        """In a thread of gRPC: pass the end of a call to the loop."""
        status, text = call.code().name, call.details() or ""
        outcome = call.result() if status == "OK" else GrpcError(status, " ".join(text.split()))
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._end, call, outcome)

    def _end(self, call: GrpcCall, outcome: bytes | GrpcError) -> None:
        ended = self._open.pop(call, None)
        if ended is not None:
            ended(outcome)

    async def ask(self, path: str, message: bytes, limit_s: float) -> bytes:
        """The answer to a call. Raises GrpcError; after `limit_s` seconds with status `DEADLINE_EXCEEDED`."""
        answer: asyncio.Future[bytes | GrpcError] = self._loop.create_future()

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
        if self._open.pop(call, None) is not None:
            call.cancel()

    async def close(self) -> None:
        """End the connection; all calls fail."""
        self._closed = True
        for call in list(self._open):
            self._end(call, GrpcError("UNAVAILABLE", "the connection was closed"))
        self._channel.close()
