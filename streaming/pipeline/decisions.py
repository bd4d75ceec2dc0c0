"""The decision record: the message about a transaction on the `decisions` topic."""

from __future__ import annotations

from functools import cache
from typing import Literal

import msgspec

from cascade.columns import Array
from cascade.config import CodecName
from cascade.errors import SettingError
from cascade.plugins import CODECS

Verdict = Literal["approve", "review", "decline"]
Stage = Literal["screener", "deep"]
STAGES: tuple[Stage, ...] = ("screener", "deep")
CAUSES = ("", "deadline", "breaker-open", "queue-full", "error")


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
    `degraded_cause`. `decision_id`: the same on every retry, see `decision_id`. `duplicate`: the transaction was
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


Format = Literal["json", "msgpack"]
_Decoder = msgspec.json.Decoder[Decision] | msgspec.msgpack.Decoder[Decision]
_DECODERS: dict[Format, _Decoder] = {
    "json": msgspec.json.Decoder(Decision),
    "msgpack": msgspec.msgpack.Decoder(Decision),
}


@cache
def decision_format(codec_name: CodecName) -> Format:
    """The format of the decisions with transactions of this codec: `decisions` of the codec's class, else JSON.

    Decisions have texts of any length and fields that may be absent, so they cannot be rows of fixed size. With binary
    transactions they are JSON, which is written fastest and read everywhere. With Avro they are JSON too: decisions
    must not depend on a registry that has to accept their schema first.

    Raises SettingError if the class names no such format.
    """
    form: Format = getattr(CODECS.load(codec_name), "decisions", "json")
    if form not in _DECODERS:
        problem = f"writes decisions in {form!r}"
        remedy = f"set `decisions` of its class to one of {', '.join(_DECODERS)}"
        raise SettingError("configuration", CODECS.key, codec_name, problem, remedy)
    return form


def decode_decision(message: bytes, codec_name: CodecName) -> Decision:
    """Reads a message; raises msgspec.MsgspecError if it is not a decision."""
    return _DECODERS[decision_format(codec_name)].decode(message)


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
