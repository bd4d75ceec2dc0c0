"""What must hold after every run, whatever went wrong in it; each breach is a line."""

from __future__ import annotations

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
from bench.faults.schedule import Options
from bench.faults.traffic import SCHEMA, feature_spec, label_codec, transaction_codec
from cascade.columns import ColumnBatch
from cascade.engine import Engine
from cascade.features import FeatureEngine
from streaming.clients import Partition
from streaming.codecs import Codec
from streaming.dead_letters import HEADER_PREFIX
from streaming.decisions import Decision, decode_decision
from streaming.offsets import Decided

# Of one kind of breach so many are told; a run that went wrong went wrong in many places.
TOLD_MAX = 3


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be said of one readable record.

    `first`: the offset of the record that it repeats, -1 where it is a first one. The scores are probabilities;
    `escalated`: whether the screener is unsure. They mean nothing for repeats.
    """

    card: int
    first: int
    screener_score: float
    deep_score: float
    escalated: bool


@dataclass(frozen=True, slots=True)
class Reference:
    """One partition's log folded by a fresh engine, without any fault."""

    expected: dict[int, Expected]
    unreadable: set[int]
    state: str


@dataclass(frozen=True, slots=True)
class Said:
    """One decision that can be read: where it lies, and who sent it when."""

    place: Partition
    record: Record
    decision: Decision


