"""The decision record: what is said about one transaction on the `decisions` topic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import msgspec
import numpy as np

from cascade.columns import Array, Float64, Int64
from cascade.config import CodecName
from cascade.policy import ACTIONS
from streaming.decision_kernels import TOKEN, Words, write_rows

Verdict = Literal["approve", "review", "decline"]
Stage = Literal["screener", "deep"]
STAGES: tuple[Stage, ...] = ("screener", "deep")
CAUSES = ("", "deadline", "breaker-open", "queue-full", "error")
# JSON says latencies to the microsecond.
LATENCY_DECIMALS = 3
LATENCY_MS_MAX = 1e12


class LatencyMs(msgspec.Struct, frozen=True, gc=False):
    """Where the time of one transaction went, in ms.

    `queue`: from the start of its deadline to the start of its micro-batch. `features`, `screener`: of its
    micro-batch. `deep`: from the call to its answer or its end, 0 where none was made. `total`: from the start of
    its deadline to the decision.
    """

    queue: float
    features: float
    screener: float
    deep: float
    total: float


class Decision(msgspec.Struct, frozen=True, gc=False):
    """One decision.

    `score` is the calibrated probability of fraud by the stage that decided, `screener_score` the screener's own.
    `bundle` is the version that decided. `degraded` where the screener decided in the deep model's stead, with
    `degraded_cause`. `decision_id` is the same on every retry: see `decision_ids`. `duplicate`: the transaction came
    before; what was decided then, as `first_decision_id`, is said again. Times are ms since the epoch.
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
    """The decisions of some transactions of one partition, a row each.

    `transaction_ids` int64 or S[n]; `actions`, `stages` and `causes` uint8: positions in `cascade.policy.ACTIONS`,
    STAGES and CAUSES; `first_offsets` int64: of the first occurrence of a duplicate, -1 where it is none; the times are
    int64 ms since the epoch, the latencies float64 ms as LatencyMs says.
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


_Format = Literal["json", "msgpack"]
# A decision has texts without a fixed length and fields that may be absent, so it is no row of fixed size: JSON beside
# binary transactions, as it is what is written fastest, and what everyone reads. JSON beside Avro's too: a registry
# that must have our schema before a decision can be said would be one more thing that stops decisions.
_FORMATS: dict[CodecName, _Format] = {"json": "json", "msgpack": "msgpack", "binary": "json", "avro": "json"}
_Encoder = msgspec.json.Encoder | msgspec.msgpack.Encoder
_Decoder = msgspec.json.Decoder[Decision] | msgspec.msgpack.Decoder[Decision]
_ENCODERS: dict[_Format, _Encoder] = {"json": msgspec.json.Encoder(), "msgpack": msgspec.msgpack.Encoder()}
_DECODERS: dict[_Format, _Decoder] = {
    "json": msgspec.json.Decoder(Decision),
    "msgpack": msgspec.msgpack.Decoder(Decision),
}


def decision_ids(topic: str, partition: int, offsets: Int64) -> list[str]:
    """`topic-partition-offset` of the transactions: where they lie in the log.

    A record that is decided again after a crash gets the same id, whichever bundle decides by then, so that a
    consumer can drop the repeat.
    """
    return [_decision_id(topic, partition, offset) for offset in offsets.tolist()]


def _decision_id(topic: str, partition: int, offset: int) -> str:
    return f"{topic}-{partition}-{offset}"


@dataclass(frozen=True, slots=True)
class Places:
    """Where transactions lie in the log, a row each: `source` int64 is the row's position in `partitions`."""

    partitions: Sequence[tuple[str, int]]
    source: Int64
    offsets: Int64

    def ids(self, rows: Int64) -> list[str]:
        """`decision_ids` of some of the rows, int64 [some]."""
        offsets = self.offsets[rows].tolist()
        places = (self.partitions[source] for source in self.source[rows].tolist())
        return [_decision_id(topic, number, offset) for (topic, number), offset in zip(places, offsets, strict=True)]


def encode_decisions(codec_name: CodecName, columns: DecisionColumns) -> list[bytes]:
    """One message a row, in the format that goes with the codec.

    Raises ValueError where the columns are of unequal length.
    """
    rows = len(columns.offsets)
    if any(len(getattr(columns, name)) != rows for name in _COLUMNS):
        raise ValueError(f"columns of unequal length, {rows} offsets")
    form = _FORMATS[codec_name]
    if form == "json" and _fits_the_kernel(columns):
        return _json_rows(columns)
    encode = _ENCODERS[form].encode
    return [encode(one) for one in _decisions(columns)]


_COLUMNS = (
    "bundles", "first_offsets", "transaction_ids", "actions", "stages", "scores", "screener_scores", "causes",
    "event_times_ms", "decision_times_ms", "queue_ms", "features_ms", "screener_ms", "deep_ms", "total_ms",
)  # fmt: skip
_LATENCIES = ("queue_ms", "features_ms", "screener_ms", "deep_ms", "total_ms")


