"""Card ids as keyed hashes: what leaves the decoder names no card, and nobody without the key can tell whose it is.

A card number has so few possible values that a plain hash of it is undone by trying them all; a keyed one is not, as
long as the key is secret. The same key gives the same codes in every worker and at every start: state, message keys
and partitions follow them. Another key is other cards to all that comes after, so a key is changed together with the
state.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import numpy as np

from cascade.columns import Array, ColumnBatch, Int64
from cascade.config import PrivacySettings
from streaming.codes import KEY_BYTES_MAX, digest_codes


class CardHasher:
    """Keyed 64-bit codes of card ids (BLAKE2b, RFC 7693); its key is never shown.

    >>> CardHasher(b"a secret of some length").hash_column(np.array([4711, 4711]))
    array([5164799920882700994, 5164799920882700994])
    """

    def __init__(self, key: bytes) -> None:
        self._key = key if len(key) <= KEY_BYTES_MAX else hashlib.blake2b(key).digest()

    def __repr__(self) -> str:
        return "CardHasher(key not shown)"

    @classmethod
    def from_settings(cls, settings: PrivacySettings, environment: Mapping[str, str] = os.environ) -> CardHasher | None:
        """The hasher that `[privacy]` asks for, None where it asks for none; raises SettingError, as the loader does.

        Reads the key now, so that it stands in no configuration that could be printed.
        """
        key = settings.key(environment)
        return None if key is None else cls(key.encode(errors="surrogateescape"))

    def hash_column(self, column: Array) -> Int64:
        """Codes int64 [rows] of card ids int64 or S[n] [rows]; an integer counts as its decimal text.

        So the id as text, which is what the messages' keys are, has the same code.
        """
        texts = column.tolist() if column.dtype.kind == "S" else [b"%d" % card for card in column.tolist()]
        return digest_codes(texts, self._key)

    def hashed(self, batch: ColumnBatch, card_field: str) -> ColumnBatch:
        """The batch with codes in place of its card ids; other columns are shared."""
        return ColumnBatch({**batch.columns, card_field: self.hash_column(batch[card_field])}, batch.rows)

    @staticmethod
    def text(codes: Int64) -> list[bytes]:
        """Codes as 16 hexadecimal digits: message keys, and what logs may show."""
        return [b"%016x" % code for code in codes.view(np.uint64).tolist()]
