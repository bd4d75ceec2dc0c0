"""The steps' work on the table that needs no other state, compiled by numba: a call for a whole micro-batch.

They keep Python's lock: a call takes a few microseconds, and to take the lock again could take a thread switch. They
write arrays to their arguments: a kernel that returns one costs several times as much.
"""

from __future__ import annotations

import numpy as np

from cascade.columns import INT64_MAX, Array, Float64, Int64
from cascade.compilation import kernel
from cascade.escalation_budget import CONTROL, choose_row
from streaming.codecs.ahead import is_ahead
from streaming.pipeline.row import ROW


@kernel
def fill(
    rows: Array, records: Int64, event_times_ms: Int64, partition_id: int, offsets: Int64, timestamps_ms: Int64,
    until: int, ahead: Int64, now_ms: float, from_append: bool, tolerance_ms: int, order_keys: Int64,
    arrivals: Float64,
) -> tuple[int, int]:  # fmt: skip
    """Fills the columns of the steps `fetch` and `decode` for the readable records of a fetch.

    rows: of the table, [readable]. records (int64, [readable]): their positions in the fetch. event_times_ms (int64,
    [readable]). offsets, timestamps_ms (int64): of all records of the fetch. until, ahead: as in Decided. from_append:
    whether deadlines count from the timestamp. tolerance_ms: as for `too_far_ahead`. order_keys (int64, [readable]):
    gets the latest event time up to each row. arrivals (float64, [2]): the least wait of records so far, ms, and the
    number of records with a timestamp after `now_ms`; those of the fetch are added.

    Returns the number of undecided rows, and of rows whose event is too far ahead.
    """
    latest, undecided, early = -INT64_MAX - 1, 0, 0
    last_ahead = ahead[-1] if len(ahead) else -1
    for row in range(len(rows)):
        record = records[row]
        offset, appended_ms, event_time_ms = offsets[record], timestamps_ms[record], event_times_ms[row]
        latest = max(latest, event_time_ms)
        order_keys[row] = latest
        decided = offset < until
        if not decided and offset <= last_ahead:
            place = np.searchsorted(ahead, offset)
            decided = place < len(ahead) and ahead[place] == offset
        into = rows[row]
        into.partition_id, into.offset, into.appended_ms = partition_id, offset, appended_ms
        into.event_time_ms, into.undecided = event_time_ms, not decided
        into.was_escalated = not decided and offset < last_ahead
        # a broker's clock ahead of ours must not make a wait negative
        into.start_ms = min(float(appended_ms), now_ms) if from_append else now_ms
        into.queue_ms = now_ms - into.start_ms
        into.entry = into.first = into.first_offset = -1
        undecided += not decided
        early += is_ahead(event_time_ms, appended_ms, tolerance_ms)
    for stamp in timestamps_ms:
        if stamp >= 0:  # else a record without a timestamp
            arrivals[0] = min(arrivals[0], now_ms - stamp)
            arrivals[1] += stamp > now_ms
    return undecided, early


@kernel
def mark_screened(
    rows: Array, probability: Float64, escalation_scores: Float64, control: Array, features_ms: float,
    screener_ms: float, found: Int64, queue_s: Float64,
) -> tuple[int, int]:  # fmt: skip
    """Fills the columns of the steps `features` and `screen`; the score that decides is the screener's for now.

    probability, escalation_scores (float64, [rows]): by the policy. control: of the EscalationBudget, which chooses
    among the undecided rows. found (int64, [rows]): gets the positions of the undecided rows, first of those that the
    screener decides, then of those to escalate. queue_s (float64, [rows]): gets the seconds that each undecided row has
    waited before its micro-batch began. Returns where the positions of the first end, and of the second.
    """
    clear = 0
    for row in range(len(rows)):
        into = rows[row]
        into.screener_score = into.score = probability[row]
        into.features_ms, into.screener_ms = features_ms, screener_ms
        into.escalate = into.undecided and choose_row(control, escalation_scores[row], into.was_escalated)
        clear += into.undecided and not into.escalate
    place, later, waits = 0, clear, 0
    for row in range(len(rows)):
        if not rows[row].undecided:
            continue
        queue_s[waits] = rows[row].queue_ms / 1e3
        waits += 1
        if rows[row].escalate:
            found[later] = row
            later += 1
        else:
            found[place] = row
            place += 1
    return clear, later


