"""The columns of the table of transactions in flight, by the step of the pipeline that fills them."""

from __future__ import annotations

import numpy as np

# Times in ms since the epoch, durations in ms, scores are calibrated probabilities of fraud.
COLUMNS: dict[str, list[tuple[str, type[np.generic]]]] = {
    "fetch": [("partition_id", np.int64), ("offset", np.int64), ("appended_ms", np.int64)],
    # undecided: False for a record that had its decision before a restart, and is read only to rebuild the state.
    # was_escalated: the previous owner of the partition had escalated it, since later records have their decision.
    # start_ms: when its deadline begins to count. queue_ms: from there to the start of the micro-batch.
    "decode": [
        ("event_time_ms", np.int64), ("undecided", np.bool_), ("was_escalated", np.bool_), ("start_ms", np.float64),
        ("queue_ms", np.float64),
    ],
    # entry: its own in the cache of first decisions, or -1. first: of the transaction that it repeats, or -1.
    "deduplicate": [("entry", np.int64), ("first", np.int64)],
    "features": [("features_ms", np.float64)],
    "screen": [("screener_score", np.float64), ("screener_ms", np.float64), ("escalate", np.bool_)],
    # score, stage, cause: which stage gave the score that decides, and why the deep model did not, see `decisions`.
    "escalate": [("score", np.float64), ("stage", np.uint8), ("cause", np.uint8), ("deep_ms", np.float64)],
    # bundle: index into the table's bundles. first_offset: of the transaction that it repeats, or -1.
    "decide": [
        ("action", np.uint8), ("decided_ms", np.float64), ("bundle", np.int64), ("first_offset", np.int64),
    ],
}  # fmt: skip
# numba takes a structured array as one argument, whatever the number of its columns.
ROW = np.dtype([column for columns in COLUMNS.values() for column in columns], align=True)
