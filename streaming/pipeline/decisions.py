"""The decision record: the message about a transaction on the `decisions` topic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import msgspec
import numpy as np

from cascade.columns import Array, Float64, Int64
from cascade.config import CodecName
from cascade.policy import ACTIONS
from streaming.pipeline.decision_kernels import TOKEN, Words, write_rows

Verdict = Literal["approve", "review", "decline"]
Stage = Literal["screener", "deep"]
STAGES: tuple[Stage, ...] = ("screener", "deep")
CAUSES = ("", "deadline", "breaker-open", "queue-full", "error")
# JSON gives latencies to the microsecond.
LATENCY_DECIMALS = 3
LATENCY_MS_MAX = 1e12


class LatencyMs(msgspec.Struct, frozen=True, gc=False):
    """How a transaction's latency is made up, in ms.

    `queue`: from the start of the deadline to the start of the micro-batch. `features`, `screener`: these stages of the
    micro-batch. `deep`: the deep call, up to its answer or its end; 0 without a call. `total`: from the start of the
    deadline to the decision.
    """

    queue: float
    features: float
    screener: float
    deep: float
    total: float


class Decision(msgspec.Struct, frozen=True, gc=False):
    """A decision.

    `score`: the calibrated probability of fraud by the stage that decided; `screener_score`: by the screener. `bundle`:
    the version that decided. `degraded`: the transaction was escalated, but the screener decided it, because of
    `degraded_cause`. `decision_id`: the same on every retry, see `decision_ids`. `duplicate`: the transaction was
    decided before, as `first_decision_id`; it has that decision again. Times are ms since the epoch.
    """

    transaction_id: int | str
    decision: Verdict
    score: float
    stage: Stage
    screener_score: float
    bundle: str
    degraded: bool
    degraded_cause: str | None
    decision_id: str
    duplicate: bool
    first_decision_id: str | None
    event_time_ms: int
    decision_time_ms: int
    latency_ms: LatencyMs


@dataclass(frozen=True, slots=True)
class DecisionColumns:
    """Decisions of transactions of one partition, a row each.

    `transaction_ids`: int64 or S[n]. `actions`, `stages`, `causes`: uint8, indexes into `cascade.policy.ACTIONS`,
    STAGES and CAUSES. `first_offsets`: int64, the offset of a duplicate's first occurrence, else -1. Times: int64, ms
    since the epoch. Latencies: float64, ms, see LatencyMs.
    """

    topic: str
    partition: int
    bundles: Sequence[str]
    offsets: Int64
    first_offsets: Int64
    transaction_ids: Array
    actions: Array
    stages: Array
    scores: Float64
    screener_scores: Float64
    causes: Array
    event_times_ms: Int64
    decision_times_ms: Int64
    queue_ms: Float64
    features_ms: Float64
    screener_ms: Float64
    deep_ms: Float64
    total_ms: Float64


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How transactions were decided, a row each.

    `actions`, `stages`, `causes` uint8: indexes into `cascade.policy.ACTIONS`, STAGES and CAUSES. `scores`,
    `screener_scores` float64: probabilities. `times_ms` int64: of the decisions, ms since the epoch.
    """

    actions: Array
    stages: Array
    causes: Array
    scores: Float64
    screener_scores: Float64
    times_ms: Int64

    def take(self, index: Array) -> Verdicts:
        """Returns a copy of some of the rows, by index or mask."""
        return Verdicts(*(getattr(self, field.name)[index] for field in fields(self)))


_Format = Literal["json", "msgpack"]
# Decisions have texts of any length and fields that may be absent, so they cannot be rows of fixed size. With binary
# transactions they are JSON, which is written fastest and read everywhere. With Avro they are JSON too: decisions must
# not depend on a registry that has to accept their schema first.
_FORMATS: dict[CodecName, _Format] = {"json": "json", "msgpack": "msgpack", "binary": "json", "avro": "json"}
_Encoder = msgspec.json.Encoder | msgspec.msgpack.Encoder
_Decoder = msgspec.json.Decoder[Decision] | msgspec.msgpack.Decoder[Decision]
_ENCODERS: dict[_Format, _Encoder] = {"json": msgspec.json.Encoder(), "msgpack": msgspec.msgpack.Encoder()}
_DECODERS: dict[_Format, _Decoder] = {
    "json": msgspec.json.Decoder(Decision),
    "msgpack": msgspec.msgpack.Decoder(Decision),
}


def decision_ids(topic: str, partition: int, offsets: Int64) -> list[str]:
    """Returns `topic-partition-offset` of the transactions' records.

    A record that is decided again after a crash gets the same id, even from another bundle, so that a consumer can drop
    the repeated decision.
    """
    return [_decision_id(topic, partition, offset) for offset in offsets.tolist()]


