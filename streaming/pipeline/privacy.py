"""Replaces card ids by keyed hashes directly after decoding.

There are so few card numbers that a plain hash can be inverted by trying all of them; a keyed hash cannot, as long as
the key is secret. The same key gives the same codes in every worker and at every start; state, message keys and
partitions depend on them. With another key all cards are new, so the key and the state must be changed together.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import numpy as np

from cascade.columns import Array, ColumnBatch, Int64
from cascade.config import PrivacySettings
from streaming.pipeline.codes import KEY_BYTES_MAX, digest_codes


class CardHasher:
    """Computes keyed 64-bit codes of card ids (BLAKE2b, RFC 7693); never shows its key.

    >>> CardHasher(b"a secret of some length").hash_column(np.array([4711, 4711]))
    array([5164799920882700994, 5164799920882700994])
    """

    def __init__(self, key: bytes) -> None:
        self._key = key if len(key) <= KEY_BYTES_MAX else hashlib.blake2b(key).digest()

    def __repr__(self) -> str:
        return "CardHasher(key not shown)"

    @classmethod
    def from_settings(cls, settings: PrivacySettings, environment: Mapping[str, str] = os.environ) -> CardHasher | None:
        """Makes the hasher of `[privacy]`, None if it is not configured; raises SettingError.

        Reads the key here, so that no configuration object contains it.
        """
        key = settings.key(environment)
        return None if key is None else cls(key.encode(errors="surrogateescape"))

    def hash_column(self, column: Array) -> Int64:
        """Returns codes (int64, [rows]) of card ids (int64 or S[n], [rows]); an integer is hashed as decimal text.

        So an id has the same code as a message key, which is a text.
        """
        texts = column.tolist() if column.dtype.kind == "S" else [b"%d" % card for card in column.tolist()]
        return digest_codes(texts, self._key)

    def hashed(self, batch: ColumnBatch, card_field: str) -> ColumnBatch:
        """Returns the batch with codes in place of card ids; other columns are shared."""
        return ColumnBatch({**batch.columns, card_field: self.hash_column(batch[card_field])}, batch.rows)

    @staticmethod
    def text(codes: Int64) -> list[bytes]:
        """Returns codes as 16 hexadecimal digits, for message keys and logs."""
        return [b"%016x" % code for code in codes.view(np.uint64).tolist()]
