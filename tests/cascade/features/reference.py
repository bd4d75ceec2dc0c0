"""A slow feature engine in plain Python, of lists and dicts, which shares no code with the compiled engine.

It follows the rules of docs/features.md:

- a window contains the row itself and the stored events of its key with t − window < time ≤ t;
- a label window contains stored events and frauds with t − delay − window < time ≤ t − delay, without frauds that are
  older than the oldest stored event;
- before the engine reads a row, the row's key drops events with time ≤ its newest event (or the row) − the horizon,
  which is the longest reach of a window plus `lateness`; but it keeps as many events as its sequence has steps before
  the row. These count for windows, which do not reach so far unless the row is too late, and not for the others;
- after all features of a row are known and the row is stored, its sequence has it and the stored events before it;
- a key stores `events_per_key_max` events, the newest by time; all keys of a field share a pool of blocks of eight
  events, and the least recently used keys are evicted when it is full;
- a row, a label and a summary are uses of their keys; beyond `keys_max` the least recently used key is evicted;
- a row sees the events of its own partition and of partitions that are not hidden; of hidden partitions it sees the
  rows of summaries, all at the time of the newest row of their summary.

Sums are of whole ticks, in Python's integers, and quotients are fractions, so they are exact. The engine's divisions
and roots are right to a few units in the 53rd bit. Results are float32, so the two engines are *equal*, and the tests
can require it. Sums with summaries, which are float64, are exact where amounts are multiples of a quarter.
"""

from __future__ import annotations

import itertools
import math
from bisect import insort_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from operator import itemgetter
from typing import Any

import numpy as np

from cascade.columns import Float32
from cascade.durations import parse_ms
from cascade.features import FeatureSpec, KeyStatistics
from cascade.features.spec import LabelFeatures, WindowFeatures
from cascade.schema import Schema

Row = dict[str, Any]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BLOCK = 8
# Keys of a row that are no fields of the schema
PARTITION_ID, FROM_SUMMARY, STEP = "(partition id)", "(from summary)", "(step)"


@dataclass
class Chain:
    """Entries (time, content) in order of time, and of arrival where times are equal.

    `gap`: free places of the oldest block, which are not used again before the whole block is free.
    """

    entries: list[tuple[int, Any]] = field(default_factory=list)
    gap: int = 0

    @property
    def blocks(self) -> int:
        return math.ceil((self.gap + len(self.entries)) / BLOCK) if self.entries else 0

    @property
    def needs_block(self) -> bool:
        return (self.gap + len(self.entries)) % BLOCK == 0

    def add(self, time_ms: int, content: Any) -> None:
        insort_right(self.entries, (time_ms, content), key=itemgetter(0))

    def forget_oldest(self) -> None:
        self.entries.pop(0)
        self.gap = (self.gap + 1) % BLOCK if self.entries else 0

    def forget_up_to(self, time_ms: int, kept: int = 0) -> None:
        while len(self.entries) > kept and self.entries[0][0] <= time_ms:
            self.forget_oldest()

    def remove_if(self, is_removed: Callable[[Any], bool]) -> bool:
        """Whether an entry was removed."""
        before = len(self.entries)
        self.entries = [entry for entry in self.entries if not is_removed(entry[1])]
        self.gap = self.gap if self.entries else 0
        return len(self.entries) < before


@dataclass
class Memory:
    """The state of one key."""

    events: Chain = field(default_factory=Chain)
    frauds: Chain = field(default_factory=Chain)
    remotes: Chain = field(default_factory=Chain)


@dataclass(frozen=True)
class SummarisedRows:
    """A summary, with its rows. The time of its entry in a chain is that of the newest row."""

    partition_id: int
    start_ms: int
    rows: list[Row]