def _decisions(columns: DecisionColumns) -> list[Decision]:
    """A record a row, for what the kernel does not write."""
    ids = decision_ids(columns.topic, columns.partition, columns.offsets)
    firsts = decision_ids(columns.topic, columns.partition, columns.first_offsets)
    latencies = zip(*(getattr(columns, name).tolist() for name in _LATENCIES), strict=True)
    rows = zip(
        _plain_ids(columns.transaction_ids), columns.actions.tolist(), columns.scores.tolist(),
        columns.stages.tolist(), columns.screener_scores.tolist(), columns.bundles, columns.causes.tolist(), ids,
        columns.first_offsets.tolist(), firsts, columns.event_times_ms.tolist(), columns.decision_times_ms.tolist(),
        latencies, strict=True,
    )  # fmt: skip
    return [
        Decision(
            transaction_id, ACTIONS[action], score, STAGES[stage], screener_score, bundle, cause > 0,
            CAUSES[cause] or None, decision_id, first_offset >= 0, first if first_offset >= 0 else None, event_time_ms,
            decision_time_ms, LatencyMs(*latency),
        )
        for transaction_id, action, score, stage, screener_score, bundle, cause, decision_id, first_offset, first,
        event_time_ms, decision_time_ms, latency in rows
    ]  # fmt: skip


# --- JSON by the kernel -----------------------------------------------------------------------------------------------


def _fits_the_kernel(columns: DecisionColumns) -> bool:
    """Whether every row is of one kind, with numbers in the ranges that the kernel writes."""
    repeated = columns.first_offsets >= 0
    return (
        columns.transaction_ids.dtype.kind == "i"
        and bool(repeated.all() or not repeated.any())
        and all(_within(getattr(columns, name), 0.0, 1.0) for name in ("scores", "screener_scores"))
        and all(_within(getattr(columns, name), -LATENCY_MS_MAX, LATENCY_MS_MAX) for name in _LATENCIES)
    )


def _within(values: Float64, least: float, most: float) -> bool:
    """False for what is not a number too."""
    return bool(((values >= least) & (values <= most)).all())


# Columns of numbers and of words, in the order in which `_json_rows` stacks them.
_TRANSACTION, _OFFSET, _FIRST, _EVENT_TIME, _DECISION_TIME, _QUEUE = range(6)
_ACTION_WORD, _STAGE_WORD, _CAUSE_WORD, _BUNDLE_WORD = (-1 - column for column in range(4))
_DECIMALS = np.array([0, 0, 0, 0, 0, *[LATENCY_DECIMALS] * len(_LATENCIES)])


@lru_cache(maxsize=1_024)
def _layout(topic: str, partition: int, repeated: bool) -> tuple[Words, Array]:
    """The constant pieces of a message and the order of what stands between them, as `write_rows` takes them."""
    place = msgspec.json.encode(f"{topic}-{partition}-")[1:-1]
    first: list[Any] = (
        [b',"duplicate":true,"first_decision_id":"' + place, _FIRST, b'"']
        if repeated
        else [b',"duplicate":false,"first_decision_id":null']
    )
    parts: list[Any] = [
        b'{"transaction_id":', _TRANSACTION, b',"decision":"', _ACTION_WORD, b'","score":', TOKEN, b',"stage":"',
        _STAGE_WORD, b'","screener_score":', TOKEN, b',"bundle":', _BUNDLE_WORD, b',"degraded":', _CAUSE_WORD,
        b',"decision_id":"' + place, _OFFSET, b'"', *first, b',"event_time_ms":', _EVENT_TIME,
        b',"decision_time_ms":', _DECISION_TIME,
    ]  # fmt: skip
    for number, name in enumerate(LatencyMs.__struct_fields__):
        parts += [b',"latency_ms":{"' if number == 0 else b',"', name.encode() + b'":', _QUEUE + number]
    parts.append(b"}}")
    pieces, order = [b""], []
    for part in parts:
        if isinstance(part, bytes):
            pieces[-1] += part
        else:
            order.append(part)
            pieces.append(b"")
    return Words(pieces), np.array(order, np.int64)


@lru_cache(maxsize=64)
def _words(bundles: tuple[str, ...]) -> Words:
    """All words: actions, stages, causes with whether it is degraded, bundles as JSON."""
    causes = [
        b'true,"degraded_cause":"%s"' % cause.encode() if cause else b'false,"degraded_cause":null' for cause in CAUSES
    ]
    names = [*(one.encode() for one in ACTIONS), *(one.encode() for one in STAGES), *causes]
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
    """Compile the kernel now, and not with the first decision."""
    none, empty = np.zeros(0, np.int64), np.zeros(0)
    codes = np.zeros(0, np.uint8)
    _json_rows(
        DecisionColumns(
            "", 0, [], none, none, none, codes, codes, empty, empty, codes, none, none, empty, empty, empty, empty,
            empty,
        )
    )  # fmt: skip


def decode_decision(message: bytes, codec_name: CodecName) -> Decision:
    """Read one message; raises msgspec.MsgspecError where it is no decision."""
    return _DECODERS[_FORMATS[codec_name]].decode(message)


def message_keys(cards: Array) -> list[bytes]:
    """The key of each message, so that a card's messages stay in one partition, in order: its id as text."""
    if cards.dtype.kind == "S":
        return list(cards.tolist())
    return [b"%d" % card for card in cards.tolist()]


def _plain_ids(column: Array) -> list[int] | list[str]:
    if column.dtype.kind == "S":
        return [text.decode() for text in column.tolist()]
    return list(column.tolist())
