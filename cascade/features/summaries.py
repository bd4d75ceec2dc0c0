"""Summaries that workers share with each other, and their records.

A record has a key and a value of fixed size, with little-endian numbers:

    key     uint16 field, int64 code, uint16 partition id, int64 start of the stretch of event time in ms   (20 bytes)
    value   uint8 version, int64 rows, int64 time of the newest row in ms,
            then float64 sums, squares, maxima, each for all value fields               (17 + 24 × value fields bytes)

A topic that is compacted by key retains the last record of each. The reader counts and skips records that it cannot
read, so that a worker can follow the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cascade.columns import Array, Float64, Int64

VERSION = 1
# More rows than a stretch of time can have. A record with a larger count is no summary.
COUNT_MAX = 1 << 40

_KEY = np.dtype([("field", "<u2"), ("code", "<i8"), ("partition_id", "<u2"), ("start", "<i8")])


@dataclass(frozen=True, slots=True)
class Summaries:
    """n totals of rows of one key field, each of a key, a partition and a stretch of event time.

    `codes` int64 [n]: codes of the keys (`cascade.schema.key_codes`).
    `partition_ids` int64 [n].
    `starts` int64 [n]: start of the stretch in ms.
    `counts` int64 [n]: number of rows; 0 removes an earlier summary.
    `newest` int64 [n]: time of the newest row in ms.
    `sums`, `squares`, `maxima` float64 [n, value fields]: sum, sum of squared differences to the mean, largest value.
    """

    codes: Int64
    partition_ids: Int64
    starts: Int64
    counts: Int64
    newest: Int64
    sums: Float64
    squares: Float64
    maxima: Float64

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All fields, in their order."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def take(self, index: Array) -> Summaries:
        """Return the summaries that `index` (positions or a mask) selects, in its order."""
        return Summaries(*(array[index] for array in self.arrays))


def encode(field: int, summaries: Summaries) -> tuple[list[bytes], list[bytes]]:
    """Return keys and values of records; `field` is the position of the key field in `FeatureEngine.shared_keys`.

    >>> summaries = Summaries(*(np.array([n]) for n in (7, 2, 3_600_000, 4, 3_700_000)), *(np.ones((1, 1)),) * 3)
    >>> keys, values = encode(0, summaries)
    >>> len(keys[0]), len(values[0])
    (20, 41)
    >>> found, rejected = decode(keys, values, [1])
    >>> found[0].counts.tolist(), rejected
    ([4], 0)
    """
    keys = np.zeros(len(summaries), _KEY)
    keys["field"], keys["code"] = field, summaries.codes
    keys["partition_id"], keys["start"] = summaries.partition_ids, summaries.starts
    values = np.zeros(len(summaries), _value_type(summaries.sums.shape[1]))
    values["version"] = VERSION
    for name in ("counts", "newest", "sums", "squares", "maxima"):
        values[name] = getattr(summaries, name)
    return _cut(keys), _cut(values)


def decode(
    keys: Sequence[bytes | None], values: Sequence[bytes | None], value_counts: Sequence[int]
) -> tuple[list[Summaries], int]:
    """Return the summaries by key field, in the order of the records, and the number of rejected records.

    `value_counts`: number of value fields of each key field (`FeatureEngine.shared_values`). A record is rejected where
    its size, version or field differs, a number is not finite, or its numbers contradict each other. Never raises.
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
        arrays: list[Array] = [key[name].astype(np.int64) for name in ("code", "partition_id", "start")]
        arrays += [value[name].astype(np.int64) for name in ("counts", "newest")]
        arrays += [value[name].astype(np.float64) for name in ("sums", "squares", "maxima")]
        summaries = Summaries(*arrays)
        found.append(summaries.take(_is_valid(summaries) & (value["version"] == VERSION)))
    return found, len(keys) - sum(map(len, found))


def _value_type(values: int) -> np.dtype[np.void]:
    floats = [(name, "<f8", (values,)) for name in ("sums", "squares", "maxima")]
    return np.dtype([("version", "u1"), ("counts", "<i8"), ("newest", "<i8"), *floats])


def _cut(records: Array) -> list[bytes]:
    octets, size = records.tobytes(), records.dtype.itemsize
    return [octets[start : start + size] for start in range(0, len(octets), size)]


def _field(key: bytes | None) -> int:
    """Return the position of the record's key field, −1 where the key has another size."""
    return -1 if key is None or len(key) != _KEY.itemsize else int.from_bytes(key[:2], "little")


def _is_valid(summaries: Summaries) -> Array:
    counts, squares = summaries.counts, summaries.squares
    floats = np.concatenate([summaries.sums, squares, summaries.maxima], axis=1)
    in_range = (counts >= 0) & (counts <= COUNT_MAX) & ((counts == 0) | (summaries.newest >= summaries.starts))
    valid: Array = in_range & np.isfinite(floats).all(axis=1) & (squares >= 0).all(axis=1)
    return valid
