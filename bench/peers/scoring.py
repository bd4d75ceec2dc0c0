"""What the two peers in Python share: features by card and terminal, the models, the decision's message.

The code handles a transaction at a time, as users of these libraries write it. It imports nothing of Cascade, which is
not installed in the environment of quix-streams. It computes 20 of the bundle's 30 features:

- of the transaction: amount, hour, night, weekend;
- of the terminal, over 1, 7 and 30 days: count, mean;
- of the card: seconds since the last transaction, and over 1, 7 and 30 days: count, mean, ratio to the mean of the
  transactions before.

Windows are whole days (UTC), and today is the last of them. The other features are 0: maxima, the standard deviation,
and those of chargebacks. The deep model gets the card's last 16 transactions, with 0 for its two fraud rates.
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
STEPS_MAX, SEQUENCE_INPUT = 16, "card_sequence"
TRANSACTION_FEATURES = ("amount", "hour", "night", "weekend")
WINDOWS = ("1d", "7d", "30d")
TERMINAL_FEATURES = tuple(f"terminal_{name}_{window}" for name in ("count", "amount_mean") for window in WINDOWS)
CARD_FEATURES = (
    *(f"card_{name}_{window}" for name in ("count", "amount_mean", "amount_ratio_to_mean") for window in WINDOWS),
    "card_seconds_since_last",
)
# Log-odds by which an escalation raises the threshold. With 0.1 the share settles at its target within a few thousand
# transactions, and the threshold varies by 0.1 to 0.2 afterwards.
THRESHOLD_STEP = 0.1

# A state consists of lists, which a state store can write as JSON. Days: [day, count, sum] each, the oldest first.
Days = list[list[Any]]


@dataclass(slots=True)
class Card:
    """A card's state. `steps`: [time in ms, amount, hour, ratio to the mean over 30 days], the oldest first."""

    days: Days
    steps: list[list[Any]]

    def features(self, time_ms: int, amount: float) -> list[float]:
        """Adds a transaction, and returns CARD_FEATURES with it."""
        since_last = (time_ms - self.steps[-1][0]) / 1e3 if self.steps else -1.0
        counts, sums = add(self.days, time_ms, amount)
        ratios = [ratio_to_mean(amount, count, total) for count, total in zip(counts, sums, strict=True)]
        self.steps.append([time_ms, amount, time_ms % DAY_MS / HOUR_MS, ratios[-1]])
        del self.steps[:-STEPS_MAX]
        return [*counts, *means(counts, sums), *ratios, since_last]


