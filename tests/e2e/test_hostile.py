"""The service as a process on a real broker, under hostile input: what it promises holds, and its memory has a limit.

Memory: the resident memory of the service stays below `RSS_MB_MAX` in both tests. Interpreter, libraries, models and
compiled kernels take most of it; each card or terminal that comes adds some kB of state, up to the `keys_max` of the
feature file, so the limit holds for the few thousand keys that are made here.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import psutil
import pytest

import bench.embedded
from bench.cluster import escalating_bundle, simulated
from bench.embedded import EmbeddedParts, ServiceProcess, new_names
from bench.hostile import Maker, Message
from cascade.bundle import SHIPPED_BUNDLE, Bundle, load_bundle
from cascade.columns import ColumnBatch
from cascade.config import CodecName, Config
from cascade.frames import frame_to_batch
from cascade.simulator import SimulatorSettings, simulate
from streaming.codecs import codec, too_far_ahead
from streaming.kafka import FetchedBatch, make_consumer
from streaming.pipeline.decisions import Decision, decode_decision, message_keys
from tests.conftest import Broker
from tests.e2e.asking import producing

pytestmark = [pytest.mark.kafka]

RSS_MB_MAX = 700.0
# Another load on the machine must not turn a late answer into a degraded decision, and that into an open breaker.
PATIENT = {"deadline": {"budget_ms": 10_000}}
MUTATED, GOOD_EVERY = 6_000, 5
GOOD_IDS_FROM = 10**15
CARDS_FROM = 4_000_000

FLOOD, FLOOD_CHUNK, FLOOD_CARD = 60_000, 1_000, 4_000_000_000
# What a client fetches of a partition at once, and fewer bytes than a flooded record has (129 and its key).
FETCHED_BYTES_MAX, RECORD_BYTES_MIN = 2**20, 100
# of the flood, every so many is its first transaction again
REPEATED_EVERY = 6
OTHER_CARDS, OTHERS_PER_S = 200, 100
CALM_S = 3.0
ESCALATED_SHARE = 0.2
SETTLE_S_MAX = 120.0


@dataclass(frozen=True)
class Read:
    """Some records of a topic, in the order in which they were read."""

    fetched: list[FetchedBatch] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.fetched))

    @property
    def values(self) -> list[Message]:
        return [value for batch in self.fetched for value in batch.values]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Partition and offset of each."""
        return [(batch.partition, offset) for batch in self.fetched for offset in batch.offsets.tolist()]

    @property
    def headers(self) -> list[dict[str, bytes | None]]:
        return [dict(headers) for batch in self.fetched for headers in batch.headers]


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """Call `work` now and then in another thread, until left."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(0.1):
            work()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)


class Watch:
    """What a service looks like from outside, sampled: its memory, and whether it says that it is ready and alive."""

    def __init__(self, service: ServiceProcess) -> None:
        self._service = service
        self.rss_mb_max = 0.0
        self.samples = 0
        self.not_ready: list[str] = []

    def __call__(self) -> None:
        config, pid = self._service.config.health, self._service.pid
        assert pid is not None
        self.rss_mb_max = max(self.rss_mb_max, psutil.Process(pid).memory_info().rss / 1e6)
        for path in ("readyz", "healthz"):
            try:
                urllib.request.urlopen(f"http://{config.host}:{config.port}/{path}", timeout=10).close()
            except urllib.error.HTTPError as error:
                self.not_ready.append(f"{path}: {json.loads(error.read())}")
            except OSError:
                # this process stood still for longer than the service waits for a request: no answer says nothing
                continue
            self.samples += 1


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    data = simulated(load_bundle(SHIPPED_BUNDLE).schema, cards=250, terminals=200, days=7, seed=3)
    return escalating_bundle(tmp_path_factory.mktemp("bundle") / "bundle", ESCALATED_SHARE, data)


@pytest.fixture(scope="module")
def start(broker: Broker, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ServiceProcess]:
    """Makes a service, not yet started, with topics and a group of its own."""
    parts = EmbeddedParts(tmp_path_factory.mktemp("service"), bundle, with_triton=False)
    parts.bootstrap = broker.bootstrap
    bench.embedded.READY_TIMEOUT_S = 90.0

    def make(partitions: int, delivery: str, codec_name: str) -> ServiceProcess:
        settings = PATIENT | {"delivery": delivery, "kafka": new_names() | {"codec": codec_name}}
        return ServiceProcess(parts.write_config(f"{uuid.uuid4().hex}.toml", settings, partitions))

    return make


def follow(config: Config, topic: str, expected: int, service: ServiceProcess) -> Read:
    """The topic's first `expected` records, and what comes in half a second after them."""
    read, moved_s, until_s = Read(), time.monotonic(), None
    with closing(make_consumer(config.kafka, None)) as consumer:
        consumer.assign(consumer.partitions_for(topic))
        while until_s is None or time.monotonic() < until_s:
            service.check_running()
            fetched = consumer.poll(0.1, 10_000)
            read.fetched.extend(fetched)
            if fetched:
                moved_s = time.monotonic()
            if until_s is None and len(read) >= expected:
                until_s = time.monotonic() + 0.5
            assert time.monotonic() - moved_s < SETTLE_S_MAX, f"{topic}: {len(read)} of {expected}, and no more"
    return read


