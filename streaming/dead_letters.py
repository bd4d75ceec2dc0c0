"""The dead letter: a message that could not be read, its bytes untouched, with where it came from and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streaming.codecs.protocol import Reject

DETAIL_BYTES_MAX = 256
# what the headers of a dead letter add to a message at most: topics that carry them allow messages this much larger
OVERHEAD_BYTES_MAX = 2_048
HEADER_PREFIX = "cascade-"

Headers = Sequence[tuple[str, bytes | None]]


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
    """The dead letter of a rejected record; `time_ms` is the time of rejection, ms since the epoch.

    The record's own headers come first and stay as they were, except those that bear our prefix: a letter that was
    played back and rejected again tells only of the last rejection.
    """
    own = {
        "reason": reject.reason.value,
        "detail": reject.detail,
        "topic": topic,
        "partition": str(partition),
        "offset": str(offset),
        "time-ms": str(time_ms),
    }
    kept: list[tuple[str, bytes | None]] = [pair for pair in headers if not pair[0].startswith(HEADER_PREFIX)]
    kept.extend((HEADER_PREFIX + name, _bounded(text)) for name, text in own.items())
    return DeadLetter(key, value, kept)


def _bounded(text: str) -> bytes:
    octets = text.encode(errors="replace")
    # the cut may split a character: drop what is left of it
    return octets if len(octets) <= DETAIL_BYTES_MAX else octets[:DETAIL_BYTES_MAX].decode(errors="ignore").encode()
