from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from cascade.columns import Array, ByteColumn, ColumnBatch
from cascade.policy import ACTIONS
from streaming.pipeline.decisions import CAUSES, STAGES, decode_decision, message_keys
from streaming.pipeline.encode import decisions, encode, encode_keys
from streaming.pipeline.table import Table

BUNDLE = "2026-01-01.1"


def table(ids: Array | None = None, bundles: tuple[str, ...] = (BUNDLE,), **changes: Any) -> Table:
    plain: dict[str, Any] = {
        "partition_id": 3, "offset": [7, 9], "first_offset": [-1, 5], "action": [0, 1], "stage": [1, 0],
        "score": [0.25, 0.5], "screener_score": [0.125, 0.5], "cause": [0, 1], "event_time_ms": [1, 2],
        "decided_ms": [11.0, 12.0], "queue_ms": [0.5, 1.5], "features_ms": 0.25, "screener_ms": 0.125,
        "deep_ms": [4.0, 5.0], "start_ms": [6.0, 5.0],
    }  # fmt: skip
    batch = ColumnBatch({"id": np.array([70, 90]) if ids is None else ids}, 2)
    return Table.of("transactions", batch, bundles, **plain | changes)


def encoded(codec: Any, some_table: Table) -> list[bytes]:
    return [value or b"" for value in encode(codec, some_table, np.arange(len(some_table)), "id")]


@pytest.mark.parametrize("codec", ["json", "msgpack", "binary"])
def test_decisions_come_back_as_they_were(codec: Any) -> None:
    first, second = (decode_decision(message, codec) for message in encoded(codec, table()))
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
    messages = encoded(codec, table(np.array([b"a1", "é".encode()], "S8")))
    assert [decode_decision(message, codec).transaction_id for message in messages] == ["a1", "é"]


def test_only_the_chosen_rows_are_encoded_in_their_order() -> None:
    messages = encode("json", table(first_offset=-1), np.array([1, 0]), "id")
    assert [decode_decision(message or b"", "json").transaction_id for message in messages] == [90, 70]
    assert len(encode("json", table(), np.zeros(0, np.int64), "id")) == 0


def test_the_id_of_a_decision_does_not_depend_on_the_bundle() -> None:
    for bundle in ("1", "2"):
        messages = encoded("json", table(bundles=(bundle,)))
        ids = [decode_decision(message, "json").decision_id for message in messages]
        assert ids == ["transactions-3-7", "transactions-3-9"]


def test_what_is_no_decision_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_decision(b"{}", "json")


def test_keys_are_the_card_as_text() -> None:
    assert message_keys(np.array([5, -6, 2**62])) == [b"5", b"-6", b"4611686018427387904"]
    assert message_keys(np.array([b"K-1", b"K-22"], "S8")) == [b"K-1", b"K-22"]


@given(some.lists(some.integers(-(2**63), 2**63 - 1), max_size=5))
def test_keys_of_a_table_are_the_messages_keys(cards: list[int]) -> None:
    column, chosen = np.array(cards, np.int64), np.arange(len(cards))[::-2]
    assert list(encode_keys(column, chosen)) == message_keys(column[chosen])
    assert encode_keys(np.array([b"K-1", b"K-2"], "S8"), np.array([1])) == [b"K-2"]


@some.composite
def any_tables(draw: Any) -> Table:
    rows = draw(some.integers(0, 6))

    def column(strategy: Any) -> Any:
        return draw(some.lists(strategy, min_size=rows, max_size=rows))

    whole = some.integers(-(2**63), 2**63 - 1)
    latency, repeated = some.floats(-1e9, 1e9), draw(some.booleans())
    bundles = tuple(draw(some.lists(some.sampled_from(["v1", 'a "quoted" é', ""]), min_size=1, unique=True)))
    return Table.of(
        draw(some.text(max_size=12)),
        ColumnBatch({"id": np.array(column(whole), np.int64)}, rows),
        bundles,
        partition_id=column(some.integers(0, 2**31 - 1)),
        offset=column(some.integers(0, 2**63 - 1)),
        first_offset=column(some.integers(0, 2**63 - 1) if repeated else some.just(-1)),
        action=column(some.integers(0, len(ACTIONS) - 1)),
        stage=column(some.integers(0, len(STAGES) - 1)),
        score=column(some.floats(0, 1)),
        screener_score=column(some.floats(0, 1)),
        cause=column(some.integers(0, len(CAUSES) - 1)),
        bundle=column(some.integers(0, len(bundles) - 1)),
        event_time_ms=column(whole),
        decided_ms=column(some.floats(-1e9, 1e9)),
        start_ms=column(latency),
        queue_ms=column(latency),
        features_ms=column(latency),
        screener_ms=column(latency),
        deep_ms=column(latency),
    )


@settings(deadline=None)  # the first one may compile
@given(any_tables())
def test_the_kernel_writes_what_the_records_encode(some_table: Table) -> None:
    every = np.arange(len(some_table))
    messages = encode("json", some_table, every, "id")
    assert isinstance(messages, ByteColumn)
    found = [decode_decision(message or b"", "json") for message in messages]
    expected = decisions(some_table, every, "id")
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
        {"score": [np.nan, 0.5]},
        {"score": [1.5, 0.5]},
        {"queue_ms": [np.inf, 0.5]},
        {"ids": np.array([b"a", b"b"])},
        {"first_offset": [-1, 5]},
    ],
    ids=["not a number", "above one", "without end", "text", "mixed"],
)
def test_what_the_kernel_cannot_say_goes_the_long_way(changes: dict[str, Any]) -> None:
    some_table = table(**{"first_offset": -1} | changes)
    messages = encode("json", some_table, np.arange(2), "id")
    assert isinstance(messages, list)
    assert [msgspec.json.decode(text)["decision"] for text in messages] == ["approve", "review"]
