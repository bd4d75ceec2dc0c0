"""Summaries of key fields that workers tell each other, and their form on the wire.

A record is a key and a value, both of a fixed size, numbers little-endian:

    key     uint16 field, int64 code, uint16 source, int64 start of the stretch of event time in ms   (20 bytes)
    value   uint8 version, int64 rows, int64 time of the newest row in ms,
            then float64 sums, squares, maxima, one of each a value field                       (17 + 24 values bytes)

A topic that is compacted by key keeps the last word on each. What cannot be read is counted and passed over, since one
bad record must not keep a worker from following the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, Float64, Int64

VERSION = 1
# More rows than a stretch of time can hold; what says so is no summary.
COUNT_MAX = 1 << 40

_KEY = np.dtype([("field", "<u2"), ("code", "<i8"), ("source", "<u2"), ("start", "<i8")])


@dataclass(frozen=True, slots=True)
class Summaries:
    """Totals of rows of one key field, one a key, source and stretch of event time; n of them.

    `codes` int64 [n]: codes of the keys (`cascade.schema.key_codes`). `sources` int64 [n]. `starts` int64 [n]: where
    the stretch begins, in ms. `counts` int64 [n]: rows; 0 takes back what was told before. `newest` int64 [n]: time of
    the newest row in ms. `sums`, `squares`, `maxima` float64 [n, values]: by value field the sum, the sum of squared
    differences to the mean, the largest.
    """

    codes: Int64
    sources: Int64
    starts: Int64
    counts: Int64
    newest: Int64
    sums: Float64
    squares: Float64
    maxima: Float64

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, index: Array) -> Summaries:
        """Those that `index` (positions or a mask) selects, in its order."""
        return Summaries(*(getattr(self, name)[index] for name in self.__slots__))


def encode(field: int, summaries: Summaries) -> tuple[list[bytes], list[bytes]]:
    """Keys and values of records; `field` is the position of the key field in `FeatureEngine.shared_keys`.

    >>> one = Summaries(*(np.array([n]) for n in (7, 2, 3_600_000, 4, 3_700_000)), *(np.ones((1, 1)),) * 3)
    >>> keys, values = encode(0, one)
    >>> len(keys[0]), len(values[0])
    (20, 41)
    >>> found, rejected = decode(keys, values, [1])
    >>> found[0].counts.tolist(), rejected
    ([4], 0)
    """
    keys = np.zeros(len(summaries), _KEY)
    keys["field"], keys["code"] = field, summaries.codes
    keys["source"], keys["start"] = summaries.sources, summaries.starts
    values = np.zeros(len(summaries), _value_type(summaries.sums.shape[1]))
    values["version"] = VERSION
    for name in ("counts", "newest", "sums", "squares", "maxima"):
        values[name] = getattr(summaries, name)
    return _cut(keys), _cut(values)


def decode(
    keys: Sequence[bytes | None], values: Sequence[bytes | None], value_counts: Sequence[int]
) -> tuple[list[Summaries], int]:
    """Summaries by key field, each in the order of the records, and how many records could not be read.

    `value_counts`: value fields of each key field (`FeatureEngine.shared_values`). A record is rejected where its size,
    version or field is another, a number is not finite, or numbers do not fit each other. Never raises.
    """
    fields = [_field(key) for key in keys]
    found: list[Summaries] = []
    for field, count in enumerate(value_counts):
        kind = _value_type(count)
        size = kind.itemsize
        chosen = [
            (key, value)
            for key, value, its_field in zip(keys, values, fields, strict=True)
            if its_field == field and key is not None and value is not None and len(value) == size
        ]
        key = np.frombuffer(b"".join(key for key, _ in chosen), _KEY)
        value = np.frombuffer(b"".join(value for _, value in chosen), kind)
        one = Summaries(
            key["code"].astype(np.int64),
            key["source"].astype(np.int64),
            key["start"].astype(np.int64),
            value["counts"].astype(np.int64),
            value["newest"].astype(np.int64),
            value["sums"].astype(np.float64),
            value["squares"].astype(np.float64),
            value["maxima"].astype(np.float64),
        )
        found.append(one.take(_good(one) & (value["version"] == VERSION)))
    return found, len(keys) - sum(map(len, found))


def _value_type(values: int) -> np.dtype[np.void]:
    floats = [(name, "<f8", (values,)) for name in ("sums", "squares", "maxima")]
    return np.dtype([("version", "u1"), ("counts", "<i8"), ("newest", "<i8"), *floats])


def _cut(records: Array) -> list[bytes]:
    octets, size = records.tobytes(), records.dtype.itemsize
    return [octets[start : start + size] for start in range(0, len(octets), size)]


def _field(key: bytes | None) -> int:
    """Position of the record's key field, −1 where the key is of another size."""
    return -1 if key is None or len(key) != _KEY.itemsize else int.from_bytes(key[:2], "little")


def _good(one: Summaries) -> Array:
    floats = np.concatenate([one.sums, one.squares, one.maxima], axis=1)
    in_range = (one.counts >= 0) & (one.counts <= COUNT_MAX) & ((one.counts == 0) | (one.newest >= one.starts))
    good: Array = in_range & np.isfinite(floats).all(axis=1) & (one.squares >= 0).all(axis=1)
    return good
