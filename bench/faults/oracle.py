"""Checks what must hold after every run, whatever faults struck; each breach is a line."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.faults.broker import SimBroker
from bench.faults.consumer import SimConsumer
from bench.faults.group import Group
from bench.faults.logs import PartitionLog, Record
from bench.faults.model import SimScreener, deep_score
from bench.faults.process import POLICY, SimProcess
from bench.faults.schedule import AMPLE_BUDGET, Options
from bench.faults.traffic import SCHEMA, feature_spec, label_codec, transaction_codec
from cascade.columns import ColumnBatch
from cascade.engine import Engine
from cascade.escalation_budget import SAMPLE_ROWS_MIN
from cascade.features import FeatureEngine
from cascade.policy import uncertainty
from streaming.codecs import Codec
from streaming.kafka import Partition
from streaming.pipeline.dead_letters import HEADER_PREFIX
from streaming.pipeline.decisions import Decision, decode_decision
from streaming.pipeline.offsets import Decided

# Breaches that a check lists; a bug usually causes many of one kind.
BREACHES_SHOWN_MAX = 3


@dataclass(frozen=True, slots=True)
class Expected:
    """The expected decision about a readable record.

    `first_id`: the decision id of the record that it repeats, None if it is no repeat. The scores are probabilities;
    they and `in_band` have no meaning for repeats. Whether a record in the band is escalated depends
    on the budget, and so on all that its worker has decided before.
    """

    card: int
    first_id: str | None
    screener_score: float
    deep_score: float
    in_band: bool


@dataclass(frozen=True, slots=True)
class Reference:
    """A partition's log, folded by a fresh engine without faults.

    `expected`: by decision id, in the order of the log. `unreadable`: offsets. `state`: the digest.
    """

    expected: dict[str, Expected]
    unreadable: set[int]
    state: str


# The committed decisions with their records, by decision id, in the order of their logs.
Published = Mapping[str, list[tuple[Record, Decision]]]


class Oracle:
    """Checks one run by its logs, and its last workers by their state."""

    def __init__(self, options: Options, broker: SimBroker, processes: Sequence[SimProcess]) -> None:
        self._options, self._broker, self._processes = options, broker, processes
        self._topics = options.config.kafka.topics
        self._transactions = broker.partitions(self._topics.transactions)
        self._exactly_once = options.config.delivery == "exactly-once"
        self._codec = transaction_codec(options)
        self._references = {partition: self._reference(partition) for partition in self._transactions}

    def check_logs(self) -> list[str]:
        """The breaches in the decisions, dead letters and commits."""
        published = self._published()
        checks = {
            "decisions": self._decision_breaches(published),
            "repeats": self._repeat_breaches(published),
            "duplicates": self._duplicate_breaches(published),
            "scores": self._score_breaches(published),
            "budget": self._budget_breaches(published),
            "order": self._order_breaches(published),
            "dead letters": self._dead_letter_breaches(),
            "commits": self._commit_breaches(),
        }
        breaches = []
        for name, found in checks.items():
            lines = list(found)
            breaches += [f"{name}: {line}" for line in lines[:BREACHES_SHOWN_MAX]]
            if len(lines) > BREACHES_SHOWN_MAX:
                breaches.append(f"{name}: and {len(lines) - BREACHES_SHOWN_MAX} more")
        return breaches

    def check_states(self) -> list[str]:
        """The breaches in the state of the workers that own partitions: it must equal the fold of the logs."""
        breaches = []
        labels = self._label_state()
        for process in self._processes:
            if process.ended or process.worker is None or not process.worker.positions:
                continue
            features = process.engine.features
            for partition in process.worker.positions:
                if features.digest(partition[1]) != self._references[partition].state:
                    breaches.append(f"state: of {process.life.name} for {partition} differs from the fold of the log")
            if features.digest_labels() != labels:
                breaches.append(f"state: of {process.life.name} for labels differs from the fold of the log")
        return breaches

    # --- the logs -----------------------------------------------------------------------------------------------

    def _reference(self, partition: Partition) -> Reference:
        records = self._broker.logs[partition].committed_records()
        decoded = self._codec.decode([record.value for record in records])
        batch, rows = decoded.batch, [records[row] for row in decoded.rows.tolist()]
        firsts = self._firsts(batch, rows)
        fresh = np.flatnonzero(np.array(firsts, np.int64) < 0)
        features = FeatureEngine(feature_spec(self._options.terminals), SCHEMA)
        engine = Engine(features, SimScreener(), POLICY)
        chosen = batch.take(fresh)
        screened = engine.screen(chosen, np.full(chosen.rows, partition[1], np.int64))
        deep_raw = deep_score(screened.deep_inputs(np.arange(chosen.rows)))
        deep = POLICY.combined.probability(screened.raw, deep_raw)
        in_band = uncertainty(screened.raw, POLICY.escalation.centre) > POLICY.escalation.threshold
        figures = np.zeros((3, batch.rows))
        figures[:, fresh] = screened.probability, deep, in_band
        ids = [f"{partition[0]}-{partition[1]}-{offset}" for offset in range(self._broker.logs[partition].end)]
        expected = {
            ids[record.offset]: Expected(card, ids[first] if first >= 0 else None, screener, deep, bool(in_band))
            for record, first, card, (screener, deep, in_band) in zip(
                rows, firsts, batch["card_id"].tolist(), figures.T.tolist(), strict=True
            )
        }
        unreadable = {records[reject.index].offset for reject in decoded.rejects}
        return Reference(expected, unreadable, features.digest(partition[1]))

    def _firsts(self, batch: ColumnBatch, rows: Sequence[Record]) -> list[int]:
        """For each row the offset of the record that it repeats within `duplicates.window_s` of append time, or -1."""
        window_ms = round(self._options.config.duplicates.window_s * 1e3)
        known: dict[tuple[int, int, float], tuple[int, int]] = {}
        firsts = []
        columns = (batch["transaction_id"].tolist(), batch["card_id"].tolist(), batch["amount"].tolist())
        for identity, record in zip(zip(*columns, strict=True), rows, strict=True):
            offset, time_ms = known.get(identity, (-1, 0))
            if window_ms == 0 or offset < 0 or record.time_ms - time_ms > window_ms:
                known[identity] = (record.offset, record.time_ms)
                offset = -1
            firsts.append(offset)
        return firsts

    def _label_state(self) -> str:
        features = FeatureEngine(feature_spec(self._options.terminals), SCHEMA)
        for partition in self._broker.partitions(self._topics.labels):
            values = [record.value for record in self._broker.logs[partition].committed_records()]
            features.update_labels(label_codec(self._options).decode(values).batch)
        return features.digest_labels()

    def _published(self) -> Published:
        published = defaultdict(list)
        for partition in self._broker.partitions(self._topics.decisions):
            for record in self._broker.logs[partition].committed_records():
                decision = decode_decision(record.value or b"", self._options.config.kafka.codec)
                published[decision.decision_id].append((record, decision))
        return published

    def _expected(self) -> Iterator[tuple[str, Expected]]:
        """Decision id and expected decision of every readable transaction."""
        for reference in self._references.values():
            yield from reference.expected.items()

    # --- breaches -----------------------------------------------------------------------------------------------

    def _decision_breaches(self, published: Published) -> Iterator[str]:
        expected = {decision_id for decision_id, _ in self._expected()}
        for decision_id in sorted(expected - published.keys()):
            yield f"{decision_id} was lost"
        for decision_id in sorted(published.keys() - expected):
            yield f"{decision_id} was decided, but is no readable record"
        for decision_id, found in published.items():
            if self._exactly_once and len(found) > 1:
                senders = ", ".join(record.sender for record, _ in found)
                yield f"{decision_id} was decided {len(found)} times: by {senders}"

    def _repeat_breaches(self, published: Published) -> Iterator[str]:
        """No session may decide a record that was decided according to the commit from which it resumed."""
        sessions = {name: session for process in self._processes for name, session in process.sessions.items()}
        for decision_id, found in published.items():
            topic, number, offset = decision_id.rsplit("-", 2)
            for record, _ in found:
                decided = _decided_before(sessions[record.sender], (topic, int(number)), record.sent_s)
                if decided.mask(np.array([int(offset)]))[0]:
                    yield f"{record.sender} decided {decision_id} again, though its commit contains it"

    def _duplicate_breaches(self, published: Published) -> Iterator[str]:
        for decision_id, expected in self._expected():
            first_id = expected.first_id
            for _, decision in published.get(decision_id, []):
                if decision.first_decision_id != first_id or decision.duplicate != (first_id is not None):
                    yield f"{decision_id} repeats {decision.first_decision_id}, must repeat {first_id}"
                elif first_id is not None:
                    firsts = [_content(first) for _, first in published.get(first_id, [])]
                    if _content(decision) not in firsts:
                        yield f"{decision_id} decides {_content(decision)}, its first decision {first_id} {firsts}"

    def _score_breaches(self, published: Published) -> Iterator[str]:
        learning = {
            name
            for process in self._processes
            if process.engine.escalation.rows_seen < SAMPLE_ROWS_MIN
            for name in process.sessions
        }
        for decision_id, expected in self._expected():
            if expected.first_id is not None:
                continue
            for record, decision in published.get(decision_id, []):
                if decision.stage == "screener" and decision.score != decision.screener_score:
                    yield f"{decision_id}: the screener decided by a score that is not its own"
                if decision.degraded and decision.stage != "screener":
                    yield f"{decision_id}: degraded, but decided by the deep model"
                if self._options.terminals:
                    continue
                if decision.screener_score != expected.screener_score:
                    yield f"{decision_id}: screener score {decision.screener_score}, must be {expected.screener_score}"
                if decision.stage == "deep" and decision.score != expected.deep_score:
                    yield f"{decision_id}: deep score {decision.score}, must be {expected.deep_score}"
                if not _is_screened(decision) and record.sender in learning and not expected.in_band:
                    yield f"{decision_id}: escalated, though it is outside the band"

    def _budget_breaches(self, published: Published) -> Iterator[str]:
        """A process must not escalate what its budget did not count, nor refuse more than its budget does.

        The level of its bucket gives how many rows it has chosen: each row brings a share of a token, each chosen row
        takes one; the runs are too short for a bucket to overflow. Without overload only, which changes the shares.
        """
        if self._options.config.overload.factor_min < 1.0:
            return
        budget = self._options.escalation_budget
        for process in self._processes:
            control = process.engine.escalation
            chosen = round(budget * control.rows_seen - control.level)
            found = [
                (decision_id, decision)
                for decision_id, records in published.items()
                for record, decision in records
                if record.sender in process.sessions and not decision.duplicate
            ]
            escalated = sum(not _is_screened(decision) for _, decision in found)
            if escalated > chosen:
                yield f"{process.life.name} escalated {escalated}, and its budget counted {chosen}"
            if budget < AMPLE_BUDGET or self._options.terminals or control.rows_seen >= SAMPLE_ROWS_MIN:
                continue
            expected = dict(self._expected())
            refused = sum(expected[name].in_band for name, decision in found if _is_screened(decision))
            # one before there is a token, and one for each hundred that the budget leaves out
            if refused > 1 + math.ceil((1.0 - budget) * control.rows_seen):
                yield f"{process.life.name} screened {refused} transactions of the band, with a budget of {budget:g}"

    def _order_breaches(self, published: Published) -> Iterator[str]:
        """The screened decisions of a card must come in the order of the log.

        With at-least-once delivery a session decides again what a lost session sent and did not commit, and may screen
        a transaction that was escalated before. So either the first decisions are in order, or the last ones.
        """
        by_card: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
        for decision_id, expected in self._expected():
            stem, _, offset = decision_id.rpartition("-")
            found = published.get(decision_id, [])
            if found and all(_is_screened(decision) for _, decision in found):
                (first, _), (last, _) = found[0], found[-1]
                by_card[stem, expected.card].append((first.offset, last.offset, int(offset)))
        for (stem, card), rows in by_card.items():
            firsts = [offset for _, _, offset in sorted(rows)]
            lasts = [offset for _, offset in sorted((last, offset) for _, last, offset in rows)]
            if firsts != sorted(firsts) and lasts != sorted(lasts):
                yield f"card {card} of {stem}: decided in the order {firsts}"

    def _dead_letter_breaches(self) -> Iterator[str]:
        found: dict[tuple[Partition, int], int] = defaultdict(int)
        for partition in self._broker.partitions(self._topics.dead_letters):
            for record in self._broker.logs[partition].committed_records():
                headers = {name.removeprefix(HEADER_PREFIX): (value or b"").decode() for name, value in record.headers}
                found[(headers["topic"], int(headers["partition"])), int(headers["offset"])] += 1
        unreadable = {(partition, each) for partition, of in self._references.items() for each in of.unreadable}
        codec = label_codec(self._options)
        for partition in self._broker.partitions(self._topics.labels):
            unreadable |= {(partition, offset) for offset in _unreadable(codec, self._broker.logs[partition])}
        for position in sorted(unreadable - found.keys()):
            yield f"{position} has no dead letter"
        for position, count in found.items():
            if position not in unreadable:
                yield f"{position} has a dead letter, but is readable"
            elif self._exactly_once and count > 1:
                yield f"{position} has {count} dead letters"

    def _commit_breaches(self) -> Iterator[str]:
        """The committed offsets must cover every decided record, and must never have moved back.

        A commit outside a transaction (at-least-once) can arrive after the next one and move the group back; the
        records between are then decided again under the same ids. A transaction's commit must not do that.
        """
        group = self._broker.group
        for partition in self._transactions:
            records = self._broker.logs[partition].committed_records()
            offset, metadata = committed(group, partition, self._exactly_once)
            ahead = Decided.from_commit(offset, metadata).ahead
            if records and (offset <= records[-1].offset or offset > self._broker.logs[partition].end):
                yield f"{partition}: committed {offset}, the last record is {records[-1].offset}"
            if len(ahead):
                yield f"{partition}: the commit of {offset} still names records decided ahead: {ahead.tolist()}"
        newest: dict[Partition, int] = defaultdict(int)
        for commit in group.commits:
            late = commit.request_number < newest[commit.partition]
            if commit.offset < commit.before and (self._exactly_once or not late):
                yield f"{commit.partition}: the commit moved back from {commit.before} to {commit.offset}"
            newest[commit.partition] = max(newest[commit.partition], commit.request_number)


def _is_screened(decision: Decision) -> bool:
    """Whether it is a first decision that was not escalated."""
    return decision.stage == "screener" and not decision.degraded and not decision.duplicate


def committed(group: Group, partition: Partition, exactly_once: bool) -> tuple[int, str]:
    """The group's offset and metadata; with at-least-once delivery those that were sent last (see `last_requested`)."""
    return group.offsets.get(partition, (0, "")) if exactly_once else group.last_requested(partition)


def _unreadable(codec: Codec, log: PartitionLog) -> set[int]:
    records = log.committed_records()
    return {records[reject.index].offset for reject in codec.decode([record.value for record in records]).rejects}


def _decided_before(session: SimConsumer, partition: Partition, sent_s: float) -> Decided:
    """The records that were decided according to the last commit that the session had read at `sent_s`."""
    offset, metadata = 0, ""
    for time_s, read_partition, read_offset, read_metadata in session.committed_reads:
        if read_partition == partition and time_s <= sent_s:
            offset, metadata = read_offset, read_metadata
    return Decided.from_commit(offset, metadata)


def _content(decision: Decision) -> tuple[object, ...]:
    """The fields that a repeat copies from its first decision."""
    names = ("decision", "score", "stage", "screener_score", "degraded_cause")
    return tuple(getattr(decision, name) for name in names)
