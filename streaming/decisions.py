"""The decision record: what is said about one transaction on the `decisions` topic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from cascade.columns import Array, Float64, Int64
from cascade.config import CodecName

Verdict = Literal["approve", "review", "decline"]
Stage = Literal["screener", "deep"]


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

    `transaction_id` int64 or S[n]; `decisions`, `stages`, `bundles` and `degraded_causes` (None: not degraded) are
    sequences; `first_offsets` int64: of the first occurrence of a duplicate, -1 where it is none; the times are int64
    ms since the epoch, the latencies float64 ms as LatencyMs says.
    """

    topic: str
    partition: int
    bundles: Sequence[str]
    offsets: Int64
    first_offsets: Int64
    transaction_ids: Array
    decisions: Sequence[Verdict]
    stages: Sequence[Stage]
    scores: Float64
    screener_scores: Float64
    degraded_causes: Sequence[str | None]
    event_times_ms: Int64
    decision_times_ms: Int64
    queue_ms: Float64
    features_ms: Float64
    screener_ms: Float64
    deep_ms: Float64
    total_ms: Float64


_Encoder = msgspec.json.Encoder | msgspec.msgpack.Encoder
_Decoder = msgspec.json.Decoder[Decision] | msgspec.msgpack.Decoder[Decision]
_ENCODERS: dict[CodecName, _Encoder] = {"json": msgspec.json.Encoder(), "msgpack": msgspec.msgpack.Encoder()}
_DECODERS: dict[CodecName, _Decoder] = {
    "json": msgspec.json.Decoder(Decision),
    "msgpack": msgspec.msgpack.Decoder(Decision),
}


def decision_ids(topic: str, partition: int, offsets: Int64) -> list[str]:
    """`topic-partition-offset` of the transactions: where they lie in the log.

    A record that is decided again after a crash gets the same id, whichever bundle decides by then, so that a
    consumer can drop the repeat.
    """
    return [f"{topic}-{partition}-{offset}" for offset in offsets.tolist()]


def encode_decisions(codec_name: CodecName, columns: DecisionColumns) -> list[bytes]:
    """One message a row."""
    encode = _ENCODERS[codec_name].encode
    latencies = zip(
        columns.queue_ms.tolist(), columns.features_ms.tolist(), columns.screener_ms.tolist(),
        columns.deep_ms.tolist(), columns.total_ms.tolist(), strict=True,
    )  # fmt: skip
    firsts = [
        one if offset >= 0 else None
        for one, offset in zip(
            decision_ids(columns.topic, columns.partition, columns.first_offsets),
            columns.first_offsets.tolist(),
            strict=True,
        )
    ]
    return [
        encode(
            Decision(
                transaction_id, decision, score, stage, screener_score, bundle, cause is not None, cause, decision_id,
                first is not None, first, event_time_ms, decision_time_ms, LatencyMs(*latency),
            )
        )
        for transaction_id, decision, score, stage, screener_score, bundle, cause, decision_id, first, event_time_ms,
        decision_time_ms, latency in zip(
            _plain_ids(columns.transaction_ids), columns.decisions, columns.scores.tolist(), columns.stages,
            columns.screener_scores.tolist(), columns.bundles, columns.degraded_causes,
            decision_ids(columns.topic, columns.partition, columns.offsets), firsts, columns.event_times_ms.tolist(),
            columns.decision_times_ms.tolist(), latencies, strict=True,
        )
    ]  # fmt: skip


def decode_decision(message: bytes, codec_name: CodecName) -> Decision:
    """Read one message; raises msgspec.MsgspecError where it is no decision."""
    return _DECODERS[codec_name].decode(message)


def message_keys(cards: Array) -> list[bytes]:
    """The key of each message, so that a card's messages stay in one partition, in order: its id as text."""
    if cards.dtype.kind == "S":
        return list(cards.tolist())
    return [b"%d" % card for card in cards.tolist()]


def _plain_ids(column: Array) -> list[int] | list[str]:
    if column.dtype.kind == "S":
        return [text.decode() for text in column.tolist()]
    return list(column.tolist())
