"""The options of a run, derived from its seed: the configuration, the traffic, and the faults."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from bench.faults.broker import BrokerSettings
from bench.faults.disk import DiskFaults
from bench.faults.model import ModelFaults
from bench.faults.network import NetworkFaults
from cascade.config import (
    CodecName,
    Config,
    DeadlineSettings,
    DuplicateSettings,
    KafkaSettings,
    LabelSettings,
    OverloadSettings,
    StateSettings,
    TerminalSettings,
    WorkerSettings,
)

DECISION_PARTITIONS = 2
AMPLE_BUDGET = 0.99


@dataclass(frozen=True, slots=True)
class Traffic:
    """The input. Shares are of transactions.

    `rows` transactions of `cards` cards and `terminals` terminals within `seconds`. `repeated_share`: sent once more.
    `malformed_share`: replaced by an unreadable message. `aborted_share`: written by an upstream transaction that is
    aborted. `label_share`: followed by a label.
    """

    rows: int
    seconds: float
    cards: int
    terminals: int
    repeated_share: float
    malformed_share: float
    aborted_share: float
    label_share: float


@dataclass(frozen=True, slots=True)
class ProcessFaults:
    """Faults of processes. Times in seconds.

    `crash_share`, `freeze_share`: shares of the processes that crash, or freeze for up to `freeze_s`; `calls_max`: at
    which external call at the latest. `replace_share`: of the frozen processes, those that are replaced meanwhile.
    `clock_jumps`, `clogs` (of connections, for about `clog_s`), `fencings` (of a worker's producer), `stops` (clean, of
    a worker), `log_deletions` (of records that snapshots need), `rebalances`: numbers in a run.
    `replay_rebalance_share`: of the turns during a replay, those in which a rebalance begins.
    """

    crash_share: float = 0.0
    freeze_share: float = 0.0
    freeze_s: float = 2.0
    calls_max: int = 2_000
    replace_share: float = 0.5
    clock_jumps: int = 0
    clogs: int = 0
    clog_s: float = 1.0
    fencings: int = 0
    stops: int = 0
    log_deletions: int = 0
    rebalances: int = 0
    replay_rebalance_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a run. Times in seconds.

    `static_members`: workers are static members (`kafka.instance`). `terminals`: there are features by terminal too,
    which depend on the order in which partitions are read; without them the oracle checks every score.
    `escalation_budget`: of the policy; AMPLE_BUDGET has tokens for every transaction in the band. `poll_s`: least
    duration of a poll, which stands for the speed of the machine. `settle_s`: the lag must be gone this long after the
    last fault.
    """

    seed: int
    workers: int
    partitions: int
    static_members: bool
    terminals: bool
    escalation_budget: float
    poll_s: float
    settle_s: float
    config: Config
    broker: BrokerSettings
    traffic: Traffic
    processes: ProcessFaults
    disk: DiskFaults
    model: ModelFaults


