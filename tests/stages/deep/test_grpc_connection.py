"""The gRPC connection, frame by frame: what it sends, and what it makes of a server's frames, wrong ones included."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from stages.deep import http2
from stages.deep.grpc_connection import MESSAGE_BYTES_MAX, GrpcCall, GrpcConnection, GrpcError, grpc_call
from stages.deep.http2 import Frame, Http2Error, encode_frame, take_frames

Outcome = bytes | GrpcError
HEADERS = http2.encode_headers({":method": "POST", ":path": "/inference.GRPCInferenceService/ModelInfer"})


class Wire:
    """asyncio's transport: keeps what is written."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.aborted = False

    def write(self, content: bytes) -> None:
        self.written += content

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


class Peer:
    """A connection, and the server's side of it in the hands of the test."""

    def __init__(self, settings: dict[int, int] | None = None) -> None:
        self.rooms = 0
        self.connection = GrpcConnection(self._room)
        self.wire = Wire()
        self.connection.connection_made(cast(Any, self.wire))
        assert self.wire.written.startswith(http2.PREFACE)
        del self.wire.written[: len(http2.PREFACE)]
        assert [frame.kind for frame in self.frames()] == [http2.SETTINGS, http2.WINDOW_UPDATE]
        assert not self.connection.takes_calls
        self.gives(http2.encode_settings(settings or {}))
        assert self.connection.takes_calls
        assert [(frame.kind, frame.flags) for frame in self.frames()] == [(http2.SETTINGS, http2.ACK)]
        self.outcomes: list[Outcome] = []

    def _room(self) -> None:
        self.rooms += 1

    def frames(self) -> list[Frame]:
        """What was sent since the last look."""
        return list(take_frames(self.wire.written))

    def gives(self, *frames: bytes) -> None:
        self.connection.data_received(b"".join(frames))

    def call(self, message: bytes = b"question") -> GrpcCall:
        made = grpc_call(HEADERS, message, self.outcomes.append)
        self.connection.send(made)
        return made

    def only_error(self) -> str:
        (outcome,) = self.outcomes
        assert isinstance(outcome, GrpcError)
        return str(outcome)


def headers(stream: int, content: dict[str, str], flags: int = http2.END_HEADERS) -> bytes:
    return encode_frame(http2.HEADERS, flags, stream, Encoder().encode(content.items()))


def answer(stream: int, message: bytes = b"answer", status: str = "0", text: str = "") -> bytes:
    body = bytes(1) + http2.encode_number(len(message)) + message
    trailers = {"grpc-status": status, "grpc-message": text}
    return b"".join(
        [
            headers(stream, {":status": "200", "content-type": "application/grpc"}),
            encode_frame(http2.DATA, 0, stream, body),
            headers(stream, trailers, http2.END_HEADERS | http2.END_STREAM),
        ]
    )


def run(test: Callable[[], object]) -> None:
    async def on_a_loop() -> None:
        found = test()
        if isinstance(found, Awaitable):
            await found

    asyncio.run(on_a_loop())


def test_a_request_is_headers_and_one_message_and_its_answer_is_the_message() -> None:
    def test() -> None:
        peer = Peer()
        peer.call(b"question")
        head, data = peer.frames()
        assert (head.kind, head.flags, head.stream) == (http2.HEADERS, http2.END_HEADERS, 1)
        assert http2.decode_headers(head.content)[":path"] == "/inference.GRPCInferenceService/ModelInfer"
        assert (data.kind, data.flags, data.stream) == (http2.DATA, http2.END_STREAM, 1)
        assert data.content == b"\0\0\0\0\x08question"
        peer.gives(answer(1))
        assert peer.outcomes == [b"answer"]

    run(test)


@given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=20), seed=st.integers(0, 1_000))
def test_answers_do_not_depend_on_how_the_network_cuts_and_the_server_mixes_them(cuts: list[int], seed: int) -> None:
    def test() -> None:
        peer = Peer()
        for _ in range(3):
            peer.call()
        frames = {stream: list(take_frames(bytearray(answer(stream, bytes([stream]) * 40)))) for stream in (1, 3, 5)}
        chance, mixed = random.Random(seed), b""
        while frames:
            stream = chance.choice(list(frames))
            mixed += encode_frame(*frames[stream].pop(0))
            frames = {stream: rest for stream, rest in frames.items() if rest}
        place = 0
        while mixed:
            cut = cuts[place % len(cuts)]
            peer.gives(mixed[:cut])
            mixed, place = mixed[cut:], place + 1
        assert sorted(cast(list[bytes], peer.outcomes)) == [bytes([stream]) * 40 for stream in (1, 3, 5)]

    run(test)


