"""What one seed means: the options of its run, derived and printable."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from bench.faults.broker import BrokerSettings
from bench.faults.disk import DiskFaults
from bench.faults.model import ModelFaults
from bench.faults.network import Weather
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


@dataclass(frozen=True, slots=True)
class Traffic:
    """What comes in. Shares are of transactions.

    `rows` transactions of `cards` cards and `terminals` terminals within `seconds`; `aborted_share`: written by an
    upstream transaction that is aborted; `label_share`: followed by a label.
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
    """What befalls processes. Shares are of process starts, of sessions a second, or of runs; times in seconds.

    `crash_share`, `freeze_share`: starts that end so, or stand still for `freeze_s` at most; `points_max`: after how
    many calls to the outside at most. `replace_share`: of those that stand still, how many are replaced meanwhile.
    `clock_jumps`, `clogs`, `intruders`, `stops`, `cuts`, `shuffles`: how often in a run. `replay_shuffle_share`: of
    turns with a replay under way, those in which a rebalance is set off.
    """

    crash_share: float = 0.0
    freeze_share: float = 0.0
    freeze_s: float = 2.0
    points_max: int = 2_000
    replace_share: float = 0.5
    clock_jumps: int = 0
    clogs: int = 0
    clog_s: float = 1.0
    intruders: int = 0
    stops: int = 0
    cuts: int = 0
    shuffles: int = 0
    replay_shuffle_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Options:
    """One run. `named`: workers have names of their own (`kafka.instance`). `terminals`: features by terminal too,
    which depend on what other partitions have seen by then; without, every score is checked.

    `poll_s`: what a poll takes at least: a slow machine. `settle_s`: within which lag must be gone once faults stop.
    """

    seed: int
    workers: int
    partitions: int
    named: bool
    terminals: bool
    poll_s: float
    settle_s: float
    config: Config
    broker: BrokerSettings
    traffic: Traffic
    processes: ProcessFaults
    disk: DiskFaults
    model: ModelFaults


def derive(seed: int) -> Options:
    """The options of a seed: which faults, how many, and what is configured."""
    chance = random.Random(f"options {seed}")

    def sometimes(share: float, low: float, high: float) -> float:
        """With `share` a number between low and high, small ones as likely as great ones; else 0."""
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
    weather = Weather(
        latency_s=chance.choice([0.0005, 0.002, 0.005]),
        request_timeout_s=chance.uniform(0.4, 1.0),
        delivery_timeout_s=chance.uniform(0.8, 1.6),
        preempt_share=chance.choice([0.0, 0.05, 0.3]),
        delay_share=sometimes(0.4, 0.001, 0.1),
        delay_s=chance.uniform(0.02, 0.3),
        refused_share=sometimes(0.3, 0.01, 0.3),
        reply_lost_share=sometimes(0.3, 0.01, 0.2),
        late_share=sometimes(0.4, 0.02, 0.4),
        undelivered_share=sometimes(0.2, 0.005, 0.1),
        held_share=sometimes(0.4, 0.01, 0.3),
        held_s=chance.uniform(0.02, 0.5),
        # chance of its own: the other options of a seed stay what they were before there was this fault
        skipped_share=random.Random(f"skips {seed}").choice([0.0, 0.0, 0.0, 0.02, 0.2]),
    )
    topics = config.kafka.topics
    broker = BrokerSettings(
        topics={
            topics.transactions: partitions, topics.labels: 1, topics.decisions: DECISION_PARTITIONS,
            topics.dead_letters: 1, topics.summaries: 1,
        },
        shared_topic=topics.transactions,
        session_timeout_s=chance.uniform(0.3, 1.0),
        rebalance_timeout_s=chance.uniform(2.0, 4.0),
        transaction_timeout_s=chance.uniform(1.0, 6.0),
        weather=weather,
    )  # fmt: skip
    return Options(
        seed=seed,
        workers=workers,
        partitions=partitions,
        named=chance.random() < 0.5,
        terminals=share_terminals or chance.random() < 0.4,
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
            points_max=chance.choice([60, 200, 600]),
            replace_share=chance.choice([0.0, 0.5, 1.0]),
            clock_jumps=count(0.3, 3),
            clogs=count(0.4, 4),
            clog_s=chance.uniform(0.05, 2.0),
            intruders=count(0.2, 2),
            stops=count(0.3, 2),
            cuts=count(0.3, 2),
            shuffles=count(0.3, 3),
            replay_shuffle_share=sometimes(0.3, 0.05, 0.5),
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
            lying_share=sometimes(0.3, 0.02, 0.5),
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
        overload=OverloadSettings(raise_max=chance.choice([0.0, 0.0, 4.0]), after_s=0.1, calm_s=0.3),
        terminals=TerminalSettings(share=share_terminals, interval_s=0.1, bucket_s=60),
    )