@dataclass(frozen=True)
class View:
    """What a row sees: itself, the stored events not after it (oldest first), and the times of frauds that count.

    Rows of summaries are among the events, and have the key FROM_SUMMARY. Events up to `forgotten_ms` are past the
    horizon.
    """

    row: Row
    time_ms: int
    earlier: list[tuple[int, Row]]
    fraud_times: list[int]
    forgotten_ms: int

    @property
    def recent(self) -> list[tuple[int, Row]]:
        """Earlier events within the horizon, oldest first."""
        return [event for event in self.earlier if event[0] > self.forgotten_ms]

    def window(self, window_ms: int) -> list[Row]:
        """Earlier rows in (t − window, t], oldest first, without the row itself."""
        return [row for time_ms, row in self.earlier if time_ms > self.time_ms - window_ms]

    def labelled(self, delay_ms: int, window_ms: int) -> tuple[int, int]:
        """Transactions and frauds in (t − delay − window, t − delay]."""
        last = self.time_ms - delay_ms
        events = sum(last - window_ms < time_ms <= last for time_ms, _ in self.earlier)
        return events, sum(last - window_ms < time_ms <= last for time_ms in self.fraud_times)


Compute = Callable[[View], float]


class KeyReference:
    """All keys of one key field, the least recently used first."""

    def __init__(self, spec: FeatureSpec, key: str, labelled: bool) -> None:
        self.key, self.labelled, self.limits = key, labelled, spec.limits
        self.columns: list[tuple[str, Compute]] = []
        self.reach_ms = self.kept = 0
        self.lateness_ms = parse_ms(spec.lateness)
        self.keys: OrderedDict[Any, Memory] = OrderedDict()
        self.evictions = self.late = self.too_late = 0
        self.hidden: set[int] = set()
        events = spec.limits.keys_max * spec.limits.events_per_key_mean
        blocks = {"events": events // BLOCK, "remotes": events // BLOCK, "frauds": events // BLOCK // BLOCK}
        self.blocks_max = {chain: count + spec.limits.keys_max + 1 for chain, count in blocks.items()}

    def use(self, key: Any) -> Memory:
        """Return the memory of a key, which becomes the latest used."""
        if key not in self.keys:
            if len(self.keys) == self.limits.keys_max:
                self.evict()
            self.keys[key] = Memory()
        self.keys.move_to_end(key)
        return self.keys[key]

    def evict(self) -> None:
        self.keys.popitem(last=False)
        self.evictions += 1

    def insert(self, chain_name: str, memory: Memory, time_ms: int, content: Any) -> bool:
        """Insert into a chain of the latest used key, within the limits; False where the entry is too old for that."""
        chain: Chain = getattr(memory, chain_name)
        if len(chain.entries) == self.limits.events_per_key_max:
            if time_ms < chain.entries[0][0]:
                return False
            chain.forget_oldest()
        if chain.needs_block:
            while sum(getattr(other, chain_name).blocks for other in self.keys.values()) == self.blocks_max[chain_name]:
                if len(self.keys) > 1:
                    self.evict()
                else:
                    chain.forget_oldest()
        chain.add(time_ms, content)
        return True

    def view(self, row: Row, time_ms: int) -> tuple[Memory, View, int]:
        memory = self.use(row[self.key])
        newest_ms = max([time_ms, *(event_ms for event_ms, _ in memory.events.entries[-1:])])
        self.late += newest_ms > time_ms
        forgotten_ms = newest_ms - self.reach_ms - self.lateness_ms
        memory.events.forget_up_to(forgotten_ms, self.kept)
        memory.frauds.forget_up_to(forgotten_ms)
        unseen = self.hidden - {row[PARTITION_ID]}
        if self.hidden:
            memory.remotes.forget_up_to(forgotten_ms)
        seen = [event for event in memory.events.entries if event[1][PARTITION_ID] not in unseen]
        remotes = [remote for remote in memory.remotes.entries if remote[1].partition_id in unseen]
        remotes = [remote for remote in remotes if remote[0] <= time_ms]
        earlier = [event for event in seen if event[0] <= time_ms]
        earlier += [(newest, row | {FROM_SUMMARY: True}) for newest, summary in remotes for row in summary.rows]
        earlier.sort(key=itemgetter(0))
        oldest_events = [event_ms for event_ms, _ in seen if event_ms > forgotten_ms] or [time_ms]
        oldest_ms = min([summary.start_ms for _, summary in remotes] + oldest_events)
        frauds = [fraud_ms for fraud_ms, _ in memory.frauds.entries if fraud_ms >= oldest_ms]
        return memory, View(row, time_ms, earlier, frauds, forgotten_ms), forgotten_ms

    def store(self, memory: Memory, row: Row, time_ms: int, forgotten_ms: int) -> None:
        if time_ms <= forgotten_ms or not self.insert("events", memory, time_ms, row):
            self.too_late += 1

    def forget(self, partition_id: int) -> None:
        for key, memory in list(self.keys.items()):
            gone = memory.events.remove_if(lambda row: row[PARTITION_ID] == partition_id)
            chains = memory.events, memory.frauds, memory.remotes
            if gone and not any(chain.entries for chain in chains):
                del self.keys[key]

    def fold_summary(self, key: Any, newest_ms: int, summary: SummarisedRows) -> None:
        stretch = summary.partition_id, summary.start_ms
        if key in self.keys:
            self.keys[key].remotes.remove_if(lambda earlier: (earlier.partition_id, earlier.start_ms) == stretch)
        if not summary.rows:
            return
        memory = self.use(key)
        newest_stored = [chain.entries[-1][0] for chain in (memory.events, memory.remotes) if chain.entries]
        forgotten_ms = max([newest_ms, *newest_stored]) - self.reach_ms - self.lateness_ms
        memory.remotes.forget_up_to(forgotten_ms)
        if newest_ms > forgotten_ms:
            self.insert("remotes", memory, newest_ms, summary)

    def label(self, key: Any, time_ms: int, identity: Any, fraud: int) -> None:
        memory = self.use(key)
        is_stored = any(stored == identity for _, stored in memory.frauds.entries)
        if is_stored and not fraud:
            memory.frauds.remove_if(lambda stored: stored == identity)
        if fraud and not is_stored:
            self.insert("frauds", memory, time_ms, identity)


class Reference:
    """Computes the features of rows, which are dicts by field name with categories as positions and times in ms."""

    def __init__(self, spec: FeatureSpec, schema: Schema) -> None:
        self.spec, self.schema = spec, schema
        self.roles = {name: str(getattr(schema.roles, name)) for name in schema.roles.__struct_fields__}
        self.delay_ms = parse_ms(schema.label.delay)
        self.parts: dict[str, KeyReference] = {}
        for group in spec.window:
            self._add_windows(self._part(group.key), group)
        for labels in spec.label_window:
            self._add_label_windows(self._part(labels.key), labels)
        for sequence in spec.sequence:
            self._part(sequence.key).kept = sequence.length - 1
        self.parts = dict(sorted(self.parts.items(), key=lambda item: item[0] == self.roles["card"]))
        self.stateless = [column for group in spec.transaction for column in self._stateless(group)]
        self.names = tuple(
            name for columns in (self.stateless, *(part.columns for part in self.parts.values())) for name, _ in columns
        )

    def field_of(self, name: str) -> str:
        """Return the field that a role or a field's own name means."""
        return self.roles.get(name, name)

    def ticks_per_unit(self, name: str) -> float:
        """Return the largest power of ten with which a value, and the sum over a key's events, are whole numbers."""
        bits = min(51, 60 - self.spec.limits.events_per_key_max.bit_length())
        field, ticks = self.schema.fields[name], Fraction(1)
        is_integer = field.type == "int64"
        size = max(abs(limit) for limit in field.limits())
        if math.isinf(size):
            size = 2**bits if is_integer else 10**9
        while not is_integer and ticks * 10 * Fraction(size) <= 2**bits:
            ticks *= 10
        while ticks * Fraction(size) > 2**bits:
            ticks /= 10
        return float(ticks)

    def _part(self, key: str) -> KeyReference:
        name = self.field_of(key)
        labelled = any(self.field_of(labels.key) == name for labels in self.spec.label_window)
        return self.parts.setdefault(name, KeyReference(self.spec, name, labelled))

    def _add_windows(self, part: KeyReference, group: WindowFeatures) -> None:
        amount, tag = self.field_of(group.field), self.field_of(group.distinct_field)
        for function in group.functions:
            if function == "seconds_since_last":
                part.columns.append((f"{group.key}_seconds_since_last", _seconds_since_last))
                continue
            if function == "same_as_last":
                part.columns.append((f"{group.key}_same_as_last_{group.distinct_field}", _same_as_last(tag)))
                continue
            if function == "ratio_to_last":
                part.columns.append((f"{group.key}_{group.field}_ratio_to_last", _ratio_to_last(amount)))
                continue
            for text in group.windows:
                named = ("distinct", "seen", "changes", "seconds_since_first")
                of_tags = {name: f"{name}_{group.distinct_field}" for name in named}
                middle = {"count": "count", **of_tags}.get(function, f"{group.field}_{function}")
                compute = _windowed(function, parse_ms(text), amount, tag, self.ticks_per_unit(amount))
                part.columns.append((f"{group.key}_{middle}_{text}", compute))
                part.reach_ms = max(part.reach_ms, parse_ms(text))

    def _add_label_windows(self, part: KeyReference, labels: LabelFeatures) -> None:
        for function in labels.functions:
            for text in labels.windows:
                middle = "labelled_count" if function == "count" else function
                compute = _labelled(function, self.delay_ms, parse_ms(text))
                part.columns.append((f"{labels.key}_{middle}_{text}", compute))
                part.reach_ms = max(part.reach_ms, self.delay_ms + parse_ms(text))

    def _stateless(self, group: Any) -> list[tuple[str, Compute]]:
        name = self.field_of(group.field)
        found: list[tuple[str, Compute]] = []
        for function in group.functions:
            if function == "one_hot":
                found += [
                    (f"{group.field}_{value}", _is_category(name, code))
                    for code, value in enumerate(self.schema.fields[name].values)
                ]
            elif function == "value":
                found.append((group.field, lambda view: view.row[name]))
            elif function == "category":
                found.append((f"{group.field}_category", lambda view: view.row[name]))
            elif function == "bucket":
                found.append((f"{group.field}_bucket", lambda view: _hash(view.row[name]) % group.buckets))
            else:
                found.append((function, _CLOCK[function]))
        return found

    def show(self, partition_id: int, shown: bool) -> None:
        """Show or hide a partition."""
        for part in self.parts.values():
            part.hidden = part.hidden - {partition_id} if shown else part.hidden | {partition_id}

    def forget(self, partition_id: int) -> None:
        """Drop the events of a partition."""
        for part in self.parts.values():
            part.forget(partition_id)

    def update(self, row: Row, partition_id: int = 0) -> tuple[Float32, Float32]:
        """Fold the next row; return its features float32 [width], and its sequences, one after the other in one row.

        A sequence is float32 [length, 2 + fields].
        """
        time_ms = row[self.schema.roles.event_time]
        row = row | {PARTITION_ID: partition_id}
        alone = View(row, time_ms, [], [], time_ms)
        found: dict[str, np.float32] = {name: np.float32(compute(alone)) for name, compute in self.stateless}
        memories = {}
        for key, part in self.parts.items():
            memory, view, forgotten_ms = part.view(row, time_ms)
            found |= {name: np.float32(compute(view)) for name, compute in part.columns}
            stored = dict(row)
            part.store(memory, stored, time_ms, forgotten_ms)
            memories[key] = memory, stored
        sequences = [np.zeros(0, np.float32)]
        for sequence in self.spec.sequence:
            key = self.field_of(sequence.key)
            memory, stored = memories[key]
            stored[STEP] = [found[name] for name in sequence.fields]
            sequences.append(self._sequence(self.parts[key], memory, stored, time_ms, sequence.length).ravel())
        return np.array([found[name] for name in self.names], np.float32), np.concatenate(sequences)

    def _sequence(self, part: KeyReference, memory: Memory, row: Row, time_ms: int, length: int) -> Float32:
        unseen = part.hidden - {row[PARTITION_ID]}
        before = [event for event in memory.events.entries if event[0] <= time_ms and event[1] is not row]
        steps = [event for event in before if event[1][PARTITION_ID] not in unseen] + [(time_ms, row)]
        out = np.zeros((length, 2 + len(row[STEP])), np.float32)
        for place, (step_ms, event) in enumerate(steps[-length:], length - len(steps[-length:])):
            out[place] = np.array([1.0, (time_ms - step_ms) / 1000, *event[STEP]], np.float32)
        return out

    def update_label(self, label: Row) -> None:
        """Fold one label."""
        roles = self.schema.roles
        for key, part in self.parts.items():
            if part.labelled:
                part.label(
                    label[key], label[roles.event_time], label[roles.transaction_id], label[self.schema.label.field]
                )

    def statistics(self) -> dict[str, KeyStatistics]:
        return {
            key: KeyStatistics(len(part.keys), part.evictions, part.late, part.too_late)
            for key, part in self.parts.items()
        }


def _is_category(name: str, code: int) -> Compute:
    return lambda view: view.row[name] == code


def _seconds_since_last(view: View) -> float:
    return (view.time_ms - view.recent[-1][0]) / 1000 if view.recent else -1.0


def _same_as_last(tag: str) -> Compute:
    def compute(view: View) -> float:
        rows = [row for _, row in view.recent if FROM_SUMMARY not in row]
        return rows[-1][tag] == view.row[tag] if rows else -1.0

    return compute


def _ratio_to_last(amount: str) -> Compute:
    def compute(view: View) -> float:
        rows = [row for _, row in view.recent if FROM_SUMMARY not in row]
        return float(view.row[amount]) / float(rows[-1][amount]) if rows and rows[-1][amount] > 0 else 1.0

    return compute


def _hash(value: int | str) -> int:
    """Splitmix64's finaliser, of FNV-1a for a text."""
    code = value if isinstance(value, int) else 0xCBF29CE484222325
    for octet in value.encode() if isinstance(value, str) else b"":
        code = (code ^ octet) * 0x100000001B3 % 2**64
    code %= 2**64
    code = (code ^ code >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    code = (code ^ code >> 27) * 0x94D049BB133111EB % 2**64
    return code ^ code >> 31


def _windowed(function: str, window_ms: int, amount: str, tag: str, ticks_per_unit: float) -> Compute:
    def compute(view: View) -> float:
        rows = [*view.window(window_ms), view.row]
        count = len(rows)
        if function == "count":
            return count
        if function == "max":
            return max(float(row[amount]) for row in rows)
        if function == "distinct":
            return len({row[tag] for row in rows if FROM_SUMMARY not in row})
        since_ms = view.time_ms - window_ms
        earlier = [event for event in view.recent if event[0] > since_ms and FROM_SUMMARY not in event[1]]
        own = [*(row for _, row in earlier), view.row]
        if function == "seen":
            return any(row[tag] == view.row[tag] for row in own[:-1])
        if function == "seconds_since_first":
            return next(((view.time_ms - ms) / 1000 for ms, row in earlier if row[tag] == view.row[tag]), -1.0)
        if function in ("rises", "changes"):
            pairs = list(itertools.pairwise(own))
            rises = sum(row[amount] > before[amount] for before, row in pairs)
            return rises if function == "rises" else sum(row[tag] != before[tag] for before, row in pairs)
        ticks = [round(float(row[amount]) * ticks_per_unit) for row in rows]
        unit = Fraction(ticks_per_unit)
        if function == "sum":
            return float(sum(ticks) / unit)
        if function == "mean":
            return float(sum(ticks) / unit / count)
        if function == "std":
            spread = count * sum(tick * tick for tick in ticks) - sum(ticks) ** 2
            return math.sqrt(spread / unit**2) / count
        earlier = sum(ticks[:-1])
        return float(Fraction(ticks[-1] * (count - 1), earlier)) if earlier > 0 else 1.0

    return compute


def _labelled(function: str, delay_ms: int, window_ms: int) -> Compute:
    def compute(view: View) -> float:
        count, frauds = view.labelled(delay_ms, window_ms)
        return {"count": count, "fraud_count": frauds}.get(function, frauds / count if count else 0.0)

    return compute


def _clock(view: View) -> datetime:
    return EPOCH + timedelta(milliseconds=view.time_ms)


def _hour(view: View) -> float:
    moment = _clock(view)
    return (moment - moment.replace(hour=0, minute=0, second=0, microsecond=0)) / timedelta(hours=1)


_CLOCK: dict[str, Compute] = {
    "hour": _hour,
    "weekday": lambda view: _clock(view).weekday(),
    "night": lambda view: _clock(view).hour < 6,
    "weekend": lambda view: _clock(view).weekday() >= 5,
}