def _decision_id(topic: str, partition: int, offset: int) -> str:
    return f"{topic}-{partition}-{offset}"


@dataclass(frozen=True, slots=True)
class RecordPositions:
    """The transactions' records, a row each: their partitions and offsets.

    `partition_index` (int64, [rows]): index into `partitions`. Not Kafka's partition number, which is `partition_id`.
    `offsets` (int64, [rows]).
    """

    partitions: Sequence[tuple[str, int]]
    partition_index: Int64
    offsets: Int64

    def ids(self, rows: Int64) -> list[str]:
        """Returns the decision ids of the rows with these indexes (int64)."""
        partitions = (self.partitions[index] for index in self.partition_index[rows].tolist())
        offsets = self.offsets[rows].tolist()
        return [
            _decision_id(topic, partition_id, offset)
            for (topic, partition_id), offset in zip(partitions, offsets, strict=True)
        ]


def encode_decisions(codec_name: CodecName, columns: DecisionColumns) -> list[bytes]:
    """Returns a message for each row, in the format that goes with the codec.

    Raises ValueError if the columns have unequal lengths.
    """
    rows = len(columns.offsets)
    if any(len(getattr(columns, name)) != rows for name in _COLUMNS):
        raise ValueError(f"columns of unequal length, {rows} offsets")
    form = _FORMATS[codec_name]
    if form == "json" and _fits_the_kernel(columns):
        return _json_rows(columns)
    encode = _ENCODERS[form].encode
    return [encode(decision) for decision in _decisions(columns)]


_COLUMNS = tuple(field.name for field in fields(DecisionColumns) if field.name not in ("topic", "partition"))
_LATENCIES = ("queue_ms", "features_ms", "screener_ms", "deep_ms", "total_ms")


def _decisions(columns: DecisionColumns) -> list[Decision]:
    """A Decision for each row, for formats and values that the kernel does not write."""
    ids = decision_ids(columns.topic, columns.partition, columns.offsets)
    firsts = decision_ids(columns.topic, columns.partition, columns.first_offsets)
    transaction_ids = plain_ids(columns.transaction_ids)
    latencies = zip(*(getattr(columns, name).tolist() for name in _LATENCIES), strict=True)
    # Python's numbers: reading them from arrays, one by one, takes several times as long
    lists: dict[str, Any] = {name: getattr(columns, name).tolist() for name in _COLUMNS if name != "bundles"}
    columns = replace(columns, **lists)
    return [
        Decision(
            transaction_id=transaction_ids[row],
            decision=ACTIONS[columns.actions[row]],
            score=columns.scores[row],
            stage=STAGES[columns.stages[row]],
            screener_score=columns.screener_scores[row],
            bundle=columns.bundles[row],
            degraded=columns.causes[row] > 0,
            degraded_cause=CAUSES[columns.causes[row]] or None,
            decision_id=ids[row],
            duplicate=columns.first_offsets[row] >= 0,
            first_decision_id=firsts[row] if columns.first_offsets[row] >= 0 else None,
            event_time_ms=columns.event_times_ms[row],
            decision_time_ms=columns.decision_times_ms[row],
            latency_ms=LatencyMs(*latency),
        )
        for row, latency in enumerate(latencies)
    ]


# --- JSON by the kernel -----------------------------------------------------------------------------------------------


def _fits_the_kernel(columns: DecisionColumns) -> bool:
    """Whether the kernel can write the rows: all repeats or none, integer ids, and numbers within its ranges."""
    repeated = columns.first_offsets >= 0
    return (
        columns.transaction_ids.dtype.kind == "i"
        and bool(repeated.all() or not repeated.any())
        and all(_within(getattr(columns, name), 0.0, 1.0) for name in ("scores", "screener_scores"))
        and all(_within(getattr(columns, name), -LATENCY_MS_MAX, LATENCY_MS_MAX) for name in _LATENCIES)
    )


def _within(values: Float64, least: float, most: float) -> bool:
    """Whether all values are in range; NaN is not."""
    return bool(((values >= least) & (values <= most)).all())


# Columns of numbers and of words, in the order of `_json_rows`.
_TRANSACTION, _OFFSET, _FIRST, _EVENT_TIME, _DECISION_TIME, _QUEUE = range(6)
_ACTION_WORD, _STAGE_WORD, _CAUSE_WORD, _BUNDLE_WORD = (-1 - column for column in range(4))
_DECIMALS = np.array([0, 0, 0, 0, 0, *[LATENCY_DECIMALS] * len(_LATENCIES)])