def add(days: Days, time_ms: int, amount: float) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Adds a transaction, and returns counts and sums over 1, 7 and 30 days with it.

    A late transaction counts as of the newest day.
    """
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
    """Means of windows that have at least a transaction each."""
    return [total / count for count, total in zip(counts, sums, strict=True)]


def ratio_to_mean(amount: float, count: int, total: float) -> float:
    """The amount over the mean of the others in the window; 1 where there are no others."""
    others = total - amount
    return amount * (count - 1) / others if count > 1 and others > 0 else 1.0


def transaction_features(time_ms: int, amount: float) -> tuple[float, ...]:
    """TRANSACTION_FEATURES; day 0 was a Thursday."""
    hour = time_ms % DAY_MS / HOUR_MS
    return amount, hour, float(hour < 6), float((time_ms // DAY_MS + 3) % 7 >= 5)


class Escalation:
    """Escalates about the share `share` of the scores, the highest; with None, the scores from `threshold` on.

    The threshold starts at `threshold` and moves with every score. Source: Robbins, Monro, "A Stochastic Approximation
    Method", 1951.

    >>> escalation = Escalation(threshold=5.0, share=0.01)
    >>> escalated = sum(escalation(score % 1000 / 1000) for score in range(200_000))
    >>> round(escalated / 200_000, 3)
    0.01
    """

    def __init__(self, threshold: float, share: float | None) -> None:
        self.threshold, self._share = threshold, share

    def __call__(self, raw: float) -> bool:
        """Whether to escalate the next transaction, by its raw score; moves the threshold."""
        escalate = raw >= self.threshold
        if self._share is not None:
            self.threshold += THRESHOLD_STEP * (escalate - self._share)
        return escalate


class Models:
    """The screener in this process, the deep model on Triton, and the policy that decides by them.

    `computed`: names of the features that `decide` gets, in their order.
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
        # an array that every call uses again: LightGBM converts a list for longer than it predicts
        self._row = np.zeros((1, len(names)))
        self._columns = [names.index(name) for name in computed]
        self._triton = InferenceServerClient(arguments.triton_grpc)
        fixed = arguments.escalate_above
        start = raw_at(self._policy["screener"], self._policy["review_from"]) if fixed is None else fixed
        self._escalation = Escalation(start, arguments.escalate_share if fixed is None else None)

    def decide(
        self,
        transaction: dict[str, Any],
        features: list[float],
        steps: list[list[Any]],
        decision_id: str,
        appended_ms: int,
    ) -> dict[str, Any]:
        """The message of the decision about a transaction.

        transaction: its message.
        features: in the order of `computed`.
        steps: the card's last transactions, this one included.
        decision_id: topic-partition-offset of the transaction.
        appended_ms: the record's timestamp.
        """
        self._row[0, self._columns] = features
        raw = float(self._screener.predict(self._row, raw_score=True, num_threads=1)[0])
        screened = score = probability(self._policy["screener"], raw)
        stage, deep_ms = "screener", 0.0
        if self._escalation(raw):
            started_s = time.perf_counter()
            score = combined(self._policy["combined"], raw, self._ask(raw, steps))
            stage, deep_ms = "deep", 1e3 * (time.perf_counter() - started_s)
        decision = "approve"
        if score >= self._policy["review_from"]:
            decision = "decline" if score >= self._policy["decline_from"] else "review"
        now_ms = int(1e3 * time.time())
        latency_ms = {"queue": 0.0, "features": 0.0, "screener": 0.0, "deep": deep_ms, "total": now_ms - appended_ms}
        return {
            "transaction_id": transaction["transaction_id"],
            "decision": decision,
            "score": score,
            "stage": stage,
            "screener_score": screened,
            "bundle": self._version,
            "degraded": False,
            "degraded_cause": None,
            "decision_id": decision_id,
            "duplicate": False,
            "first_decision_id": None,
            "event_time_ms": transaction["event_time"],
            "decision_time_ms": now_ms,
            "latency_ms": latency_ms,
        }

    def _ask(self, raw: float, steps: list[list[Any]]) -> float:
        from tritonclient.grpc import InferInput

        # zeros for what a peer does not know: other sequences, and the terminal's part of a step
        tensors = {name: np.zeros((1, *shape), np.float32) for name, shape in self._deep["sequences"].items()}
        sequence, now_ms = tensors[SEQUENCE_INPUT][0], steps[-1][0]
        for position, (time_ms, amount, hour, ratio) in enumerate(steps, len(sequence) - len(steps)):
            sequence[position, :5] = 1.0, (now_ms - time_ms) / 1e3, amount, hour, ratio
        tensors[self._deep["features_input"]] = np.append(self._row, [[raw]], axis=1).astype(np.float32)
        inputs = [InferInput(name, tensor.shape, "FP32") for name, tensor in tensors.items()]
        for model_input, tensor in zip(inputs, tensors.values(), strict=True):
            model_input.set_data_from_numpy(tensor)
        return float(self._triton.infer("fraud_deep", inputs).as_numpy(self._deep["output"])[0, 0])


def probability(calibration: dict[str, float], raw: float) -> float:
    """The calibrated probability of a raw score, by the policy's logistic `calibration`."""
    return 1.0 / (1.0 + math.exp(-(calibration["slope"] * raw + calibration["intercept"])))


def raw_at(calibration: dict[str, float], chance: float) -> float:
    """The raw score whose calibrated probability is `chance`, 0 < chance < 1."""
    return (math.log(chance / (1.0 - chance)) - calibration["intercept"]) / calibration["slope"]


def combined(combination: dict[str, float], screener_raw: float, deep_raw: float) -> float:
    """The probability by both models' raw scores, by the policy's logistic `combination`."""
    log_odds = combination["screener"] * screener_raw + combination["deep"] * deep_raw + combination["intercept"]
    return 1.0 / (1.0 + math.exp(-log_odds))


def parse_arguments(description: str) -> argparse.Namespace:
    """The command line of all peers; the peer in Java reads the same."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("bootstrap", "transactions", "decisions", "group", "bundle", "triton-grpc", "triton-http", "state"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument(
        "--escalate-share", type=float, default=0.01, help="share of the traffic, by a threshold that moves"
    )
    parser.add_argument("--escalate-above", type=float, help="raw screener score, instead of the share")
    parser.add_argument("--commit-s", type=float, default=5.0)
    return parser.parse_args()