class Oracle:
    """Judges one run by its logs, and its last workers by their state."""

    def __init__(self, options: Options, broker: SimBroker, processes: Sequence[SimProcess]) -> None:
        self._options, self._broker, self._processes = options, broker, processes
        self._topics = options.config.kafka.topics
        self._transactions = broker.partitions(self._topics.transactions)
        self._exactly = options.config.delivery == "exactly-once"
        self._codec = transaction_codec(options)
        self._references = {one: self._reference(one) for one in self._transactions}

    def judge(self) -> list[str]:
        """The breaches in what was decided, buried and committed."""
        said = self._said()
        checks = {
            "decisions": self._decision_breaches(said),
            "repeats": self._repeat_breaches(said),
            "duplicates": self._duplicate_breaches(said),
            "scores": self._score_breaches(said),
            "order": self._order_breaches(said),
            "dead letters": self._letter_breaches(),
            "commits": self._commit_breaches(),
        }
        breaches = []
        for name, found in checks.items():
            lines = list(found)
            breaches += [f"{name}: {line}" for line in lines[:TOLD_MAX]]
            if len(lines) > TOLD_MAX:
                breaches.append(f"{name}: and {len(lines) - TOLD_MAX} more")
        return breaches

    def judge_state(self) -> list[str]:
        """The breaches in the state of those that own partitions now: each equals the fold of its log."""
        breaches = []
        labels = self._label_state()
        for process in self._processes:
            if process.ended or process.worker is None or not process.worker.positions:
                continue
            features = process.engine.features
            for partition in process.worker.positions:
                if features.digest(partition[1]) != self._references[partition].state:
                    breaches.append(f"state: {process.life.name} has another state of {partition} than the log gives")
            if features.digest_labels() != labels:
                breaches.append(f"state: {process.life.name} has other labels than the log gives")
        return breaches

    # --- what the log says --------------------------------------------------------------------------------------

    def _reference(self, partition: Partition) -> Reference:
        records = kept(self._broker.logs[partition])
        decoded = self._codec.decode([one.value for one in records])
        batch, rows = decoded.batch, [records[row] for row in decoded.rows.tolist()]
        firsts = self._firsts(batch, rows)
        fresh = np.array([first < 0 for first in firsts], bool)
        features = FeatureEngine(feature_spec(self._options.terminals), SCHEMA)
        engine = Engine(features, SimScreener(), POLICY)
        chosen = batch.take(fresh)
        sources = np.full(chosen.rows, partition[1], np.int64)
        screened = engine.screen(chosen, sources)
        deep = POLICY.deep.probability(deep_score(screened.deep_inputs(np.arange(chosen.rows))))
        place = np.cumsum(fresh) - 1
        expected = {
            record.offset: Expected(
                int(batch["card_id"][row]),
                firsts[row],
                float(screened.probability[place[row]]) if fresh[row] else 0.0,
                float(deep[place[row]]) if fresh[row] else 0.0,
                bool(screened.escalate[place[row]]) if fresh[row] else False,
            )
            for row, record in enumerate(rows)
        }
        unreadable = {records[reject.index].offset for reject in decoded.rejects}
        return Reference(expected, unreadable, features.digest(partition[1]))

    def _firsts(self, batch: ColumnBatch, rows: Sequence[Record]) -> list[int]:
        """Of each row the offset of the record that it repeats, or -1: by `duplicates.window_s` and the log's clock."""
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
            features.update_labels(label_codec(self._options).decode(
                [one.value for one in kept(self._broker.logs[partition])]
            ).batch)  # fmt: skip
        return features.digest_labels()

    def _said(self) -> dict[str, list[Said]]:
        """Decisions that can be read, by id, in the order of their logs."""
        said: dict[str, list[Said]] = defaultdict(list)
        for place in self._broker.partitions(self._topics.decisions):
            for record in kept(self._broker.logs[place]):
                decision = decode_decision(record.value or b"", self._options.config.kafka.codec)
                said[decision.decision_id].append(Said(place, record, decision))
        return said

    def _each(self) -> Iterator[tuple[str, Expected]]:
        for (topic, number), reference in self._references.items():
            for offset, expected in reference.expected.items():
                yield f"{topic}-{number}-{offset}", expected

    # --- breaches -----------------------------------------------------------------------------------------------

    def _decision_breaches(self, said: Mapping[str, list[Said]]) -> Iterator[str]:
        wanted = {name for name, _ in self._each()}
        for name in wanted - said.keys():
            yield f"{name} was lost"
        for name in said.keys() - wanted:
            yield f"{name} was decided and is no readable record"
        for name, found in said.items():
            if self._exactly and len(found) > 1:
                yield f"{name} was decided {len(found)} times: by {', '.join(one.record.sender for one in found)}"

    def _repeat_breaches(self, said: Mapping[str, list[Said]]) -> Iterator[str]:
        """Nobody decides what was decided by the commit from which it went on."""
        sessions = {name: one for process in self._processes for name, one in process.sessions.items()}
        for name, found in said.items():
            topic, number, offset = name.rsplit("-", 2)
            for one in found:
                decided = _decided_before(sessions[one.record.sender], (topic, int(number)), one.record.sent_s)
                if decided.mask(np.array([int(offset)]))[0]:
                    yield f"{one.record.sender} decided {name} again, which its commit says is decided"

    def _duplicate_breaches(self, said: Mapping[str, list[Said]]) -> Iterator[str]:
        for name, expected in self._each():
            stem = name.rpartition("-")[0]
            first_id = f"{stem}-{expected.first}" if expected.first >= 0 else None
            for one in said.get(name, []):
                if one.decision.first_decision_id != first_id or one.decision.duplicate != (first_id is not None):
                    yield f"{name} repeats {one.decision.first_decision_id}, must repeat {first_id}"
                elif first_id is not None:
                    firsts = [_content(other.decision) for other in said.get(first_id, [])]
                    if _content(one.decision) not in firsts:
                        yield f"{name} says {_content(one.decision)}, its first {first_id} {firsts}"

    def _score_breaches(self, said: Mapping[str, list[Said]]) -> Iterator[str]:
        raises = self._options.config.overload.raise_max > 0
        for name, expected in self._each():
            if expected.first >= 0:
                continue
            for one in said.get(name, []):
                decision = one.decision
                if decision.stage == "screener" and decision.score != decision.screener_score:
                    yield f"{name}: the screener decided, by another score than its own"
                if decision.degraded and decision.stage != "screener":
                    yield f"{name}: degraded, and decided by the deep model"
                if self._options.terminals:
                    continue
                if decision.screener_score != expected.screener_score:
                    yield f"{name}: screener score {decision.screener_score}, must be {expected.screener_score}"
                if decision.stage == "deep" and decision.score != expected.deep_score:
                    yield f"{name}: deep score {decision.score}, must be {expected.deep_score}"
                escalated = decision.stage == "deep" or decision.degraded
                if escalated != expected.escalated and not (raises and expected.escalated):
                    yield f"{name}: escalated {escalated}, must be {expected.escalated}"

    def _order_breaches(self, said: Mapping[str, list[Said]]) -> Iterator[str]:
        """Of a card, what shows as sure of the screener shows in the order of the log.

        With at-least-once delivery what a lost session had sent and not committed is decided again, and there may be
        escalated once and screened the next time: either the first decisions are in order, or the last ones.
        """
        by_card: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
        for name, expected in self._each():
            stem, _, offset = name.rpartition("-")
            found = said.get(name, [])
            if found and all(is_screened(one.decision) for one in found):
                places = (found[0].record.offset, found[-1].record.offset)
                by_card[stem, expected.card].append((*places, int(offset)))
        for (stem, card), rows in by_card.items():
            firsts = [offset for _, _, offset in sorted(rows)]
            lasts = [offset for _, offset in sorted((last, offset) for _, last, offset in rows)]
            if firsts != sorted(firsts) and lasts != sorted(lasts):
                yield f"card {card} of {stem}: decided in the order {firsts}"

    def _letter_breaches(self) -> Iterator[str]:
        buried: dict[tuple[Partition, int], int] = defaultdict(int)
        for place in self._broker.partitions(self._topics.dead_letters):
            for record in kept(self._broker.logs[place]):
                headers = {name.removeprefix(HEADER_PREFIX): (value or b"").decode() for name, value in record.headers}
                buried[(headers["topic"], int(headers["partition"])), int(headers["offset"])] += 1
        wanted = {(one, offset) for one, reference in self._references.items() for offset in reference.unreadable}
        codec = label_codec(self._options)
        for partition in self._broker.partitions(self._topics.labels):
            wanted |= {(partition, offset) for offset in _unreadable(codec, self._broker.logs[partition])}
        for one in wanted - buried.keys():
            yield f"{one} has no dead letter"
        for one, count in buried.items():
            if one not in wanted:
                yield f"{one} has a dead letter and can be read"
            elif self._exactly and count > 1:
                yield f"{one} has {count} dead letters"

    def _commit_breaches(self) -> Iterator[str]:
        """The commits stand at the end of what is decided, and never went back.

        A commit of offsets alone (at-least-once) can come late, after the next one, and put the group back: what is
        between is decided again under the same ids. With a transaction that must not be.
        """
        group = self._broker.group
        for partition in self._transactions:
            records = kept(self._broker.logs[partition])
            offset, metadata = committed(group, partition, self._exactly)
            ahead = Decided.from_commit(offset, metadata).ahead
            if records and (offset <= records[-1].offset or offset > self._broker.logs[partition].end):
                yield f"{partition}: committed {offset}, the last record is {records[-1].offset}"
            if len(ahead):
                yield f"{partition}: all is decided, and the commit says ahead of {offset}: {ahead.tolist()}"
        newest: dict[Partition, int] = defaultdict(int)
        for commit in group.commits:
            late = commit.asked < newest[commit.partition]
            if commit.offset < commit.before and (self._exactly or not late):
                yield f"{commit.partition}: the commit moved back from {commit.before} to {commit.offset}"
            newest[commit.partition] = max(newest[commit.partition], commit.asked)


