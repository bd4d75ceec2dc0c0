"""Feature declarations: which features a bundle computes, from which fields, keys and windows.

A feature file is TOML. Keys and fields are named by role (`card`, `terminal`, `amount`) or by field name:

    version = 2
    lateness = "1h"

    [limits]
    keys_max = 1_000_000
    events_per_key_max = 256

    [[transaction]]                      # from the transaction alone
    functions = ["value", "hour", "night", "weekend"]
    field = "amount"

    [[window]]                           # exact sliding windows over a key
    key = "card"
    field = "amount"
    windows = ["1d", "7d", "30d"]
    functions = ["count", "mean"]

    [[label_window]]                     # frauds of a key, which count label.delay later
    key = "terminal"
    windows = ["7d"]
    functions = ["fraud_rate"]

    [[sequence]]                         # the card's last transactions, for the deep model
    key = "card"
    length = 16
    fields = ["amount", "terminal_fraud_rate_7d"]
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec

from cascade.errors import SettingError
from cascade.features.layout import DAY_MS as DAY_MS  # noqa: PLC0414 (others import it from here)
from cascade.setting_files import read_setting_file

TransactionFunction = Literal["value", "hour", "weekday", "night", "weekend", "one_hot", "category", "bucket"]
WindowFunction = Literal[
    "count",
    "sum",
    "mean",
    "max",
    "std",
    "ratio_to_mean",
    "ratio_to_last",
    "rises",
    "changes",
    "distinct",
    "seen",
    "same_as_last",
    "seconds_since_first",
    "seconds_since_last",
]
LabelFunction = Literal["count", "fraud_count", "fraud_rate"]
SPEC_VERSION = 2
# A late row reads each event of its key, so this limit also bounds the time of a row.
EVENTS_PER_KEY_LIMIT = 65_536
SEQUENCE_LENGTH_MAX = 256


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of the state of each key field.

    `keys_max`: keys in the state; beyond it, the least recently used key is forgotten.
    `events_per_key_max`: events of a key; beyond it, the oldest is forgotten.
    `events_per_key_mean`: `keys_max` times this is the size of the pool of events.
    """

    keys_max: int = 1_000_000
    events_per_key_max: int = 256
    events_per_key_mean: int = 32


class TransactionFeatures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Features of the transaction alone: `hour`, `weekday`, `night` and `weekend` read the event time (UTC).

    The others read `field`. `bucket` is one of `buckets` numbers, by a hash of the field.
    """

    functions: tuple[TransactionFunction, ...]
    field: str = "amount"
    buckets: int = 0


class WindowFeatures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Aggregates of `field` over sliding windows (t − window, t] of a key, the current transaction included.

    `ratio_to_mean` divides the current value by the mean of the earlier ones in the window (1 where there are none),
    `ratio_to_last` by that of the row before. `rises` counts the rows whose value exceeds that of the row before,
    `changes` those that have another value of `distinct_field` than the row before. `distinct` counts the values of
    `distinct_field`; `seen` is whether an earlier row in the window has the row's own, `seconds_since_first` how long
    ago the first such row was, `same_as_last` whether the row before has it. `ratio_to_last`, `same_as_last` and
    `seconds_since_last` have no window; `seconds_since_first` and the last two are −1 where there is no such row.
    """

    key: str
    functions: tuple[WindowFunction, ...]
    windows: tuple[str, ...] = ()
    field: str = "amount"
    distinct_field: str = "terminal"


class LabelFeatures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Frauds and transactions of a key over (t − delay − window, t − delay]; delay is the schema's `label.delay`."""

    key: Literal["card", "terminal"]
    windows: tuple[str, ...]
    functions: tuple[LabelFunction, ...]


class Sequence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last `length` transactions of a key, the current one last, with the features named in `fields`.

    The deep model's input is named after the key as it is written here: `card_sequence`.
    """

    key: str
    length: int
    fields: tuple[str, ...]


class FeatureSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A feature file. Windows are exact for events that are up to `lateness` late. There is at least one sequence."""

    version: int
    sequence: tuple[Sequence, ...]
    lateness: str = "1h"
    limits: Limits = Limits()
    transaction: tuple[TransactionFeatures, ...] = ()
    window: tuple[WindowFeatures, ...] = ()
    label_window: tuple[LabelFeatures, ...] = ()

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the content; the layout of the file has no effect."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def load_spec(path: Path) -> FeatureSpec:
    """Read and check a feature file; raises SettingError."""
    return parse_spec(read_setting_file(path), str(path))


def parse_spec(content: bytes, origin: str) -> FeatureSpec:
    """Read a feature file's TOML; `origin` is its name in messages. Raises SettingError."""
    try:
        _check_version(msgspec.toml.decode(content), origin)
        spec = msgspec.toml.decode(content, type=FeatureSpec)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SettingError(origin, "features", None, str(error), "see docs/features.md for the form") from error
    limits = spec.limits
    bounds = {
        "keys_max": (limits.keys_max, 1, 100_000_000),
        "events_per_key_max": (limits.events_per_key_max, 1, EVENTS_PER_KEY_LIMIT),
        "events_per_key_mean": (limits.events_per_key_mean, 1, limits.events_per_key_max),
    }
    for key, (value, low, high) in bounds.items():
        if not low <= value <= high:
            raise SettingError(origin, f"limits.{key}", value, "out of range", f"use {low} to {high}")
    if not spec.sequence:
        raise SettingError(origin, "sequence", None, "is empty", "declare at least one [[sequence]]")
    longest = min(SEQUENCE_LENGTH_MAX, limits.events_per_key_max)
    for position, sequence in enumerate(spec.sequence):
        if not 1 <= sequence.length <= longest:
            remedy = f"use 1 to {longest} (at most {SEQUENCE_LENGTH_MAX}, and limits.events_per_key_max)"
            raise SettingError(origin, f"sequence[{position}].length", sequence.length, "out of range", remedy)
    return spec


def _check_version(content: dict[str, object], origin: str) -> None:
    """Raise SettingError, with what to write, unless a feature file's TOML is of this release's version."""
    version = content.get("version")
    if version == 1:
        remedy = f"set version = {SPEC_VERSION}, and write [[sequence]] in place of [sequence]"
        raise SettingError(origin, "version", version, "is of an earlier release", remedy)
    if version != SPEC_VERSION:
        raise SettingError(origin, "version", version, "is not known to this release", f"use {SPEC_VERSION}")
    if isinstance(content.get("sequence"), dict):
        raise SettingError(origin, "sequence", None, "is a single table", "write [[sequence]] in place of [sequence]")
