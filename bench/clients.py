"""What a record costs in the client of Kafka: ours on librdkafka's C API, and the same work on its Python binding.

Both use the same librdkafka and the same settings, and take turns in one process. The binding's client does what a
service needs too: columns of offsets, times, keys and values, and a delivery report for each record, which is counted.

Measured are the CPU time of the calling thread, and that of the process, with librdkafka's threads: records that wait
are polled in batches, records are sent in batches until all are acknowledged, and at a low rate each record is polled
and another one sent, as it comes.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, Self

import confluent_kafka
import msgspec
import numpy as np
from confluent_kafka import Message
from rich.console import Console

from bench.cluster import origin
from bench.embedded import EmbeddedParts, fresh_directory
from bench.tables import figure_table, print_table
from bench.turns import Spread
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import ByteColumn
from cascade.config import KafkaSettings
from cascade.errors import BrokerError
from cascade.ledger.machine import Machine, describe_machine
from cascade.progress import Steps
from streaming.kafka import Delivery, TopicSpec, ensure_topics, limits
from streaming.kafka.rdkafka_consumer import RdkafkaConsumer
from streaming.kafka.rdkafka_producer import LINGER_MS, RdkafkaProducer

BATCHES = (1, 100, 1_000, 5_000)
# A turn's records; fewer where each has a call of its own.
RECORDS, RECORDS_ALONE = 50_000, 5_000
VALUE_BYTES, KEYS = 190, 20_000
RATE, RATE_S, WARM_UP_S = 1_000.0, 5.0, 1.0
ROWS_MAX = 1_000
POLL_S, FLUSH_S = 0.5, 60.0


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """CPU µs a record of the calling thread and of the process, and voluntary context switches a record; medians."""

    thread_us: float
    process_us: float
    switches: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of the same work in both clients; `thread`, `process`: the binding's time over the C API's."""

    work: str
    c_api: Cost
    binding: Cost
    thread: Spread
    process: Spread


class ClientsReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `cascade bench clients`."""

    comparisons: list[Comparison]
    librdkafka: str
    rounds: int
    seed: int
    machine: Machine


class Client(Protocol):
    """A consumer of one partition and a producer; each method returns the number of records."""

    def read(self, rows_max: int) -> int:
        """Polls at most so many records."""
        ...

    def send(self, first: int, rows: int) -> int:
        """Sends records of the bench."""
        ...

    def pass_on(self) -> int:
        """Polls records, and sends the same ones."""
        ...

    def flush(self) -> None:
        """Waits until all records are acknowledged."""
        ...

    def close(self) -> None:
        """Ends both."""
        ...


class CApiClient:
    """Our own client."""

    def __init__(self, records: Records, source: str, offset: int) -> None:
        self._records, partition = records, (source, 0)
        self._consumer, self._producer = RdkafkaConsumer(records.kafka, None), RdkafkaProducer(records.kafka)
        self._sent: deque[Delivery] = deque()
        self._consumer.assign([partition])
        self._consumer.seek(partition, offset)

    def read(self, rows_max: int) -> int:
        """See Client."""
        return sum(map(len, self._consumer.poll(POLL_S, rows_max)))

    def send(self, first: int, rows: int) -> int:
        """See Client."""
        self._send(self._records.keys[first : first + rows], self._records.values[first : first + rows])
        return rows

    def pass_on(self) -> int:
        """See Client."""
        batches = self._consumer.poll(POLL_S, ROWS_MAX)
        for batch in batches:
            self._send(batch.keys, batch.values)
        return sum(map(len, batches))

    def _send(self, keys: Sequence[bytes | None], values: Sequence[bytes | None]) -> None:
        self._sent.append(self._producer.send_many(self._records.target, keys, values))
        while self._sent and self._sent[0].done():
            self._sent.popleft()

    def flush(self) -> None:
        """See Client."""
        self._producer.flush(FLUSH_S)

    def close(self) -> None:
        """See Client."""
        self._consumer.close()
        self._producer.close(FLUSH_S)


class BindingClient:
    """The binding's consumer and producer."""

    def __init__(self, records: Records, source: str, offset: int) -> None:
        self._target, self._keys, self._values = records.target, list(records.keys), list(records.values)
        servers = {"bootstrap.servers": records.kafka.bootstrap}
        self._consumer = confluent_kafka.Consumer(
            {
                **servers,
                "group.id": f"clients-{uuid.uuid4().hex}",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": limits.FETCH_WAIT_MS,
            }
        )
        self._producer = confluent_kafka.Producer(
            {**servers, "acks": "all", "enable.idempotence": True, "linger.ms": LINGER_MS}
        )
        self._unacknowledged = 0
        self._consumer.assign([confluent_kafka.TopicPartition(source, 0, offset)])

    def read(self, rows_max: int) -> int:
        """See Client."""
        return len(self._poll(rows_max)[0])

    def _poll(self, rows_max: int) -> tuple[list[bytes], list[bytes]]:
        # for more than a message librdkafka waits until all are there
        found = self._consumer.consume(1, POLL_S)
        if found and rows_max > 1:
            found += self._consumer.consume(rows_max - 1, 0)
        # map() avoids a Python step for each record and field
        np.fromiter(map(Message.offset, found), np.int64, len(found))
        np.fromiter(map(itemgetter(1), map(Message.timestamp, found)), np.int64, len(found))
        return list(map(Message.key, found)), list(map(Message.value, found))

    def send(self, first: int, rows: int) -> int:
        """See Client."""
        self._send(self._keys[first : first + rows], self._values[first : first + rows])
        return rows

    def pass_on(self) -> int:
        """See Client."""
        keys, values = self._poll(ROWS_MAX)
        self._send(keys, values)
        return len(keys)

    def _send(self, keys: Sequence[bytes | None], values: Sequence[bytes | None]) -> None:
        produce, reported = self._producer.produce, self._reported
        self._unacknowledged += len(keys)
        for key, value in zip(keys, values, strict=True):
            produce(self._target, value, key, -1, reported)
        self._producer.poll(0)

    def _reported(self, error: object, message: Message) -> None:
        del message
        if error is not None:
            raise BrokerError(f"a record was not delivered: {error}")
        self._unacknowledged -= 1

    def flush(self) -> None:
        """See Client."""
        self._producer.flush(FLUSH_S)

    def close(self) -> None:
        """See Client."""
        self._consumer.close()
        self._producer.close()


