"""What the two applications in Python share: features by card and terminal, the models, the decision's message.

Written as their users write it, a transaction at a time, and free of Cascade: one of them runs in an environment where
it is not installed. Of the bundle's 30 features 20 are computed:

- of the transaction: amount, hour, night, weekend;
- of the terminal, over 1, 7 and 30 days: count, mean;
- of the card: seconds since the last, and over 1, 7 and 30 days: count, mean, ratio to the mean of those before.

Windows are whole days (UTC), today the last of them. The others are 0: maxima, the standard deviation, and what is
told by chargebacks. The deep model gets the card's last 16 transactions, with 0 in place of its two fraud rates.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
SEQUENCE_LENGTH = 16
TRANSACTION_FEATURES = ("amount", "hour", "night", "weekend")
TERMINAL_FEATURES = (
    "terminal_count_1d", "terminal_count_7d", "terminal_count_30d",
    "terminal_amount_mean_1d", "terminal_amount_mean_7d", "terminal_amount_mean_30d",
)  # fmt: skip
CARD_FEATURES = (
    "card_count_1d", "card_count_7d", "card_count_30d",
    "card_amount_mean_1d", "card_amount_mean_7d", "card_amount_mean_30d",
    "card_amount_ratio_to_mean_1d", "card_amount_ratio_to_mean_7d", "card_amount_ratio_to_mean_30d",
    "card_seconds_since_last",
)  # fmt: skip
# Log-odds by which an escalation raises the threshold: the 1 % that it stands for is met within a few thousand
# transactions, and it wavers by a tenth or two afterwards.
THRESHOLD_STEP = 0.1

# A state is plain lists, so that a state store can keep it as JSON. Days: [day, count, sum] each, the oldest first.
Days = list[list[Any]]


@dataclass(slots=True)
class Card:
    """A card's state. `steps`: [time in ms, amount, hour, ratio to the mean over 30 days], the oldest first."""

    days: Days
    steps: list[list[Any]]

    def features(self, time_ms: int, amount: float) -> list[float]:
        """CARD_FEATURES, this transaction included, which is kept."""
        since_last = (time_ms - self.steps[-1][0]) / 1e3 if self.steps else -1.0
        counts, sums = add(self.days, time_ms, amount)
        ratios = [ratio_to_mean(amount, count, total) for count, total in zip(counts, sums, strict=True)]
        self.steps.append([time_ms, amount, time_ms % DAY_MS / HOUR_MS, ratios[-1]])
        del self.steps[:-SEQUENCE_LENGTH]
        return [*counts, *means(counts, sums), *ratios, since_last]