@kernel
def copy_records(rows: Array, chosen: Int64, partition_ids: Int64, offsets: Int64, start_ms: Float64) -> int:
    """Copies columns of the rows with these positions, at least one; returns their partition id, -1 for several."""
    several = False
    for number in range(len(chosen)):
        row = rows[chosen[number]]
        partition_ids[number], offsets[number], start_ms[number] = row.partition_id, row.offset, row.start_ms
        several |= partition_ids[number] != partition_ids[0]
    return -1 if several else int(partition_ids[0])


@kernel
def both_scores(rows: Array, chosen: Int64, scores: Float64) -> bool:
    """Writes the score and the screener's score of the rows with these positions, in turn, float64 [2 · chosen].

    Returns whether the first of them, if there is one, repeats an earlier transaction.
    """
    for number in range(len(chosen)):
        row = rows[chosen[number]]
        scores[2 * number], scores[2 * number + 1] = row.score, row.screener_score
    return len(chosen) > 0 and bool(rows[chosen[0]].first_offset >= 0)


@kernel
def stage_and_cause(rows: Array, row: int) -> tuple[int, int]:
    """Returns the columns `stage` and `cause` of a row."""
    return rows[row].stage, rows[row].cause


@kernel
def latencies(start_ms: Float64, acknowledged_s: Float64, counts: Int64, latency_s: Float64) -> None:
    """Writes the seconds from each start (float64 [rows], ms) to its acknowledgement, at least 0, float64 [rows].

    acknowledged_s (float64), counts (int64), [acknowledgements]: each is of so many rows.
    """
    row = 0
    for number in range(len(counts)):
        for _ in range(counts[number]):
            latency_s[row] = max(1e3 * acknowledged_s[number] - start_ms[row], 0.0) / 1e3
            row += 1


@kernel
def by_screener(rows: Array, chosen: Int64, cause: int, deep_ms: float) -> None:
    """Fills the columns of the step `escalate` for rows that the screener decides; `cause`: index into CAUSES."""
    for row in chosen:
        into = rows[row]
        into.score, into.stage, into.cause, into.deep_ms = into.screener_score, 0, cause, deep_ms


@kernel
def decide(rows: Array, chosen: Int64, review_from: float, decline_from: float, now_ms: float) -> None:
    """Fills the columns of the step `decide`, from the thresholds of the policy."""
    for row in chosen:
        into = rows[row]
        into.action = (into.score >= review_from) + (into.score >= decline_from)
        into.decided_ms = now_ms


def warm_up_table() -> None:
    """Compiles the kernels ahead of the first micro-batch."""
    rows, none, first = np.zeros(0, ROW), np.zeros(0, np.int64), np.zeros(1, np.int64)
    fill(rows, none, none, 0, none, none, 0, none, 0.0, True, 0, none, np.zeros(2))
    mark_screened(rows, np.zeros(0), np.zeros(0), np.zeros(1, CONTROL), 0.0, 0.0, none, np.zeros(0))
    both_scores(rows, none, np.zeros(0))
    latencies(np.zeros(0), np.zeros(0), none, np.zeros(0))
    one_row = np.zeros(1, ROW)
    copy_records(one_row, first, first.copy(), first.copy(), np.zeros(1))
    stage_and_cause(one_row, 0)
    by_screener(rows, none, 0, 0.0)
    decide(rows, none, 0.0, 0.0, 0.0)
