"""gRPC calls with one request and one answer, over one HTTP/2 connection; on an asyncio loop.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md. Decision 14 says why this is not the library.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import unquote

from stages.deep import http2
from stages.deep.http2 import Frame, Http2Error

# The largest answer. Scores of 256 rows take one kilobyte, a model's configuration some.
MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
# Headers of an answer, where they need more than one frame.
_HEADER_BYTES_MAX: Final = 64 * 1024
# The server may send so much before this client says that it has read it.
_CONNECTION_WINDOW_BYTES: Final = 4 * MESSAGE_BYTES_MAX
_PREFIX_BYTES: Final = 5
_OK: Final = "0"
# By number: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md.
_STATUSES: Final = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
# What a proxy's HTTP status means where there is no status of gRPC.
_HTTP_STATUSES: Final = {
    "400": "INTERNAL",
    "401": "UNAUTHENTICATED",
    "403": "PERMISSION_DENIED",
    "404": "UNIMPLEMENTED",
    "429": "UNAVAILABLE",
    "502": "UNAVAILABLE",
    "503": "UNAVAILABLE",
    "504": "UNAVAILABLE",
}


class GrpcError(Exception):
    """A call that failed. `status`: gRPC's name of the reason, such as `UNAVAILABLE`; `text`: one line."""

    def __init__(self, status: str, text: str) -> None:
        self.status, self.text = status, " ".join(text.split())
        super().__init__(f"{status}: {self.text}")


@dataclass(eq=False, slots=True)
class GrpcCall:
    """A call: what is sent, and what has arrived.

    - `headers`: the encoded headers of the request. `unsent`: the rest of the request.
    - `ended`: gets the answer or the error, once; it is not called after `cancel`.
    - `stream`: 0 until it is sent. `window`: bytes that the server accepts on the stream.
    - `answer`, `answer_headers`: received so far.
    """

    headers: bytes
    unsent: memoryview
    ended: Callable[[bytes | GrpcError], None]
    stream: int = 0
    window: int = 0
    answer: bytearray = field(default_factory=bytearray)
    answer_headers: dict[str, str] = field(default_factory=dict)


def grpc_call(headers: bytes, message: bytes, ended: Callable[[bytes | GrpcError], None]) -> GrpcCall:
    """A call that sends `message`, an encoded protobuf."""
    prefix = bytes(1) + http2.encode_number(len(message))  # not compressed
    return GrpcCall(headers, memoryview(prefix + message), ended)


