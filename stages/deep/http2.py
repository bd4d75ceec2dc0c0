"""HTTP/2 as far as calls with one request and one answer need it: frames, settings and header blocks; no sockets.

Source: RFC 9113 (HTTP/2), RFC 7541 (compression of headers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple

from hpack import Decoder, Encoder, HPACKError, NeverIndexedHeaderTuple

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
SETTINGS: Final = 4
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

# Flags. ACK belongs to SETTINGS and PING, the others to DATA and HEADERS.
ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4

# Error codes.
REFUSED_STREAM: Final = 0x7
CANCEL: Final = 0x8

# What holds until the other side's settings say otherwise.
WINDOW_BYTES: Final = 65_535
# Every receiver takes frames of this size; this client neither sends nor takes larger ones.
FRAME_BYTES_MAX: Final = 16_384
WINDOW_BYTES_MAX: Final = 2**31 - 1
STREAM_LAST: Final = 2**31 - 1

_HEAD: Final = struct.Struct(">HBBBI")
_SETTING: Final = struct.Struct(">HI")


class Http2Error(Exception):
    """The other side does not speak HTTP/2 as RFC 9113 describes it. The connection cannot be used any more."""


class Frame(NamedTuple):
    """A frame: its type, flags, stream (0: the connection) and content."""

    kind: int
    flags: int
    stream: int
    content: bytes


def encode_frame(kind: int, flags: int, stream: int, content: bytes | memoryview = b"") -> bytes:
    """The bytes of a frame.

    >>> encode_frame(PING, ACK, 0, bytes(8)).hex()
    '0000080601000000000000000000000000'
    """
    size = len(content)
    return _HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream) + content


def take_frames(received: bytearray) -> Iterator[Frame]:
    """The complete frames at the beginning of `received`, from which they are removed when all were taken.

    Raises Http2Error for a frame that is larger than a server may send.
    """
    start, end = 0, len(received)
    while end - start >= _HEAD.size:
        high, low, kind, flags, stream = _HEAD.unpack_from(received, start)
        size = high << 8 | low
        if size > FRAME_BYTES_MAX:
            raise Http2Error(f"a frame of {size:,} bytes, more than {FRAME_BYTES_MAX:,}; is this an HTTP/2 server?")
        stop = start + _HEAD.size + size
        if stop > end:
            break
        yield Frame(kind, flags, stream & STREAM_LAST, bytes(received[start + _HEAD.size : stop]))
        start = stop
    del received[:start]


def unpadded(frame: Frame) -> bytes:
    """The content of a DATA or HEADERS frame without padding and priority. Raises Http2Error if it has no such parts.

    >>> unpadded(Frame(DATA, PADDED, 1, bytes([2]) + b"answer" + bytes(2)))
    b'answer'
    """
    content, padding = frame.content, 0
    if frame.flags & PADDED:
        padding, content = (content[0] if content else 1), content[1:]
    if frame.kind == HEADERS and frame.flags & PRIORITY:
        content = content[5:]
    if padding > len(content):
        raise Http2Error("a frame with more padding than content")
    return content[: len(content) - padding]


def encode_settings(settings: Mapping[int, int]) -> bytes:
    """A SETTINGS frame."""
    return encode_frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings.items()))


def decode_settings(content: bytes) -> list[tuple[int, int]]:
    """The settings of a SETTINGS frame, in their order. Raises Http2Error if they are cut."""
    if len(content) % _SETTING.size:
        raise Http2Error(f"settings of {len(content)} bytes")
    return list(_SETTING.iter_unpack(content))


def encode_number(value: int) -> bytes:
    """The content of RST_STREAM and WINDOW_UPDATE."""
    return struct.pack(">I", value)


def decode_number(content: bytes | bytearray, position: int = 0) -> int:
    """A number of four bytes of RST_STREAM, WINDOW_UPDATE or GOAWAY. Raises Http2Error if it is cut."""
    if len(content) < 4 * (position + 1):
        raise Http2Error(f"a frame of {len(content)} bytes, which is cut")
    value: int = struct.unpack_from(">I", content, 4 * position)[0]
    return value


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """A header block that no table remembers, so that it may be sent any number of times."""
    return Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in headers.items()])


@lru_cache(maxsize=128)
def decode_headers(block: bytes) -> Mapping[str, str]:
    """The headers of a block that refers to no table but the static one. Raises Http2Error if it cannot be read.

    This client's settings give the server no table. So equal blocks have equal headers, and answers repeat them.
    """
    decoder = Decoder()
    decoder.max_allowed_table_size = 0
    decoder.header_table_size = 0
    try:
        return MappingProxyType({str(name): str(value) for name, value in decoder.decode(block)})
    except (HPACKError, UnicodeDecodeError) as error:
        raise Http2Error(f"headers that cannot be read ({error})") from error
