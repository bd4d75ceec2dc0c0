from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from streaming.decisions import DecisionColumns, decision_ids, decode_decision, encode_decisions, message_keys


def columns(**changes: Any) -> DecisionColumns:
    plain: dict[str, Any] = {
        "topic": "transactions", "partition": 3, "bundles": ["2026-01-01.1"] * 2,
        "offsets": np.array([7, 9]), "first_offsets": np.array([-1, 5]),
        "transaction_ids": np.array([70, 90]), "decisions": ["approve", "review"], "stages": ["deep", "screener"],
        "scores": np.array([0.25, 0.5]), "screener_scores": np.array([0.125, 0.5]),
        "degraded_causes": [None, "deadline"], "event_times_ms": np.array([1, 2]),
        "decision_times_ms": np.array([11, 12]), "queue_ms": np.array([0.5, 1.5]),
        "features_ms": np.array([0.25, 0.25]), "screener_ms": np.array([0.125, 0.125]),
        "deep_ms": np.array([4.0, 5.0]), "total_ms": np.array([5.0, 7.0]),
    }  # fmt: skip
    return DecisionColumns(**plain | changes)


@pytest.mark.parametrize("codec", ["json", "msgpack"])
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
    with pytest.raises(ValueError, match="zip"):
        encode_decisions("json", columns(decisions=["approve"]))


def test_the_id_of_a_decision_does_not_depend_on_the_bundle() -> None:
    ids = [
        [
            decode_decision(message, "json").decision_id
            for message in encode_decisions("json", columns(bundles=[bundle] * 2))
        ]
        for bundle in ("1", "2")
    ]
    assert ids[0] == ids[1] == decision_ids("transactions", 3, np.array([7, 9]))


def test_what_is_no_decision_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_decision(b"{}", "json")


def test_keys_are_the_card_as_text() -> None:
    assert message_keys(np.array([5, -6, 2**62])) == [b"5", b"-6", b"4611686018427387904"]
    assert message_keys(np.array([b"K-1", b"K-22"], "S8")) == [b"K-1", b"K-22"]
