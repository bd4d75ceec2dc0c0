"""64-bit codes of texts that resist deliberate collisions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from cascade.columns import Int64

_CODE_BYTES = 8
KEY_BYTES_MAX = hashlib.blake2b.MAX_KEY_SIZE


def digest_codes(values: Iterable[bytes], key: bytes = b"") -> Int64:
    """Returns BLAKE2b codes (int64, [values]), equal on every machine; `key`: at most KEY_BYTES_MAX.

    Without a key, 2^32 hashes give two texts with the same code, but not a second text for a given code; with a secret
    key, neither. Source: Aumasson, Saarinen, RFC 7693.
    """
    started = hashlib.blake2b(digest_size=_CODE_BYTES, key=key)

    def code(value: bytes) -> bytes:
        # a copy is cheaper than a new hasher, above all with a key
        hasher = started.copy()
        hasher.update(value)
        return hasher.digest()

    return np.frombuffer(b"".join(map(code, values)), "<i8").astype(np.int64)
