"""Keyed hashes of cards: the same everywhere with one key, unlike with another, and the key is shown nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cascade.columns import ColumnBatch
from cascade.config import PrivacySettings
from cascade.errors import SettingError
from streaming.pipeline.privacy import CardHasher

KEY = "correct horse battery staple"
STRINGS = np.array([b"4711", b"4712", b"4711", b""], "S8")
NUMBERS = np.array([4711, 4712, 4711, -1, 2**62])


def test_a_card_is_one_code_and_two_cards_are_two() -> None:
    for column in (STRINGS, NUMBERS, STRINGS[:0], NUMBERS[:0]):
        codes = CardHasher(KEY.encode()).hash_column(column)
        assert (codes.dtype, len(codes)) == (np.dtype(np.int64), len(column))
        assert len(set(codes.tolist())) == len(set(column.tolist()))
        assert len(column) == 0 or codes[0] == codes[2]


def test_a_number_and_its_text_are_one_card() -> None:
    hasher = CardHasher(KEY.encode())
    assert hasher.hash_column(NUMBERS[:3]).tolist() == hasher.hash_column(STRINGS[:3]).tolist()


def test_another_process_gives_the_same_codes() -> None:
    program = (
        "import numpy as np; from streaming.pipeline.privacy import CardHasher; h = CardHasher(b'%s')\n"
        "print(h.hash_column(np.array([4711, -1])).tolist(), h.hash_column(np.array([b'4711'], 'S32')).tolist())"
    ).replace("%s", KEY)
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    hasher = CardHasher(KEY.encode())
    assert done.stdout.split("\n")[0] == f"{hasher.hash_column(NUMBERS[[0, 3]]).tolist()} " + str(
        hasher.hash_column(STRINGS[:1]).tolist()
    )


def test_another_key_gives_other_codes() -> None:
    """Some keys are longer than the hash takes, and differ in their last byte only."""
    keys = (KEY, KEY[:-1], KEY + "x", KEY * 3, KEY * 3 + "x", "k" * 200 + "1", "k" * 200 + "2")
    for column in (STRINGS, NUMBERS):
        codes = [CardHasher(key.encode()).hash_column(column) for key in keys]
        assert not any((first == second).any() for first, second in combinations(codes, 2))


def test_only_the_card_is_replaced() -> None:
    batch = ColumnBatch({"card": STRINGS, "amount": np.arange(4.0)}, 4)
    hashed = CardHasher(KEY.encode()).hashed(batch, "card")
    assert (hashed.rows, list(hashed.columns)) == (4, ["card", "amount"])
    assert hashed["amount"] is batch["amount"]
    assert hashed["card"].dtype == np.int64
    assert batch["card"] is STRINGS


def test_texts_are_sixteen_digits_that_name_the_code() -> None:
    codes = np.array([0, 1, -1, 2**62, -(2**63)])
    texts = CardHasher.text(codes)
    assert [len(text) for text in texts] == [16] * 5
    assert [int(text, 16) for text in texts] == [code % 2**64 for code in codes.tolist()]


def test_the_key_comes_from_the_environment_or_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    expected = CardHasher(KEY.encode()).hash_column(NUMBERS).tolist()
    for settings in (PrivacySettings(True, key_env="CARD_KEY"), PrivacySettings(True, key_file=str(file))):
        hasher = CardHasher.from_settings(settings, {"CARD_KEY": KEY})
        assert hasher is not None
        assert hasher.hash_column(NUMBERS).tolist() == expected
        assert KEY not in repr(hasher) + str(hasher) + repr(settings)


def test_without_hash_card_no_key_is_needed() -> None:
    assert CardHasher.from_settings(PrivacySettings(), {}) is None
    assert CardHasher.from_settings(PrivacySettings(key_env="UNSET"), {}) is None


@pytest.mark.parametrize(("changes", "parts"), [
    ({}, ["privacy.key_env", "exactly one source", "set either key_env or key_file"]),
    ({"key_env": "CARD_KEY", "key_file": "/key"}, ["privacy.key_env", "exactly one source"]),
    ({"key_env": "UNSET"}, ["privacy.key_env", "not set"]),
    ({"key_env": "SHORT"}, ["privacy.key_env", "fewer than 16 characters", "openssl rand -hex 32"]),
    ({"key_env": KEY}, ["privacy.key_env", "not the name of an environment variable"]),
    ({"key_file": "/nowhere/key"}, ["privacy.key_file", "cannot be read"]),
])  # fmt: skip
def test_a_key_that_cannot_be_used_is_one_line_that_does_not_show_it(changes: dict[str, str], parts: list[str]) -> None:
    settings = msgspec.structs.replace(PrivacySettings(hash_card=True), **changes)
    with pytest.raises(SettingError) as caught:
        CardHasher.from_settings(settings, {"CARD_KEY": KEY, "SHORT": "fifteen letters"})
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in parts)
    assert KEY not in line
    assert "fifteen letters" not in line