def derive(seed: int) -> Options:
    """The options of a seed."""
    chance = random.Random(f"options {seed}")

    def sometimes(share: float, low: float, high: float) -> float:
        """With probability `share` a log-uniform number between low and high, else 0."""
        if chance.random() >= share:
            return 0.0
        return math.exp(chance.uniform(math.log(low), math.log(high)))

    def count(share: float, most: int) -> int:
        return chance.randint(1, most) if chance.random() < share else 0

    partitions = chance.randint(1, 4)
    workers = min(chance.choice([1, 2, 2, 3]), partitions + 1)
    share_terminals = chance.random() < 0.15
    seconds = chance.uniform(0.5, 2.5)
    config = _config(chance, share_terminals)
    faults = NetworkFaults(
        latency_s=chance.choice([0.0005, 0.002, 0.005]),
        request_timeout_s=chance.uniform(0.4, 1.0),
        delivery_timeout_s=chance.uniform(0.8, 1.6),
        preempt_share=chance.choice([0.0, 0.05, 0.3]),
        delay_share=sometimes(0.4, 0.001, 0.1),
        delay_s=chance.uniform(0.02, 0.3),
        commit_refused_share=sometimes(0.3, 0.01, 0.3),
        commit_reply_lost_share=sometimes(0.3, 0.01, 0.2),
        commit_late_share=sometimes(0.4, 0.02, 0.4),
        undelivered_share=sometimes(0.2, 0.005, 0.1),
        fetch_delay_share=sometimes(0.4, 0.01, 0.3),
        fetch_delay_s=chance.uniform(0.02, 0.5),
        # a generator of its own, so that this fault does not change the other options of a seed
        skipped_share=random.Random(f"skips {seed}").choice([0.0, 0.0, 0.0, 0.02, 0.2]),
    )
    topics = config.kafka.topics
    broker = BrokerSettings(
        topics={
            topics.transactions: partitions,
            topics.labels: 1,
            topics.decisions: DECISION_PARTITIONS,
            topics.dead_letters: 1,
            topics.summaries: 1,
        },
        shared_topic=topics.transactions,
        session_timeout_s=chance.uniform(0.3, 1.0),
        rebalance_timeout_s=chance.uniform(2.0, 4.0),
        transaction_timeout_s=chance.uniform(1.0, 6.0),
        faults=faults,
    )
    return Options(
        seed=seed,
        workers=workers,
        partitions=partitions,
        static_members=chance.random() < 0.5,
        terminals=share_terminals or chance.random() < 0.4,
        # a generator of its own, so that it does not change the other options of a seed
        escalation_budget=random.Random(f"budget {seed}").choice([AMPLE_BUDGET, AMPLE_BUDGET, 0.1]),
        poll_s=chance.choice([0.0005, 0.002, 0.005, 0.01]),
        settle_s=30.0,
        config=config,
        broker=broker,
        traffic=Traffic(
            rows=chance.randint(10, 80),
            seconds=seconds,
            cards=chance.choice([1, 4, 12, 40]),
            terminals=chance.choice([1, 3, 10]),
            repeated_share=sometimes(0.5, 0.02, 0.4),
            malformed_share=sometimes(0.5, 0.02, 0.3),
            aborted_share=sometimes(0.3, 0.02, 0.3),
            label_share=sometimes(0.5, 0.05, 0.5),
        ),
        processes=ProcessFaults(
            crash_share=sometimes(0.6, 0.2, 0.95),
            freeze_share=sometimes(0.4, 0.2, 0.9),
            freeze_s=chance.uniform(0.2, 3.0),
            calls_max=chance.choice([60, 200, 600]),
            replace_share=chance.choice([0.0, 0.5, 1.0]),
            clock_jumps=count(0.3, 3),
            clogs=count(0.4, 4),
            clog_s=chance.uniform(0.05, 2.0),
            fencings=count(0.2, 2),
            stops=count(0.3, 2),
            log_deletions=count(0.3, 2),
            rebalances=count(0.3, 3),
            replay_rebalance_share=sometimes(0.3, 0.05, 0.5),
        ),
        disk=DiskFaults(
            full_share=sometimes(0.2, 0.05, 0.5),
            torn_share=sometimes(0.3, 0.05, 0.6),
            slow_share=sometimes(0.3, 0.05, 0.6),
            slow_s=chance.uniform(0.05, 1.0),
        ),
        model=ModelFaults(
            answer_s=chance.choice([0.002, 0.02, 0.1]),
            slow_share=sometimes(0.3, 0.02, 0.5),
            late_share=sometimes(0.3, 0.02, 0.5),
            late_s=chance.uniform(0.01, 0.2),
            invalid_share=sometimes(0.3, 0.02, 0.5),
            doubled_share=sometimes(0.3, 0.02, 0.5),
        ),
    )


def _config(chance: random.Random, share_terminals: bool) -> Config:
    codec: CodecName = chance.choice(["json", "msgpack"])
    in_flight_max = chance.choice([1, 3, 10, 100])
    return Config(
        delivery=chance.choice(["exactly-once", "at-least-once"]),
        kafka=KafkaSettings(codec=codec),
        deadline=DeadlineSettings(budget_ms=chance.choice([5, 30, 150]), start=chance.choice(["append", "fetch"])),
        worker=WorkerSettings(
            batch_rows_max=chance.choice([1, 3, 10, 100]),
            in_flight_max=in_flight_max,
            in_flight_card_max=chance.choice([1, 4, 64]),
            commit_interval_ms=chance.choice([10, 50, 200]),
            transaction_interval_ms=chance.choice([5, 20, 80, 300]),
            revoke_timeout_ms=chance.choice([100, 500]),
            drain_timeout_ms=chance.choice([100, 1_000]),
            poll_timeout_ms=chance.choice([5, 20, 60]),
            message_bytes_max=4_096,
            ahead_ms_max=60_000,
        ),
        labels=LabelSettings(alignment=chance.choice(["arrival", "exact"])),
        state=StateSettings(
            snapshots="simulated" if chance.random() < 0.7 else "",
            interval_s=chance.choice([0.1, 0.3, 1.0]),
            keep=chance.choice([2, 3]),
        ),
        duplicates=DuplicateSettings(window_s=chance.choice([0.0, 0.3, 600.0, 600.0]), ids_max=1_024),
        overload=OverloadSettings(factor_min=chance.choice([1.0, 1.0, 0.0625]), after_s=0.1, calm_s=0.3),
        terminals=TerminalSettings(share=share_terminals, interval_s=0.1, bucket_s=60),
    )
