"""The partition of a key, as Kafka's default partitioner chooses it."""

from __future__ import annotations

from kafka.partitioner import murmur2

_POSITIVE = 0x7FFFFFFF


def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a record with this key in a topic of `partitions`.

    >>> partition_of(b"17", 4) == partition_of(b"17", 4) < 4
    True
    """
    number: int = (murmur2(key) & _POSITIVE) % partitions
    return number