def test_a_request_is_sent_as_far_as_the_servers_windows_allow() -> None:
    def test() -> None:
        peer = Peer({http2.INITIAL_WINDOW_SIZE: 100})
        message = bytes(range(256)) * 300
        peer.call(message)
        sent = [frame.content for frame in peer.frames() if frame.kind == http2.DATA]
        assert [len(piece) for piece in sent] == [100]
        # the settings hold for open streams too; then the window of the connection is the narrower one
        peer.gives(http2.encode_settings({http2.INITIAL_WINDOW_SIZE: 2**20}))
        sent += [frame.content for frame in peer.frames() if frame.kind == http2.DATA]
        assert sum(map(len, sent)) == http2.WINDOW_BYTES
        assert max(map(len, sent)) == http2.FRAME_BYTES_MAX
        assert not peer.frames()
        peer.gives(encode_frame(http2.WINDOW_UPDATE, 0, 0, http2.encode_number(2**20)))
        last = peer.frames()
        assert last[-1].flags == http2.END_STREAM
        assert b"".join([*sent, *(frame.content for frame in last)])[5:] == message

    run(test)


def test_one_request_whose_window_is_closed_does_not_stop_another() -> None:
    def test() -> None:
        peer = Peer({http2.INITIAL_WINDOW_SIZE: 4})
        peer.call(b"first")
        peer.call(b"second")
        peer.frames()
        peer.gives(encode_frame(http2.WINDOW_UPDATE, 0, 3, http2.encode_number(100)))
        assert [(frame.stream, frame.flags) for frame in peer.frames()] == [(3, http2.END_STREAM)]

    run(test)


def test_calls_wait_for_room_where_the_server_limits_their_number() -> None:
    def test() -> None:
        peer = Peer({http2.MAX_CONCURRENT_STREAMS: 1})
        peer.call()
        assert not peer.connection.takes_calls
        rooms = peer.rooms
        peer.gives(answer(1))
        assert peer.connection.takes_calls
        assert peer.rooms > rooms

    run(test)


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (headers(1, {":status": "200", "grpc-status": "14", "grpc-message": "50%25 full"}, 5), "UNAVAILABLE: 50% full"),
        (headers(1, {":status": "200", "grpc-status": "99"}, 5), "UNKNOWN: gRPC status 99"),
        (headers(1, {":status": "503"}, 5), "UNAVAILABLE: no status of gRPC; that of HTTP: 503"),
        (answer(1, status="8", text="no\nroom"), "RESOURCE_EXHAUSTED: no room"),
        (encode_frame(http2.DATA, 1, 1, bytes(5)), "UNKNOWN: no status of gRPC; that of HTTP: absent"),
        (encode_frame(http2.RST_STREAM, 0, 1, http2.encode_number(http2.REFUSED_STREAM)), "UNAVAILABLE: the server en"),
        (encode_frame(http2.RST_STREAM, 0, 1, http2.encode_number(2)), "INTERNAL: the server ended the call with HTTP"),
        (encode_frame(http2.DATA, 0, 1, b"\0\xff\0\0\0"), "RESOURCE_EXHAUSTED: an answer of more than 4,194,304"),
        (answer(1).replace(b"\0\0\0\0\x06answer", b"\1\0\0\0\x06answer"), "INTERNAL: an answer of 11 bytes"),
        (answer(1).replace(b"\0\0\0\0\x06answer", b"\0\0\0\0\x07answer"), "INTERNAL: an answer of 11 bytes"),
    ],
)
def test_what_is_no_answer_is_an_error_of_the_call_and_the_connection_goes_on(frames: bytes, error: str) -> None:
    def test() -> None:
        peer = Peer()
        peer.call()
        peer.gives(frames)
        assert peer.only_error().startswith(error)
        peer.call()
        peer.gives(answer(3))
        assert peer.outcomes[1] == b"answer"

    run(test)


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "is this an HTTP/2 server?"),
        (encode_frame(http2.HEADERS, 4, 1, b"\xfe"), "headers that cannot be read"),
        (encode_frame(http2.HEADERS, 0, 1) + encode_frame(http2.PING, 0, 0, bytes(8)), "another frame interrupts"),
        (encode_frame(http2.CONTINUATION, 4, 1), "continue none"),
        (
            encode_frame(http2.HEADERS, 0, 1) + encode_frame(http2.CONTINUATION, 0, 1, bytes(16_000)) * 5,
            "headers of more",
        ),
        (encode_frame(http2.DATA, http2.PADDED, 1, b"\x09five"), "more padding than content"),
        (encode_frame(http2.DATA, http2.PADDED, 1), "more padding than content"),
        (encode_frame(http2.SETTINGS, 0, 0, bytes(5)), "settings of 5 bytes"),
        (http2.encode_settings({http2.INITIAL_WINDOW_SIZE: 2**31}), "a window of"),
        (encode_frame(http2.GOAWAY, 0, 0, b"cut"), "which is cut"),
    ],
)
def test_a_server_that_breaks_the_protocol_loses_the_connection(frames: bytes, error: str) -> None:
    def test() -> None:
        peer = Peer()
        peer.call()
        peer.gives(frames)
        assert error in peer.only_error()
        assert peer.only_error().startswith("UNAVAILABLE")
        assert (peer.wire.aborted, peer.connection.ends, peer.connection.takes_calls) == (True, True, False)

    run(test)


