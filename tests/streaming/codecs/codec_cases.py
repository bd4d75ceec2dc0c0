"""What the tests of the codecs share: fields, the checks of a decoded fetch, and MessagePack as the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from hypothesis import strategies as st

from cascade.schema import Field
from streaming.codecs import Codec, Decoded, RejectReason, codec

BYTES_MAX = 1_000
TIME_MS = 1_530_000_000_000
FIELDS = {
    "transaction_id": Field(type="int64", minimum=0),
    "event_time": Field(
        type="timestamp", unit="ms", minimum=datetime(2018, 1, 1, tzinfo=UTC), maximum=datetime(2030, 1, 1, tzinfo=UTC)
    ),
    "amount": Field(type="float64", minimum=0, maximum=10_000),
    "card_id": Field(type="string", max_length=8),
    "channel": Field(type="category", values=("chip", "online")),
    "note": Field(type="string", max_length=5),
}
Bad = list[tuple[bytes | None, RejectReason]]


def reasons(decoded: Decoded) -> dict[int, RejectReason]:
    return {reject.index: reject.reason for reject in decoded.rejects}


def each_position_once(decoded: Decoded, count: int, fields: Mapping[str, Field] = FIELDS) -> None:
    rejected = [reject.index for reject in decoded.rejects]
    assert sorted([*decoded.rows.tolist(), *rejected]) == list(range(count))
    assert rejected == sorted(rejected)
    assert decoded.rows.tolist() == sorted(decoded.rows.tolist())
    assert decoded.batch.rows == len(decoded.rows)
    for name, field in fields.items():
        assert decoded.batch[name].dtype == field.dtype
        assert len(decoded.batch[name]) == decoded.batch.rows


def check_faults(made: Codec, good: Callable[[int], bytes], bad: Bad) -> Decoded:
    """Reads each bad message between good ones, made by their id: it has its reason, and the others are rows."""
    values: list[bytes | None] = [good(0)]
    for place, (value, _) in enumerate(bad):
        values += [value, good(place + 1)]
    decoded = made.decode(values)
    assert reasons(decoded) == {2 * place + 1: reason for place, (_, reason) in enumerate(bad)}
    assert decoded.batch["transaction_id"].tolist() == list(range(len(bad) + 1))
    return decoded


def check_alone(made: Codec, values: Sequence[bytes | None], fields: Mapping[str, Field]) -> Decoded:
    """Reads a fetch; each of its rows is the same if its message is read alone."""
    decoded = made.decode(values)
    each_position_once(decoded, len(values), fields)
    for place, index in enumerate(decoded.rows.tolist()):
        alone = made.decode([values[index]])
        assert alone.rejects == []
        assert all(alone.batch[name][0] == decoded.batch[name][place] for name in fields)
    return decoded


# --- the same values in another codec ---------------------------------------------------------------------------------

MSGPACK = codec("msgpack", FIELDS, BYTES_MAX)
_whole = st.integers(-(2**63), 2**63 - 1)
# at most 31 octets, the most of a fixstr in MessagePack
_odd_text = st.text(st.sampled_from("aé\u202e\n\x7f\x80漢"), max_size=7)
_text = (st.text(max_size=7) | _odd_text | st.just("K-1")).map(str.encode)
any_octets = st.binary(max_size=9) | _text


def any_row(**others: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Values of a row, texts as octets; `others`: those of card_id, channel and note."""
    numbers = {
        "transaction_id": _whole | st.just(1),
        "event_time": _whole | st.just(TIME_MS),
        "amount": st.floats() | st.just(12.5),
    }
    return st.fixed_dictionaries(numbers | others)


def check_as_msgpack(decoded: Decoded, rows: list[dict[str, Any]]) -> None:
    """MessagePack messages with the same values, whose texts are octets, give the same batch and the same rejects."""
    encode = msgspec.msgpack.encode
    messages = []
    for values in rows:
        parts = [
            encode(name) + (bytes([0xA0 | len(value)]) + value if isinstance(value, bytes) else encode(value))
            for name, value in values.items()
        ]
        messages.append(bytes([0x80 | len(values)]) + b"".join(parts))
    expected = MSGPACK.decode(messages)
    assert decoded.rejects == expected.rejects
    assert decoded.rows.tolist() == expected.rows.tolist()
    for name in FIELDS:
        assert decoded.batch[name].tolist() == expected.batch[name].tolist()