class GrpcConnection(asyncio.Protocol):
    """One connection. It takes calls from the server's first settings on until the server ends it.

    - `on_room`: called when a call may be sent that had to wait, and when the connection takes no more calls.

    `ready` is done once the connection takes calls; it fails with GrpcError if that never happens. `takes_calls`:
    whether further calls may be sent, at most as many at a time as the server's settings allow. `closed` is done once
    the socket is.
    """

    def __init__(self, on_room: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._on_room = on_room
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._handlers: dict[int, Callable[[Frame], None]] = {
            http2.DATA: self._data,
            http2.HEADERS: self._headers,
            http2.CONTINUATION: self._continuation,
            http2.RST_STREAM: self._reset,
            http2.SETTINGS: self._settings,
            http2.PING: self._ping,
            http2.GOAWAY: self._goaway,
            http2.WINDOW_UPDATE: self._window_update,
        }
        self._calls: dict[int, GrpcCall] = {}
        self._unsent: dict[int, GrpcCall] = {}
        self._next_stream = 1
        self._ends = False
        self._problem = "the server closed the connection"
        self._streams_max = http2.STREAM_LAST
        self._stream_window = self._window = http2.WINDOW_BYTES
        self._unconfirmed_bytes = 0
        # headers that need more than one frame: the first of them, and what has arrived
        self._first_headers: Frame | None = None
        self._header_block = b""

    @property
    def takes_calls(self) -> bool:
        """Whether a further call may be sent now."""
        return self.ready.done() and not self._ends and len(self._calls) < self._streams_max

    @property
    def ends(self) -> bool:
        """Whether it takes no further calls, ever."""
        return self._ends

    def send(self, call: GrpcCall) -> None:
        """Send a call; only while `takes_calls`."""
        call.stream, call.window = self._next_stream, self._stream_window
        self._next_stream += 2
        self._ends = self._next_stream > http2.STREAM_LAST
        self._calls[call.stream] = self._unsent[call.stream] = call
        self._send(http2.encode_frame(http2.HEADERS, http2.END_HEADERS, call.stream, call.headers))

    def cancel(self, call: GrpcCall) -> None:
        """Cancel a call. No effect on one that has ended."""
        if self._calls.get(call.stream) is call:
            self._remove(call.stream)
            self._write(http2.encode_frame(http2.RST_STREAM, 0, call.stream, http2.encode_number(http2.CANCEL)))
            self._after_call()

    def close(self) -> None:
        """End the connection; its calls fail."""
        self._end("the connection was closed")

    # --- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast(asyncio.Transport, transport)
        settings = {http2.HEADER_TABLE_SIZE: 0, http2.ENABLE_PUSH: 0, http2.INITIAL_WINDOW_SIZE: MESSAGE_BYTES_MAX}
        more = http2.encode_number(_CONNECTION_WINDOW_BYTES - http2.WINDOW_BYTES)
        window = http2.encode_frame(http2.WINDOW_UPDATE, 0, 0, more)
        self._write(http2.PREFACE + http2.encode_settings(settings) + window)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._received += data
        try:
            for frame in http2.take_frames(self._received):
                if self._first_headers is not None and frame.kind != http2.CONTINUATION:
                    raise Http2Error("headers that another frame interrupts")
                handle = self._handlers.get(frame.kind)
                if handle is not None:
                    handle(frame)
        except Http2Error as error:
            self._end(str(error))

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self._end(str(error) if error is not None else self._problem)
        self.closed.set_result(None)

    # --- what is sent -----------------------------------------------------------------------------------------------

    def _write(self, content: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(content)

    def _send(self, first: bytes = b"") -> None:
        """Write `first`, and of the requests what the server's windows allow, in one piece."""
        pieces = [first]
        for call in list(self._unsent.values()):
            while call.unsent and (size := min(self._window, call.window, http2.FRAME_BYTES_MAX, len(call.unsent))) > 0:
                last = size == len(call.unsent)
                flags = http2.END_STREAM if last else 0
                pieces.append(http2.encode_frame(http2.DATA, flags, call.stream, call.unsent[:size]))
                call.unsent = call.unsent[size:]
                call.window -= size
                self._window -= size
            if not call.unsent:
                del self._unsent[call.stream]
        self._write(b"".join(pieces))

    # --- what is received -------------------------------------------------------------------------------------------

    def _data(self, frame: Frame) -> None:
        # the whole frame counts for the window, whatever it holds
        self._unconfirmed_bytes += len(frame.content)
        if self._unconfirmed_bytes > MESSAGE_BYTES_MAX:
            more = http2.encode_number(self._unconfirmed_bytes)
            self._write(http2.encode_frame(http2.WINDOW_UPDATE, 0, 0, more))
            self._unconfirmed_bytes = 0
        call = self._calls.get(frame.stream)
        if call is None:  # it was cancelled
            return
        call.answer += http2.unpadded(frame)
        if len(call.answer) >= _PREFIX_BYTES and http2.decode_number(call.answer[1:_PREFIX_BYTES]) > MESSAGE_BYTES_MAX:
            self.cancel(call)
            call.ended(GrpcError("RESOURCE_EXHAUSTED", f"an answer of more than {MESSAGE_BYTES_MAX:,} bytes"))
        elif frame.flags & http2.END_STREAM:
            self._finish(call)

    def _headers(self, frame: Frame) -> None:
        block = http2.unpadded(frame)
        if frame.flags & http2.END_HEADERS:
            self._headers_complete(frame, block)
        else:
            self._first_headers, self._header_block = frame, block

    def _continuation(self, frame: Frame) -> None:
        first = self._first_headers
        if first is None or frame.stream != first.stream:
            raise Http2Error("headers that continue none")
        self._header_block += frame.content
        if len(self._header_block) > _HEADER_BYTES_MAX:
            raise Http2Error(f"headers of more than {_HEADER_BYTES_MAX:,} bytes")
        if frame.flags & http2.END_HEADERS:
            self._first_headers = None
            self._headers_complete(first, self._header_block)

    def _headers_complete(self, frame: Frame, block: bytes) -> None:
        headers = http2.decode_headers(block)
        call = self._calls.get(frame.stream)
        if call is None:
            return
        call.answer_headers.update(headers)
        if frame.flags & http2.END_STREAM:
            self._finish(call)

    def _reset(self, frame: Frame) -> None:
        code = http2.decode_number(frame.content)
        call = self._remove(frame.stream)
        if call is not None:
            status = "UNAVAILABLE" if code == http2.REFUSED_STREAM else "INTERNAL"
            call.ended(GrpcError(status, f"the server ended the call with HTTP/2 error {code}"))
            self._after_call()

    def _settings(self, frame: Frame) -> None:
        if frame.flags & http2.ACK:
            return
        for setting, value in http2.decode_settings(frame.content):
            if setting == http2.MAX_CONCURRENT_STREAMS:
                self._streams_max = value
            elif setting == http2.INITIAL_WINDOW_SIZE:
                if value > http2.WINDOW_BYTES_MAX:
                    raise Http2Error(f"a window of {value:,} bytes")
                for call in self._calls.values():
                    call.window += value - self._stream_window
                self._stream_window = value
        self._send(http2.encode_frame(http2.SETTINGS, http2.ACK, 0))
        if not self.ready.done():
            self.ready.set_result(None)
        self._on_room()

    def _ping(self, frame: Frame) -> None:
        if not frame.flags & http2.ACK:
            self._write(http2.encode_frame(http2.PING, http2.ACK, 0, frame.content))

    def _goaway(self, frame: Frame) -> None:
        last_stream = http2.decode_number(frame.content) & http2.STREAM_LAST
        self._ends = True
        refused = [stream for stream in self._calls if stream > last_stream]
        for stream in refused:
            call = self._remove(stream)
            if call is not None:
                call.ended(GrpcError("UNAVAILABLE", "the server ends the connection"))
        self._after_call()

    def _window_update(self, frame: Frame) -> None:
        more = http2.decode_number(frame.content) & http2.WINDOW_BYTES_MAX
        if frame.stream == 0:
            self._window += more
        elif (call := self._calls.get(frame.stream)) is not None:
            call.window += more
        if self._unsent:
            self._send()

    # --- the end of calls and of the connection -----------------------------------------------------------------------

    def _remove(self, stream: int) -> GrpcCall | None:
        self._unsent.pop(stream, None)
        return self._calls.pop(stream, None)

    def _finish(self, call: GrpcCall) -> None:
        if call.unsent:
            # an error, before the server has read the request: it reads no further
            self.cancel(call)
        else:
            self._remove(call.stream)
        call.ended(_outcome(call.answer_headers, call.answer))
        self._after_call()

    def _after_call(self) -> None:
        if self._ends and not self._calls:
            self._end(self._problem)
        else:
            self._on_room()

    def _end(self, problem: str) -> None:
        self._ends = True
        self._problem = problem
        if self._transport is not None and not self._transport.is_closing():
            # `close` would wait for a server that does not read
            self._transport.abort()
        error = GrpcError("UNAVAILABLE", problem)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # nobody needs to wait for it
        calls, self._calls = list(self._calls.values()), {}
        self._unsent.clear()
        for call in calls:
            call.ended(error)
        self._on_room()


def _outcome(headers: Mapping[str, str], answer: bytearray) -> bytes | GrpcError:
    """The message of an answer, or its error."""
    status = headers.get("grpc-status")
    if status is None:
        http_status = headers.get(":status", "absent")
        return GrpcError(_HTTP_STATUSES.get(http_status, "UNKNOWN"), f"no status of gRPC; that of HTTP: {http_status}")
    if status != _OK:
        known = status.isdecimal() and int(status) < len(_STATUSES)
        text = unquote(headers.get("grpc-message", ""))
        return GrpcError(_STATUSES[int(status)] if known else "UNKNOWN", text or f"gRPC status {status}")
    if len(answer) < _PREFIX_BYTES or answer[0] or len(answer) - _PREFIX_BYTES != http2.decode_number(answer[1:5]):
        return GrpcError("INTERNAL", f"an answer of {len(answer)} bytes, which is cut, compressed or not the only one")
    return bytes(answer[_PREFIX_BYTES:])
