"""Step 8, encode: decided rows of the table become messages of the decisions topic."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np

from cascade.columns import Array, ByteColumn, Int64
from cascade.config import CodecName
from cascade.decision_ids import decision_id
from cascade.policy import ACTIONS
from streaming.pipeline import encode_kernels as kernels
from streaming.pipeline.decisions import (
    CAUSES,
    STAGES,
    Decision,
    Format,
    LatencyMs,
    decision_format,
    message_keys,
    plain_ids,
)
from streaming.pipeline.row import ROW
from streaming.pipeline.table import Table
from streaming.pipeline.table_kernels import both_scores

_Encoder = msgspec.json.Encoder | msgspec.msgpack.Encoder
_ENCODERS: dict[Format, _Encoder] = {"json": msgspec.json.Encoder(), "msgpack": msgspec.msgpack.Encoder()}
# Where a field belongs in the template of a message.
_FIELDS = {
    "transaction": kernels.TRANSACTION, "action": kernels.ACTION, "token": kernels.TOKEN, "stage": kernels.STAGE,
    "bundle": kernels.BUNDLE, "cause": kernels.CAUSE, "partition": kernels.PARTITION, "offset": kernels.OFFSET,
    "first": kernels.FIRST_OFFSET, "event": kernels.EVENT_TIME, "decided": kernels.DECIDED, "queue": kernels.QUEUE,
    "features": kernels.FEATURES, "screener": kernels.SCREENER, "deep": kernels.DEEP, "total": kernels.TOTAL,
}  # fmt: skip


def encode(codec_name: CodecName, table: Table, chosen: Int64, transaction_id: str) -> Sequence[bytes | None]:
    """Returns a message for each row with these positions (int64), in the format that goes with the codec.

    transaction_id: name of the field.
    """
    form, ids = decision_format(codec_name), table.batch[transaction_id]
    if form == "json" and ids.dtype.kind == "i":
        found = _json(table, chosen, ids)
        if found is not None:
            return found
    write = _ENCODERS[form].encode
    return [write(decision) for decision in decisions(table, chosen, transaction_id)]


def encode_keys(cards: Array, chosen: Int64) -> Sequence[bytes | None]:
    """Returns the keys of the messages of these rows, see `message_keys`; as a column for integers."""
    if cards.dtype.kind == "S":
        return message_keys(cards[chosen])
    return kernels.write_numbers(np.ascontiguousarray(cards), chosen)


def decisions(table: Table, chosen: Int64, transaction_id: str) -> list[Decision]:
    """Returns the decisions of the rows with these positions, for formats and values that the kernel does not write."""
    rows, topic = table.rows[chosen], table.topic
    ids = plain_ids(table.batch[transaction_id][chosen])
    # Python's numbers: reading them from the array, one by one, takes several times as long
    columns = {name: rows[name].tolist() for name in ROW.names or ()}
    return [
        Decision(
            transaction_id=ids[row],
            decision=ACTIONS[columns["action"][row]],
            score=columns["score"][row],
            stage=STAGES[columns["stage"][row]],
            screener_score=columns["screener_score"][row],
            bundle=table.bundles[columns["bundle"][row]],
            degraded=columns["cause"][row] > 0,
            degraded_cause=CAUSES[columns["cause"][row]] or None,
            decision_id=decision_id(topic, columns["partition_id"][row], columns["offset"][row]),
            duplicate=columns["first_offset"][row] >= 0,
            first_decision_id=(
                decision_id(topic, columns["partition_id"][row], columns["first_offset"][row])
                if columns["first_offset"][row] >= 0
                else None
            ),
            event_time_ms=columns["event_time_ms"][row],
            decision_time_ms=int(columns["decided_ms"][row]),
            latency_ms=LatencyMs(
                queue=columns["queue_ms"][row],
                features=columns["features_ms"][row],
                screener=columns["screener_ms"][row],
                deep=columns["deep_ms"][row],
                total=columns["decided_ms"][row] - columns["start_ms"][row],
            ),
        )
        for row in range(len(rows))
    ]


def warm_up_encoder() -> None:
    """Compiles the kernels ahead of the first decision."""
    none = np.zeros(0, np.int64)
    table = Table("", np.zeros(0, ROW), {}, ("",))  # type: ignore[arg-type]  # no field is read
    _json(table, none, none)
    kernels.write_numbers(none, none)


@lru_cache(maxsize=64)
def _template(topic: str, repeated: bool, bundles: tuple[str, ...]) -> kernels.Template:
    prefix = msgspec.json.encode(f"{topic}-")[1:-1].decode()
    latencies = ",".join(f'"{name}":\0{name}\0' for name in LatencyMs.__struct_fields__)
    first = f'true,"first_decision_id":"{prefix}\0partition\0-\0first\0"'
    template = (
        '{"transaction_id":\0transaction\0,"decision":"\0action\0","score":\0token\0,"stage":"\0stage\0",'
        '"screener_score":\0token\0,"bundle":\0bundle\0,"degraded":\0cause\0,'
        f'"decision_id":"{prefix}\0partition\0-\0offset\0","duplicate":'
        + (first if repeated else 'false,"first_decision_id":null')
        + f',"event_time_ms":\0event\0,"decision_time_ms":\0decided\0,"latency_ms":{{{latencies}}}}}'
    )
    parts = template.split("\0")
    pieces = kernels.Words([piece.encode() for piece in parts[::2]])
    order = np.array([_FIELDS[name] for name in parts[1::2]], np.int64)
    return kernels.Template(pieces, order, _words(bundles), _FIRST_WORDS)


def _words(bundles: tuple[str, ...]) -> kernels.Words:
    """All words: actions, stages, causes with the field `degraded`, bundles as JSON."""
    causes = [
        b'true,"degraded_cause":"%s"' % cause.encode() if cause else b'false,"degraded_cause":null' for cause in CAUSES
    ]
    names = [*(name.encode() for name in (*ACTIONS, *STAGES)), *causes]
    return kernels.Words([*names, *map(msgspec.json.encode, bundles)])


_FIRST_WORDS = np.cumsum([0, len(ACTIONS), len(STAGES), len(CAUSES)])


def _json(table: Table, chosen: Int64, transaction_ids: Int64) -> ByteColumn | None:
    rows = table.rows
    scores = np.empty(2 * len(chosen))
    repeated = both_scores(rows, chosen, scores)
    template, tokens = _template(table.topic, repeated, table.bundles), msgspec.json.encode(scores.tolist())
    return kernels.write_decisions(template, rows, chosen, transaction_ids, tokens, repeated)