class Records:
    """The records, in memory and in the topic `backlog`, and a process that sends some at RATE; a context manager."""

    def __init__(self, bootstrap: str, seed: int) -> None:
        self.kafka = KafkaSettings(bootstrap=bootstrap, client="librdkafka")
        names = [f"clients-{name}-{uuid.uuid4().hex}" for name in ("backlog", "arrivals", "sent")]
        ensure_topics(self.kafka, [TopicSpec(name, 1) for name in names])
        self.backlog, self.arrivals, self.target = names
        chance = np.random.default_rng(seed)
        self.keys = ByteColumn.of([b"%016d" % key for key in chance.integers(0, KEYS, RECORDS)])
        self.values = ByteColumn.of([chance.bytes(VALUE_BYTES) for _ in range(RECORDS)])
        producer = RdkafkaProducer(self.kafka)
        producer.send_many(self.backlog, self.keys, self.values)
        producer.close(FLUSH_S)
        # a process with threads cannot be forked
        context = multiprocessing.get_context("spawn")
        self._sending = context.Event()
        arguments = (self.kafka, self.arrivals, list(self.values[:1_000]), self._sending)
        self._process = context.Process(target=_send_at_rate, args=arguments, daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    @contextmanager
    def arriving(self) -> Iterator[int]:
        """Records arrive meanwhile; yields the offset of the first."""
        with closing(RdkafkaConsumer(self.kafka, None)) as consumer:
            (offset,) = consumer.end_offsets([(self.arrivals, 0)]).values()
        self._sending.set()
        yield offset
        self._sending.clear()


def _send_at_rate(kafka: KafkaSettings, topic: str, values: list[bytes], sending: Any) -> None:
    """Sends records at RATE while the event is set; in a process of its own, which is killed at the end."""
    producer = RdkafkaProducer(kafka)
    while sending.wait():
        begun_s, sent = time.perf_counter(), 0
        while sending.is_set():
            while sent < (time.perf_counter() - begun_s) * RATE:
                producer.send(topic, b"%016d" % (sent % KEYS), values[sent % len(values)])
                sent += 1
            time.sleep(0.2 / RATE)


Make = Callable[[Records, str, int], Client]
Measure = Callable[[Records, Make], Cost]
CLIENTS: Mapping[str, Make] = {"C API": CApiClient, "binding": BindingClient}


def run_clients(rounds: int, seed: int, out: Path) -> ClientsReport:
    """Measures all work by turns, with data and logs under `out`; `seed`: of keys and values."""
    measures = _measures()
    found: dict[tuple[str, str], list[Cost]] = {(work, client): [] for work in measures for client in CLIENTS}
    with ExitStack() as stack:
        steps = stack.enter_context(Steps())
        parts = stack.enter_context(EmbeddedParts(fresh_directory(out), load_bundle(SHIPPED_BUNDLE), with_triton=False))
        records = stack.enter_context(Records(parts.bootstrap, seed))
        # the first round loads the kernels and warms the broker up
        for round_ in range(rounds + 1):
            for number, (work, measure) in enumerate(measures.items()):
                steps("measure, by turns", (round_ + number / len(measures)) / (rounds + 1))
                for client, make in CLIENTS.items():
                    found[work, client].append(measure(records, make))
        steps("measure, by turns", 1.0)
    return ClientsReport(
        comparisons=[_compared(work, *(found[work, client][1:] for client in CLIENTS)) for work in measures],
        librdkafka=str(confluent_kafka.libversion()[0]),
        rounds=rounds,
        seed=seed,
        machine=describe_machine(),
    )


def _measures() -> dict[str, Measure]:
    return {
        **{f"poll {batch:,}": partial(_read, batch) for batch in BATCHES},
        **{f"send {batch:,}": partial(_send, batch) for batch in BATCHES},
        f"poll and send, {RATE:,.0f}/s": _pass_on,
    }


def _read(batch: int, records: Records, make: Make) -> Cost:
    wanted = RECORDS if batch > 1 else RECORDS_ALONE
    with closing(make(records, records.backlog, 0)) as client:
        # what is there is fetched ahead meanwhile
        read = client.read(1)

        def work() -> int:
            rows = 0
            while read + rows < wanted:
                rows += client.read(min(batch, wanted - read - rows))
            return rows

        return _cost(work)


def _send(batch: int, records: Records, make: Make) -> Cost:
    wanted = RECORDS if batch > 1 else RECORDS_ALONE
    with closing(make(records, records.backlog, 0)) as client:
        client.send(0, 1)
        client.flush()

        def work() -> int:
            rows = sum(client.send(first, batch) for first in range(0, wanted, batch))
            client.flush()
            return rows

        return _cost(work)


def _pass_on(records: Records, make: Make) -> Cost:
    def work(seconds: float) -> int:
        rows, end_s = 0, time.monotonic() + seconds
        # on a busy machine the first record may come late
        while time.monotonic() < end_s or not rows:
            rows += client.pass_on()
        return rows

    with records.arriving() as offset, closing(make(records, records.arrivals, offset)) as client:
        work(WARM_UP_S)
        return _cost(lambda: work(RATE_S))


def _cost(work: Callable[[], int]) -> Cost:
    """The cost of what `work` does, which returns its number of records."""
    thread_s, process_s, switches = time.thread_time(), time.process_time(), _switches()
    rows = work()
    return Cost(
        thread_us=1e6 * (time.thread_time() - thread_s) / rows,
        process_us=1e6 * (time.process_time() - process_s) / rows,
        switches=(_switches() - switches) / rows,
    )


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def _compared(work: str, c_api: list[Cost], binding: list[Cost]) -> Comparison:
    pairs = list(zip(c_api, binding, strict=True))
    return Comparison(
        work=work,
        c_api=_median(c_api),
        binding=_median(binding),
        thread=Spread.of([theirs.thread_us / ours.thread_us for ours, theirs in pairs]),
        process=Spread.of([theirs.process_us / ours.process_us for ours, theirs in pairs]),
    )


def _median(costs: list[Cost]) -> Cost:
    return Cost(
        thread_us=float(np.median([cost.thread_us for cost in costs])),
        process_us=float(np.median([cost.process_us for cost in costs])),
        switches=float(np.median([cost.switches for cost in costs])),
    )


def show_clients(report: ClientsReport, console: Console) -> None:
    """Prints the report as a table, a row for each work."""
    table = figure_table("C API / binding", "thread µs", "ratio", "process µs", "switches")
    for found in report.comparisons:
        ours, theirs = found.c_api, found.binding
        table.add_row(
            found.work,
            f"{ours.thread_us:.2f} / {theirs.thread_us:.2f}",
            f"{found.thread.median:.1f} ×",
            f"{ours.process_us:.2f} / {theirs.process_us:.2f}",
            f"{ours.switches:.1f} / {theirs.switches:.1f}",
        )
    method = (
        f"CPU time and voluntary switches a record; librdkafka {report.librdkafka}; "
        f"medians of {report.rounds} rounds in which both take turns"
    )
    print_table(console, table, method, origin(report.machine, report.seed))