def is_screened(decision: Decision) -> bool:
    """Whether the screener was sure: a first decision, which was neither escalated nor meant to be."""
    return decision.stage == "screener" and not decision.degraded and not decision.duplicate


def committed(group: Group, partition: Partition, exactly: bool) -> tuple[int, str]:
    """Offset and metadata at which the group stands, or, where a late commit may put it back, was last put."""
    return group.offsets.get(partition, (0, "")) if exactly else group.newest(partition)


def kept(log: PartitionLog) -> list[Record]:
    """The records that readers of what is committed see."""
    return [one for one in log.records if one.state == "kept"]


def _unreadable(codec: Codec, log: PartitionLog) -> set[int]:
    records = kept(log)
    return {records[reject.index].offset for reject in codec.decode([one.value for one in records]).rejects}


def _decided_before(session: SimConsumer, partition: Partition, sent_s: float) -> Decided:
    """What the session knew to be decided when it sent something."""
    offset, metadata = 0, ""
    for time_s, one, read_offset, read_metadata in session.reads:
        if one == partition and time_s <= sent_s:
            offset, metadata = read_offset, read_metadata
    return Decided.from_commit(offset, metadata)


def _content(decision: Decision) -> tuple[str, float, str, float, str | None]:
    return (
        decision.decision, decision.score, decision.stage, decision.screener_score, decision.degraded_cause,
    )  # fmt: skip
