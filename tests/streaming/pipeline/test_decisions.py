from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import streaming.pipeline.decisions
from cascade.policy import ACTIONS
from streaming.pipeline.decisions import (
    CAUSES,
    STAGES,
    DecisionColumns,
    _decisions,
    _fits_the_kernel,
    decode_decision,
    encode_decisions,
    message_keys,
)


def columns(**changes: Any) -> DecisionColumns:
    plain: dict[str, Any] = {
        "topic": "transactions", "partition": 3, "bundles": ["2026-01-01.1"] * 2,
        "offsets": np.array([7, 9]), "first_offsets": np.array([-1, 5]),
        "transaction_ids": np.array([70, 90]), "actions": np.array([0, 1], np.uint8),
        "stages": np.array([1, 0], np.uint8),
        "scores": np.array([0.25, 0.5]), "screener_scores": np.array([0.125, 0.5]),
        "causes": np.array([0, 1], np.uint8), "event_times_ms": np.array([1, 2]),
        "decision_times_ms": np.array([11, 12]), "queue_ms": np.array([0.5, 1.5]),
        "features_ms": np.array([0.25, 0.25]), "screener_ms": np.array([0.125, 0.125]),
        "deep_ms": np.array([4.0, 5.0]), "total_ms": np.array([5.0, 7.0]),
    }  # fmt: skip
    return DecisionColumns(**plain | changes)


@pytest.mark.parametrize("codec", ["json", "msgpack", "binary"])
def test_decisions_come_back_as_they_were(codec: Any) -> None:
    first, second = (decode_decision(message, codec) for message in encode_decisions(codec, columns()))
    assert (first.transaction_id, first.decision, first.stage, first.score) == (70, "approve", "deep", 0.25)
    assert (first.degraded, first.degraded_cause) == (False, None)
    assert (second.degraded, second.degraded_cause) == (True, "deadline")
    assert second.decision_id == "transactions-3-9"
    assert (first.duplicate, first.first_decision_id) == (False, None)
    assert (second.duplicate, second.first_decision_id) == (True, "transactions-3-5")
    assert (second.event_time_ms, second.decision_time_ms, second.bundle) == (2, 12, "2026-01-01.1")
    assert msgspec.structs.astuple(second.latency_ms) == (1.5, 0.25, 0.125, 5.0, 7.0)


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_text_ids_stay_text(codec: Any) -> None:
    messages = encode_decisions(codec, columns(transaction_ids=np.array([b"a1", "é".encode()], "S8")))
    assert [decode_decision(message, codec).transaction_id for message in messages] == ["a1", "é"]


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="unequal"):
        encode_decisions("json", columns(actions=np.zeros(1, np.uint8)))


def test_the_id_of_a_decision_does_not_depend_on_the_bundle() -> None:
    for bundle in ("1", "2"):
        messages = encode_decisions("json", columns(bundles=[bundle] * 2))
        ids = [decode_decision(message, "json").decision_id for message in messages]
        assert ids == ["transactions-3-7", "transactions-3-9"]


def test_what_is_no_decision_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_decision(b"{}", "json")


def test_keys_are_the_card_as_text() -> None:
    assert message_keys(np.array([5, -6, 2**62])) == [b"5", b"-6", b"4611686018427387904"]
    assert message_keys(np.array([b"K-1", b"K-22"], "S8")) == [b"K-1", b"K-22"]


@some.composite
def any_columns(draw: Any) -> DecisionColumns:
    rows = draw(some.integers(0, 6))

    def column(strategy: Any, dtype: Any) -> Any:
        return np.array(draw(some.lists(strategy, min_size=rows, max_size=rows)), dtype)

    whole = some.integers(-(2**63), 2**63 - 1)
    latency = some.floats(-1e9, 1e9)
    repeated = draw(some.booleans())
    return DecisionColumns(
        topic=draw(some.text(max_size=12)),
        partition=draw(some.integers(0, 2**31 - 1)),
        bundles=draw(some.lists(some.sampled_from(["v1", 'a "quoted" é', ""]), min_size=rows, max_size=rows)),
        offsets=column(some.integers(0, 2**63 - 1), np.int64),
        first_offsets=column(some.integers(0, 2**63 - 1) if repeated else some.just(-1), np.int64),
        transaction_ids=column(whole, np.int64),
        actions=column(some.integers(0, len(ACTIONS) - 1), np.uint8),
        stages=column(some.integers(0, len(STAGES) - 1), np.uint8),
        scores=column(some.floats(0, 1), np.float64),
        screener_scores=column(some.floats(0, 1), np.float64),
        causes=column(some.integers(0, len(CAUSES) - 1), np.uint8),
        event_times_ms=column(whole, np.int64),
        decision_times_ms=column(whole, np.int64),
        **{name: column(latency, np.float64) for name in streaming.pipeline.decisions._LATENCIES},
    )


@settings(deadline=None)  # the first one may compile
@given(any_columns())
def test_the_kernel_writes_what_the_records_encode(columns: DecisionColumns) -> None:
    assert _fits_the_kernel(columns)
    found = [decode_decision(message, "json") for message in encode_decisions("json", columns)]
    expected = _decisions(columns)
    assert len(found) == len(expected)
    for decision, other in zip(found, expected, strict=True):
        for name in decision.latency_ms.__struct_fields__:
            assert getattr(decision.latency_ms, name) == pytest.approx(
                getattr(other.latency_ms, name), rel=1e-15, abs=5.1e-4
            )
        same = {"latency_ms": None}
        assert msgspec.structs.replace(decision, **same) == msgspec.structs.replace(other, **same)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": np.array([np.nan, 0.5])},
        {"scores": np.array([1.5, 0.5])},
        {"queue_ms": np.array([np.inf, 0.5])},
        {"transaction_ids": np.array([b"a", b"b"])},
        {"first_offsets": np.array([-1, 5])},
    ],
    ids=["not a number", "above one", "without end", "text", "mixed"],
)
def test_what_the_kernel_cannot_say_goes_the_long_way(changes: dict[str, Any]) -> None:
    some_columns = columns(**changes)
    assert not _fits_the_kernel(some_columns)
    messages = encode_decisions("json", some_columns)
    assert [msgspec.json.decode(text)["decision"] for text in messages] == ["approve", "review"]