def add(days: Days, time_ms: int, amount: float) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Keep a transaction; counts and sums over 1, 7 and 30 days with it. One that is late counts as of today."""
    today = time_ms // DAY_MS
    if not days or days[-1][0] < today:
        days.append([today, 0, 0.0])
        while days[0][0] <= today - 30:
            del days[0]
    today = days[-1][0]
    days[-1][1] += 1
    days[-1][2] += amount
    count_7, sum_7, count_30, sum_30 = 0, 0.0, 0, 0.0
    for day, count, total in days:
        count_30 += count
        sum_30 += total
        if day > today - 7:
            count_7 += count
            sum_7 += total
    return (days[-1][1], count_7, count_30), (days[-1][2], sum_7, sum_30)


def means(counts: tuple[int, ...], sums: tuple[float, ...]) -> list[float]:
    """Of windows that hold a transaction at least."""
    return [total / count for count, total in zip(counts, sums, strict=True)]


def ratio_to_mean(amount: float, count: int, total: float) -> float:
    """The amount by the mean of the others in the window; 1 where there are none."""
    others = total - amount
    return amount * (count - 1) / others if count > 1 and others > 0 else 1.0


def transaction_features(time_ms: int, amount: float) -> tuple[float, ...]:
    """TRANSACTION_FEATURES; day 0 was a Thursday."""
    hour = time_ms % DAY_MS / HOUR_MS
    return amount, hour, float(hour < 6), float((time_ms // DAY_MS + 3) % 7 >= 5)


class Escalation:
    """Whether a score is among the highest `share`; the threshold follows them from `threshold` on.

    With `share` None it stays. Source: Robbins, Monro, "A Stochastic Approximation Method", 1951.

    >>> escalation = Escalation(threshold=5.0, share=0.01)
    >>> escalated = sum(escalation(score % 1000 / 1000) for score in range(200_000))
    >>> round(escalated / 200_000, 3)
    0.01
    """

    def __init__(self, threshold: float, share: float | None) -> None:
        self.threshold, self._share = threshold, share

    def __call__(self, raw: float) -> bool:
        """Say so for one raw score."""
        escalate = raw >= self.threshold
        if self._share is not None:
            self.threshold += THRESHOLD_STEP * (escalate - self._share)
        return escalate


class Models:
    """The screener in this process, the deep model on Triton, and what is decided by them.

    `computed`: the features that `decide` is given, by name and in order.
    """

    def __init__(self, arguments: argparse.Namespace, computed: tuple[str, ...]) -> None:
        import lightgbm
        from tritonclient.grpc import InferenceServerClient

        bundle = Path(arguments.bundle)
        self._policy = json.loads((bundle / "policy.json").read_bytes())
        self._deep = json.loads((bundle / "deep.json").read_bytes())
        self._version = json.loads((bundle / "manifest.json").read_bytes())["version"]
        self._screener = lightgbm.Booster(model_file=str(bundle / "screener.txt"))
        names = self._screener.feature_name()
        # kept, and an array: a list is converted anew in each call, which takes longer than the prediction
        self._row = np.zeros((1, len(names)))
        self._columns = [names.index(name) for name in computed]
        self._triton = InferenceServerClient(arguments.triton_grpc)
        fixed = arguments.escalate_above
        start = self._policy["escalation_threshold"] if fixed is None else fixed
        self._escalation = Escalation(start, arguments.escalate_share if fixed is None else None)

    def decide(
        self, transaction: dict[str, Any], values: list[float], steps: list[list[Any]], place: str, appended_ms: int
    ) -> dict[str, Any]:
        """The decision about a transaction at `place` (topic-partition-offset) with the features `values`."""
        self._row[0, self._columns] = values
        raw = float(self._screener.predict(self._row, raw_score=True, num_threads=1)[0])
        screened = score = probability(self._policy["screener"], raw)
        stage, deep_ms = "screener", 0.0
        if self._escalation(raw):
            started_s = time.perf_counter()
            score = probability(self._policy["deep"], self._ask(raw, steps))
            stage, deep_ms = "deep", 1e3 * (time.perf_counter() - started_s)
        decision = "approve"
        if score >= self._policy["review_from"]:
            decision = "decline" if score >= self._policy["decline_from"] else "review"
        now_ms = int(1e3 * time.time())
        latency_ms = {"queue": 0.0, "features": 0.0, "screener": 0.0, "deep": deep_ms, "total": now_ms - appended_ms}
        return {
            "transaction_id": transaction["transaction_id"], "decision": decision, "score": score, "stage": stage,
            "screener_score": screened, "bundle": self._version, "degraded": False, "degraded_cause": None,
            "decision_id": place, "duplicate": False, "first_decision_id": None,
            "event_time_ms": transaction["event_time"], "decision_time_ms": now_ms, "latency_ms": latency_ms,
        }  # fmt: skip

    def _ask(self, raw: float, steps: list[list[Any]]) -> float:
        from tritonclient.grpc import InferInput

        sequence = np.zeros((1, SEQUENCE_LENGTH, self._deep["sequence_width"]), np.float32)
        now_ms = steps[-1][0]
        for position, (time_ms, amount, hour, ratio) in enumerate(steps, SEQUENCE_LENGTH - len(steps)):
            sequence[0, position, :5] = 1.0, (now_ms - time_ms) / 1e3, amount, hour, ratio
        features = np.append(self._row, [[raw]], axis=1).astype(np.float32)
        tensors = {self._deep["sequence_input"]: sequence, self._deep["features_input"]: features}
        inputs = [InferInput(name, tensor.shape, "FP32") for name, tensor in tensors.items()]
        for one, tensor in zip(inputs, tensors.values(), strict=True):
            one.set_data_from_numpy(tensor)
        return float(self._triton.infer("fraud_deep", inputs).as_numpy(self._deep["output"])[0, 0])


def probability(calibration: dict[str, float], raw: float) -> float:
    """Calibrated, as the bundle's policy says."""
    return 1.0 / (1.0 + math.exp(-(calibration["slope"] * raw + calibration["intercept"])))


def parse_arguments(description: str) -> argparse.Namespace:
    """The command line that all peers share, the one in Java too."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("bootstrap", "transactions", "decisions", "group", "bundle", "triton-grpc", "triton-http", "state"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--escalate-share", type=float, default=0.01, help="of the traffic, by a threshold that moves")
    parser.add_argument("--escalate-above", type=float, help="raw screener score, in place of the share")
    parser.add_argument("--commit-s", type=float, default=5.0)
    return parser.parse_args()
