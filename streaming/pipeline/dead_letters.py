"""Dead letters: unreadable messages with unchanged bytes, their origin and the reason in headers."""

from __future__ import annotations

from dataclasses import dataclass

from streaming.codecs.protocol import Reject
from streaming.kafka.protocol import Headers

DETAIL_BYTES_MAX = 256
# The most that the headers add to a message; the dead-letter topic allows messages this much larger.
OVERHEAD_BYTES_MAX = 2_048
HEADER_PREFIX = "cascade-"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record for the dead-letter topic."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]]


def dead_letter(
    reject: Reject,
    *,
    topic: str,
    partition: int,
    offset: int,
    time_ms: int,
    key: bytes | None,
    value: bytes | None,
    headers: Headers = (),
) -> DeadLetter:
    """Makes the dead letter of a rejected record.

    reject: index, reason and detail. topic, partition, offset: of the record. time_ms: of the rejection, ms since the
    epoch. key, value, headers: of the record; its headers come first and unchanged, without those of an earlier
    rejection (prefix `cascade-`).
    """
    own = {
        "reason": reject.reason.value,
        "detail": reject.detail,
        "topic": topic,
        "partition": str(partition),
        "offset": str(offset),
        "time-ms": str(time_ms),
    }
    all_headers: list[tuple[str, bytes | None]] = [pair for pair in headers if not pair[0].startswith(HEADER_PREFIX)]
    all_headers.extend((HEADER_PREFIX + name, _bounded(text)) for name, text in own.items())
    return DeadLetter(key, value, all_headers)


def _bounded(text: str) -> bytes:
    octets = text.encode(errors="replace")
    # the cut may split a character, whose rest is dropped
    return octets if len(octets) <= DETAIL_BYTES_MAX else octets[:DETAIL_BYTES_MAX].decode(errors="ignore").encode()