def decisions_of(read: Read, codec_name: CodecName) -> list[Decision]:
    return [decode_decision(value or b"", codec_name) for value in read.values]


# --- hostile messages -----------------------------------------------------------------------------------------------


def mutated_and_good(bundle: Bundle, codec_name: CodecName, seed: int) -> list[tuple[bytes, Message]]:
    """Keys and values: mutated messages, and after every few of them a good one."""
    schema, rows = bundle.schema, 64
    frame = simulate(SimulatorSettings(cards=40, terminals=40, days=2))
    valid = frame_to_batch(frame, schema, "simulated").take(np.arange(rows))
    now_ms = int(time.time() * 1e3)
    valid = ColumnBatch({**valid.columns, schema.roles.event_time: now_ms - np.arange(rows, 0, -1) * 1_000}, rows)
    maker = Maker(codec_name, schema.fields, valid, 65_536, Random(seed))
    good = MUTATED // GOOD_EVERY
    columns = {name: np.resize(column, good) for name, column in valid.columns.items()}
    columns[schema.roles.transaction_id] = GOOD_IDS_FROM + np.arange(good)
    columns[schema.roles.card] = CARDS_FROM + np.arange(good) % OTHER_CARDS
    columns[schema.roles.event_time] = now_ms + np.arange(good)
    messages = codec(codec_name, schema.fields, 65_536).encode(ColumnBatch(columns, good))
    keys = message_keys(columns[schema.roles.card])
    found: list[tuple[bytes, Message]] = []
    for place, (key, value) in enumerate(zip(keys, messages, strict=True)):
        found += [(b"bad-%d-%d" % (place, turn), maker.message()) for turn in range(GOOD_EVERY)]
        found.append((key, value))
    return found


def outcomes(config: Config, bundle: Bundle, sent: Read) -> dict[tuple[int, int], str]:
    """What must become of each record, by its place: `decided`, or the reason of its dead letter."""
    schema, made = bundle.schema, codec(config.kafka.codec, bundle.schema.fields, config.worker.message_bytes_max)
    expected: dict[tuple[int, int], str] = {}
    for batch in sent.fetched:
        decoded = made.decode(batch.values)
        times, appended = decoded.batch[schema.roles.event_time], batch.timestamps_ms[decoded.rows]
        early = too_far_ahead(times, appended, config.worker.ahead_ms_max)
        offsets = batch.offsets.tolist()
        for row, ahead in zip(decoded.rows.tolist(), early.tolist(), strict=True):
            expected[batch.partition, offsets[row]] = "future-event" if ahead else "decided"
        for reject in decoded.rejects:
            expected[batch.partition, offsets[reject.index]] = reject.reason.value
    return expected