def test_headers_in_pieces_with_padding_and_priority_are_read() -> None:
    def test() -> None:
        peer = Peer()
        peer.call()
        block = Encoder().encode({"grpc-status": "5", "grpc-message": "no model"}.items())
        flags = http2.END_STREAM | http2.PADDED | http2.PRIORITY
        peer.gives(encode_frame(http2.HEADERS, flags, 1, b"\x03" + bytes(5) + block[:4] + bytes(3)))
        assert peer.outcomes == []
        peer.gives(encode_frame(http2.CONTINUATION, http2.END_HEADERS, 1, block[4:]))
        assert peer.only_error() == "NOT_FOUND: no model"

    run(test)


def test_a_server_that_ends_the_connection_answers_what_it_took_and_refuses_the_rest() -> None:
    def test() -> None:
        peer = Peer()
        peer.call()
        peer.call()
        peer.gives(encode_frame(http2.GOAWAY, 0, 0, http2.encode_number(1) + bytes(4)))
        assert peer.only_error() == "UNAVAILABLE: the server ends the connection"
        assert (peer.connection.takes_calls, peer.wire.aborted) == (False, False)
        peer.gives(answer(1))
        assert peer.outcomes[1] == b"answer"
        assert peer.wire.aborted

    run(test)


def test_a_cancelled_call_gets_nothing_more_and_frees_its_place() -> None:
    def test() -> None:
        peer = Peer({http2.MAX_CONCURRENT_STREAMS: 1})
        call = peer.call()
        peer.frames()
        peer.connection.cancel(call)
        peer.connection.cancel(call)
        assert [(frame.kind, frame.content) for frame in peer.frames()] == [(http2.RST_STREAM, b"\0\0\0\x08")]
        peer.gives(answer(1))
        assert peer.outcomes == []
        assert peer.connection.takes_calls

    run(test)


def test_a_call_of_another_connection_is_not_cancelled_here_though_its_stream_has_the_same_number() -> None:
    def test() -> None:
        peer, other = Peer(), Peer()
        peer.call()
        peer.connection.cancel(other.call())
        peer.gives(answer(1))
        assert peer.outcomes == [b"answer"]

    run(test)


def test_pings_are_answered_and_the_connections_window_is_renewed() -> None:
    def test() -> None:
        peer = Peer()
        peer.gives(encode_frame(http2.PING, 0, 0, b"12345678"), encode_frame(http2.PING, http2.ACK, 0, bytes(8)))
        assert peer.frames() == [Frame(http2.PING, http2.ACK, 0, b"12345678")]
        chunk = encode_frame(http2.DATA, 0, 99, bytes(16_000))  # of a call that was cancelled
        for _ in range(MESSAGE_BYTES_MAX // 16_000 + 1):
            peer.gives(chunk)
        (renewed,) = peer.frames()
        assert (renewed.kind, renewed.stream) == (http2.WINDOW_UPDATE, 0)
        assert http2.decode_number(renewed.content) > MESSAGE_BYTES_MAX
        peer.gives(chunk)
        assert peer.frames() == []

    run(test)


def test_calls_fail_when_the_connection_is_lost_and_the_reason_is_named() -> None:
    def test() -> None:
        peer = Peer()
        peer.call()
        peer.connection.connection_lost(ConnectionResetError(104, "Connection reset by peer"))
        assert peer.only_error() == "UNAVAILABLE: [Errno 104] Connection reset by peer"
        assert peer.connection.closed.done()

    run(test)


def test_numbers_of_streams_that_run_out_end_the_connection_after_its_calls() -> None:
    def test() -> None:
        peer = Peer()
        peer.connection._next_stream = http2.STREAM_LAST
        peer.call()
        assert not peer.connection.takes_calls
        peer.gives(answer(http2.STREAM_LAST))
        assert peer.outcomes == [b"answer"]
        assert peer.wire.aborted

    run(test)


@given(frames=st.binary(max_size=200))
def test_whatever_a_server_sends_a_call_ends_at_most_once_and_nothing_is_raised(frames: bytes) -> None:
    def test() -> None:
        peer = Peer()
        peer.call()
        peer.gives(frames, answer(1))
        peer.connection.connection_lost(None)
        assert len(peer.outcomes) == 1

    run(test)


def test_equal_header_blocks_are_equal_headers_since_no_table_is_used() -> None:
    remembered = Encoder()
    remembered.encode([("grpc-status", "0")])
    with pytest.raises(Http2Error, match="headers that cannot be read"):
        http2.decode_headers(remembered.encode([("grpc-status", "0")]))