# Where a column belongs, as `write_rows` takes it, in the template of a message.
_ORDER = {
    "transaction": _TRANSACTION, "action": _ACTION_WORD, "token": TOKEN, "stage": _STAGE_WORD, "bundle": _BUNDLE_WORD,
    "cause": _CAUSE_WORD, "offset": _OFFSET, "first": _FIRST, "event": _EVENT_TIME, "decided": _DECISION_TIME,
    **{name: _QUEUE + column for column, name in enumerate(LatencyMs.__struct_fields__)},
}  # fmt: skip


@lru_cache(maxsize=1_024)
def _layout(topic: str, partition: int, repeated: bool) -> tuple[Words, Array]:
    """The constant pieces of a message, and the order of the columns between them, for `write_rows`."""
    prefix = msgspec.json.encode(f"{topic}-{partition}-")[1:-1].decode()
    latencies = ",".join(f'"{name}":\0{name}\0' for name in LatencyMs.__struct_fields__)
    template = (
        '{"transaction_id":\0transaction\0,"decision":"\0action\0","score":\0token\0,"stage":"\0stage\0",'
        '"screener_score":\0token\0,"bundle":\0bundle\0,"degraded":\0cause\0,'
        f'"decision_id":"{prefix}\0offset\0","duplicate":'
        + (f'true,"first_decision_id":"{prefix}\0first\0"' if repeated else 'false,"first_decision_id":null')
        + f',"event_time_ms":\0event\0,"decision_time_ms":\0decided\0,"latency_ms":{{{latencies}}}}}'
    )
    parts = template.split("\0")
    return Words([piece.encode() for piece in parts[::2]]), np.array([_ORDER[name] for name in parts[1::2]], np.int64)


@lru_cache(maxsize=64)
def _words(bundles: tuple[str, ...]) -> Words:
    """All words: actions, stages, causes with the field `degraded`, bundles as JSON."""
    causes = [
        b'true,"degraded_cause":"%s"' % cause.encode() if cause else b'false,"degraded_cause":null' for cause in CAUSES
    ]
    names = [*(name.encode() for name in (*ACTIONS, *STAGES)), *causes]
    return Words([*names, *map(msgspec.json.encode, bundles)])


def _json_rows(columns: DecisionColumns) -> list[bytes]:
    rows = len(columns.offsets)
    bundles = {name: number for number, name in enumerate(dict.fromkeys(columns.bundles))}
    first_stage, first_cause = len(ACTIONS), len(ACTIONS) + len(STAGES)
    words = np.empty((rows, 4), np.int64)
    words[:, 0] = columns.actions
    words[:, 1] = columns.stages.astype(np.int64) + first_stage
    words[:, 2] = columns.causes.astype(np.int64) + first_cause
    words[:, 3] = first_cause + len(CAUSES)
    if len(bundles) > 1:
        words[:, 3] += np.array([bundles[name] for name in columns.bundles], np.int64)
    numbers = np.empty((rows, len(_DECIMALS)), np.int64)
    numbers[:, _TRANSACTION] = columns.transaction_ids
    numbers[:, _OFFSET] = columns.offsets
    numbers[:, _FIRST] = columns.first_offsets
    numbers[:, _EVENT_TIME] = columns.event_times_ms
    numbers[:, _DECISION_TIME] = columns.decision_times_ms
    for number, name in enumerate(_LATENCIES):
        numbers[:, _QUEUE + number] = np.rint(getattr(columns, name) * 10.0**LATENCY_DECIMALS)
    pieces, order = _layout(columns.topic, columns.partition, bool((columns.first_offsets >= 0).any()))
    scores = msgspec.json.encode(np.column_stack((columns.scores, columns.screener_scores)).ravel().tolist())
    return write_rows(pieces, _words(tuple(bundles)), words, numbers, _DECIMALS, scores, order)


def warm_up_encoder() -> None:
    """Compiles the kernel ahead of the first decision."""
    columns: dict[str, Any] = {name: np.zeros(0) for name in _COLUMNS}
    _json_rows(DecisionColumns("", 0, **columns))


def decode_decision(message: bytes, codec_name: CodecName) -> Decision:
    """Reads a message; raises msgspec.MsgspecError if it is not a decision."""
    return _DECODERS[_FORMATS[codec_name]].decode(message)


def message_keys(cards: Array) -> list[bytes]:
    """Returns the key of each message, the card id as text: a card's messages stay in one partition, in order."""
    if cards.dtype.kind == "S":
        return list(cards.tolist())
    return [b"%d" % card for card in cards.tolist()]


def plain_ids(column: Array) -> list[int] | list[str]:
    """Returns transaction ids (int64 or S[n]) as Python's integers or texts."""
    if column.dtype.kind == "S":
        return [text.decode() for text in column.tolist()]
    return list(column.tolist())