@pytest.mark.parametrize(
    ("codec_name", "delivery"), [("json", "exactly-once"), ("msgpack", "at-least-once"), ("binary", "exactly-once")]
)
def test_each_hostile_message_is_a_dead_letter_with_its_reason_and_each_good_one_is_decided(
    start: Callable[..., ServiceProcess], bundle: Bundle, codec_name: CodecName, delivery: str
) -> None:
    records = mutated_and_good(bundle, codec_name, seed=11)
    with start(2, delivery, codec_name) as service:
        config = service.config
        names = config.kafka.topics
        service.wait_ready()
        watch = Watch(service)
        with beside(watch):
            with producing(config) as producer:
                for place in range(0, len(records), FLOOD_CHUNK):
                    keys, values = zip(*records[place : place + FLOOD_CHUNK], strict=True)
                    producer.send_many(names.transactions, keys, values)
            sent = follow(config, names.transactions, len(records), service)
            expected = outcomes(config, bundle, sent)
            counts = Counter(expected.values())
            decided = follow(config, names.decisions, counts["decided"], service)
            letters = follow(config, names.dead_letters, len(records) - counts["decided"], service)
        ledger = service.stop()
    assert watch.not_ready == []
    assert watch.samples > 10, "two answers a look"
    assert watch.rss_mb_max < RSS_MB_MAX
    print(f"{codec_name}, {delivery}: {dict(counts)}, resident memory {watch.rss_mb_max:.0f} MB at most")

    assert len(decided) + len(letters) == len(records) == len(sent)
    decisions = decisions_of(decided, codec_name)
    found = {place_of(decision.decision_id): "decided" for decision in decisions}
    assert len(found) == len(decisions), "a record was decided twice"
    bytes_of = dict(zip(sent.places, sent.values, strict=True))
    for value, headers in zip(letters.values, letters.headers, strict=True):
        place = int(headers["cascade-partition"] or -1), int(headers["cascade-offset"] or -1)
        assert place not in found, "a record has two outcomes"
        assert value == bytes_of[place], "the bytes were touched"
        assert headers["cascade-topic"] == names.transactions.encode()
        assert headers["cascade-detail"]
        found[place] = (headers["cascade-reason"] or b"").decode()
    assert found == expected
    good = [
        int(decision.transaction_id) - GOOD_IDS_FROM
        for decision in decisions
        if int(decision.transaction_id) >= GOOD_IDS_FROM
    ]
    assert set(range(MUTATED // GOOD_EVERY)) <= set(good)
    # a fixed row can lack no field, repeat no key, and have no value of another type
    assert len(set(counts)) > (8 if codec_name == "binary" else 10), "hardly a reason was met"
    assert sum(ledger.dead_letters.values()) == len(letters)
    assert ledger.dead_letters == {reason: count for reason, count in counts.items() if reason != "decided"}


def place_of(decision_id: str) -> tuple[int, int]:
    _, partition, offset = decision_id.rsplit("-", 2)
    return int(partition), int(offset)


# --- a flood --------------------------------------------------------------------------------------------------------


def transactions(bundle: Bundle, ids: Sequence[int], cards: Sequence[int], chance: np.random.Generator) -> list[bytes]:
    schema, count = bundle.schema, len(ids)
    columns: dict[str, Any] = {name: np.zeros(count, spec.dtype) for name, spec in schema.fields.items()}
    columns[schema.roles.transaction_id] = np.array(ids, np.int64)
    columns[schema.roles.event_time] = np.full(count, int(time.time() * 1e3))
    columns[schema.roles.card] = np.array(cards, np.int64)
    columns[schema.roles.terminal] = chance.integers(0, 50, count)
    columns[schema.roles.amount] = np.round(chance.lognormal(3.0, 1.0, count), 2)
    return codec("json", schema.fields, 65_536).encode(ColumnBatch(columns, count))


@dataclass(frozen=True)
class Flood:
    """What a flood of one card did: decisions of its transactions and of the other cards', by partition."""

    partition: int
    flood: list[Decision]
    shared: list[Decision]
    apart: list[Decision]
    drained_s: float


@pytest.mark.long
def test_a_card_that_floods_its_partition_does_not_starve_the_others(
    start: Callable[..., ServiceProcess], bundle: Bundle
) -> None:
    """60,000 transactions of one card as fast as they can be sent, 100 a second of 200 others, in two partitions.

    A partition is a queue: cards that share it with the flood wait behind it, as long as it takes to work it off. What
    must hold: all are decided; a flooded record costs the same at its end; the flood's escalations are capped, and take
    no other card's room; a card of the other partition waits for what was fetched of the flooded one (a megabyte that
    is decided, and a megabyte that is fetched meanwhile), not for the flood.
    """
    with start(2, "at-least-once", "json") as service:
        config = service.config
        service.wait_ready()
        watch = Watch(service)
        with beside(watch):
            with Others(config, bundle) as others:
                time.sleep(CALM_S)
                began_ms = time.time() * 1e3
                send_flood(config, bundle)
                # as long as the flood is worked off, the others go on
                wait_for_flood(config, service)
            decided = follow(config, config.kafka.topics.decisions, FLOOD + others.sent, service)
        service.stop()
    seen = judge(decided, began_ms)
    apart, shared = decided_before(seen.apart, seen.flood), decided_before(seen.shared, seen.flood)
    rates = halves_per_s(seen.flood)
    causes = Counter(decision.degraded_cause for decision in seen.flood)
    print(
        f"flood of {FLOOD} worked off in {seen.drained_s:.1f} s, {rates[0]:,.0f} then {rates[1]:,.0f} a second,"
        f" refused for room {causes['queue-full']}; flooded records before another: apart {max(apart)} ({len(apart)}),"
        f" behind it {max(shared)} ({len(shared)}); resident memory {watch.rss_mb_max:.0f} MB"
    )
    assert watch.not_ready == []
    assert watch.rss_mb_max < RSS_MB_MAX
    assert len(decided) == FLOOD + others.sent
    assert len({decision.decision_id for decision in decisions_of(decided, "json")}) == FLOOD + others.sent
    assert sum(decision.duplicate for decision in seen.flood) == len(range(0, FLOOD, REPEATED_EVERY)) - 1
    assert len(apart) > 30, "too few of the others were there while the flood was"
    assert max(apart) <= 2 * FETCHED_BYTES_MAX / RECORD_BYTES_MIN < FLOOD / 2
    assert rates[1] > rates[0] / 3, "a flooded record grows dearer with the flood"
    assert causes["queue-full"] > 0, "the flood's escalations were never capped"
    assert not any(decision.degraded_cause == "queue-full" for decision in seen.apart + seen.shared)


class Others:
    """Transactions of OTHER_CARDS cards, OTHERS_PER_S in a second, as long as the context lasts; `sent` of them."""

    def __init__(self, config: Config, bundle: Bundle) -> None:
        self._config, self._bundle = config, bundle
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self.sent = 0

    def _send(self) -> None:
        chance = np.random.default_rng(1)
        began_s = time.monotonic()
        with producing(self._config) as producer:
            while not self._ended.wait(0.005):
                due = int((time.monotonic() - began_s) * OTHERS_PER_S)
                if due > self.sent:
                    ids = range(self.sent, due)
                    cards = chance.integers(0, OTHER_CARDS, len(ids))
                    values = transactions(self._bundle, ids, cards.tolist(), chance)
                    producer.send_many(self._config.kafka.topics.transactions, message_keys(cards), values)
                    self.sent = due

    def __enter__(self) -> Others:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)


def send_flood(config: Config, bundle: Bundle) -> None:
    chance, first = np.random.default_rng(2), 10**9
    ids = [first if place % REPEATED_EVERY == 0 else first + place for place in range(FLOOD)]
    values = transactions(bundle, ids, [FLOOD_CARD] * FLOOD, chance)
    again = values[0]
    values = [again if place % REPEATED_EVERY == 0 else value for place, value in enumerate(values)]
    with producing(config) as producer:
        for place in range(0, FLOOD, FLOOD_CHUNK):
            chunk = values[place : place + FLOOD_CHUNK]
            producer.send_many(config.kafka.topics.transactions, [b"%d" % FLOOD_CARD] * len(chunk), chunk)


def wait_for_flood(config: Config, service: ServiceProcess) -> None:
    """Return when the topic of decisions has grown by the flood."""
    with closing(make_consumer(config.kafka, None)) as consumer:
        partitions = consumer.partitions_for(config.kafka.topics.decisions)
        give_up_s = time.monotonic() + SETTLE_S_MAX
        while sum(consumer.end_offsets(partitions).values()) < FLOOD:
            service.check_running()
            assert time.monotonic() < give_up_s, "the flood is not worked off"
            time.sleep(0.1)


def judge(decided: Read, began_ms: float) -> Flood:
    """Sort the decisions; of the other cards', those that came while the flood was being worked off."""
    decisions = decisions_of(decided, "json")
    flood = [decision for decision in decisions if int(decision.transaction_id) >= 10**9]
    partition = place_of(flood[0].decision_id)[0]
    until_ms = max(decision.decision_time_ms for decision in flood)
    during = [
        decision
        for decision in decisions
        if int(decision.transaction_id) < 10**9
        and began_ms <= decision.decision_time_ms - decision.latency_ms.total <= until_ms
    ]
    shared = [decision for decision in during if place_of(decision.decision_id)[0] == partition]
    apart = [decision for decision in during if place_of(decision.decision_id)[0] != partition]
    return Flood(partition, flood, shared, apart, (until_ms - began_ms) / 1e3)


def decided_before(others: list[Decision], flood: list[Decision]) -> list[int]:
    """How many flooded records were decided between the append and the decision of each of the others."""
    times = np.sort([decision.decision_time_ms for decision in flood])
    until = np.array([decision.decision_time_ms for decision in others])
    since = until - np.array([decision.latency_ms.total for decision in others])
    return list((np.searchsorted(times, until) - np.searchsorted(times, since)).tolist())


def halves_per_s(flood: list[Decision]) -> tuple[float, float]:
    """Decisions a second over the first and the second half of the flood."""
    times = np.sort([decision.decision_time_ms for decision in flood])
    half = len(times) // 2
    return half / (times[half] - times[0]) * 1e3, half / (times[-1] - times[half]) * 1e3
