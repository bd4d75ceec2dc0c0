"""Which rows are escalated, so that their share stays at the budget: a streaming quantile with a token bucket.

Each row brings a share of a token, the budget; an escalated row takes one token. The bucket is the bound: over any
`WINDOW_ROWS` rows the number of escalated rows differs from the budget by at most the bucket's capacity, since a row is
escalated only if there is a token, and the next row that may be escalated is, once the bucket is full. The quantile
decides which rows: the fuller the bucket, the lower the threshold, so that a good row seldom finds it empty and a poor
one seldom finds it full.

The threshold at a level of the bucket is the quantile of the last SAMPLE_ROWS scores whose upper share is

    budget · exp(π/w · tan(π · (level − middle)/w)),      w = capacity − 1

The exponent is the drift that keeps a diffusion inside an interval of width w at the least quadratic cost (the ground
state of a free particle in a box: Fleming, "Exit probabilities and optimal stochastic control", 1977). For scores with
an exponential tail that cost is the value that is lost. `bench/escalation.py` compares the result with the best
possible choice under the same bounds.
"""

from __future__ import annotations

import math

import numpy as np

from cascade.columns import Array, Bool, Float64
from cascade.compilation import kernel
from cascade.policy import RAW_MAX, Policy

# The share holds over any so many rows, within this part of the budget.
WINDOW_ROWS = 10_000
TOLERANCE = 0.1
# With less than two tokens there is nothing to choose: every (1/budget)th row would be escalated, whatever its score.
# Budgets below 0.2 % are therefore held within two rows of any 10,000.
CAPACITY_MIN = 2.0
# Longer samples follow a day's curve too late (value kept with 2,048 rows: 96 %; with 10,000: 89 %), shorter ones
# estimate a quantile of 1 % from a few rows only.
SAMPLE_ROWS = 2_048
# To sort the top of the sample takes 25 µs: 0.05 µs a row.
RENEW_ROWS = 512
# With fewer rows the quantile says less than the policy's threshold, which training has measured at the budget.
SAMPLE_ROWS_MIN = 128
# Thresholds, one for each stretch of the bucket's level.
STEPS = 64
# No threshold lies deeper than this many times the budget. A full bucket takes any row.
SHARE_MAX = 16.0

# numba takes a structured array as one argument.
CONTROL = np.dtype(
    [
        ("budget", np.float64), ("capacity", np.float64), ("level", np.float64), ("seen", np.int64),
        ("renew_at", np.int64), ("shares", np.float64, (STEPS,)), ("thresholds", np.float64, (STEPS,)),
        ("sample", np.float64, (SAMPLE_ROWS,)),
    ],
    align=True,
)  # fmt: skip


class EscalationBudget:
    """Chooses the rows to escalate; its state goes on from one micro-batch to the next. For one thread.

    Rows are taken one by one, so the result does not depend on how they are cut into micro-batches. The bucket is empty
    at the start: restarts, however many, never add up to more than the budget.

    budget: share of the rows to escalate, 0 to 1. With 0 no row is escalated, with 1 every row whose score is finite;
        neither uses tokens.
    threshold: the score above which rows are escalated until SAMPLE_ROWS_MIN rows are known.

    `control`: the state, CONTROL [1], for `choose_row`.

    >>> import numpy as np
    >>> control = EscalationBudget(budget=0.01, threshold=2.0)
    >>> scores = np.random.default_rng(7).standard_normal(50_000)
    >>> int(control.choose(scores, np.zeros(50_000, bool))[-10_000:].sum())
    100
    """

    def __init__(self, budget: float, threshold: float) -> None:
        if not 0.0 <= budget <= 1.0:
            raise ValueError(f"an escalation budget of {budget}: it must lie in [0, 1]")
        self._budget = budget
        self._factor = 1.0
        self.control: Array = np.zeros(1, CONTROL)
        self.control["thresholds"] = threshold
        self.control["renew_at"] = SAMPLE_ROWS_MIN
        self._set(budget)

    @classmethod
    def of_policy(cls, policy: Policy) -> EscalationBudget:
        """The control for a policy; a threshold of ∓RAW_MAX escalates everything or nothing, whatever the budget."""
        escalation = policy.escalation
        if abs(escalation.threshold) >= RAW_MAX:
            return cls(float(escalation.threshold < 0), escalation.threshold)
        return cls(escalation.budget, escalation.threshold)

    @property
    def factor(self) -> float:
        """The part of the budget that is used now, above 0, at most 1; a budget of 0 or 1 is not lowered."""
        return self._factor

    @factor.setter
    def factor(self, factor: float) -> None:
        if factor == self._factor:
            return
        if not 0.0 < factor <= 1.0:
            raise ValueError(f"a budget factor of {factor}: it must lie in (0, 1]")
        self._factor = factor
        if 0.0 < self._budget < 1.0:
            self._set(self._budget * factor)

    @property
    def level(self) -> float:
        """Tokens in the bucket; negative after more rows than tokens had to stay escalated."""
        return float(self.control["level"][0])

    @property
    def rows_seen(self) -> int:
        """The number of rows among which it has chosen; with a budget of 0 or 1 it does not count."""
        return int(self.control["seen"][0])

    @property
    def capacity(self) -> float:
        """The most tokens in the bucket: by so many rows the number of any WINDOW_ROWS rows differs from the budget."""
        return float(self.control["capacity"][0])

    def choose(self, scores: Float64, was_escalated: Bool | None = None) -> Bool:
        """Returns the mask of the rows to escalate, bool [rows].

        The pipeline calls `choose_row` from its own kernel instead. Raises ValueError where a score is NaN.

        - `scores` float64 [rows]: the higher, the more a row is worth escalating; −∞: it is never escalated.
        - `was_escalated` bool [rows]: an earlier owner of the partition has escalated the row. It stays escalated,
          whatever its score, and takes a token even from an empty bucket. None: no row was.
        """
        escalate = np.empty(len(scores), np.bool_)
        earlier = np.zeros(len(scores), np.bool_) if was_escalated is None else was_escalated
        _choose(self.control, scores, earlier, escalate)
        return escalate

    def _set(self, budget: float) -> None:
        """Uses a budget from now on. A smaller bucket keeps what it has room for."""
        control = self.control
        capacity = max(TOLERANCE * WINDOW_ROWS * budget, CAPACITY_MIN)
        control["budget"], control["capacity"] = budget, capacity
        control["level"] = np.minimum(control["level"], capacity)
        control["shares"] = shares_by_level(budget, capacity)
        if control["seen"][0] >= SAMPLE_ROWS_MIN:
            _renew(control)


def shares_by_level(budget: float, capacity: float) -> Float64:
    """The share of the rows above the threshold for each of the STEPS levels from 1 token to a full bucket, float64."""
    width = capacity - 1.0
    angles = math.pi * ((np.arange(STEPS) + 0.5) / STEPS - 0.5)
    # far beyond SHARE_MAX the exponential would overflow
    exponents = np.minimum(math.pi / width * np.tan(angles), math.log(SHARE_MAX))
    return np.asarray(np.minimum(budget * np.exp(exponents), 1.0), np.float64)


@kernel
def choose_row(control: Array, score: float, was_escalated: bool) -> bool:
    """Whether to escalate a row: `EscalationBudget.choose` for one row. control: of the EscalationBudget."""
    state = control[0]
    if np.isnan(score):
        raise ValueError("an escalation score is not a number")
    budget, capacity = state.budget, state.capacity
    eligible = score > -np.inf
    if budget >= 1.0 or budget <= 0.0:
        return was_escalated or (eligible and budget >= 1.0)
    state.level = min(state.level + budget, capacity)
    escalate = False
    if was_escalated:
        escalate = True
    elif state.level + budget > capacity:
        # the bucket would overflow at the next row
        escalate = eligible
    elif eligible and state.level >= 1.0:
        step = int((state.level - 1.0) / (capacity - 1.0) * STEPS)
        escalate = score > state.thresholds[min(step, STEPS - 1)]
    state.level -= escalate
    state.sample[state.seen % SAMPLE_ROWS] = score
    state.seen += 1
    if state.seen == state.renew_at:
        _renew(control)
    return escalate


@kernel
def _choose(control: Array, scores: Float64, was_escalated: Bool, escalate: Bool) -> None:
    for row in range(len(scores)):
        escalate[row] = choose_row(control, scores[row], was_escalated[row])


@kernel
def _renew(control: Array) -> None:
    """Computes the thresholds from the sample.

    A score is above a step's threshold if the part of the sample above it, with half of its ties, is at most the step's
    share: so a group of equal scores that is larger than the budget is not all or nothing (mid-ranks: Parzen, "Quantile
    probability and statistical data modeling", 2004).
    """
    state = control[0]
    rows = min(state.seen, SAMPLE_ROWS)
    sample = state.sample[:rows]
    # no threshold lies below this one: to sort the others too would take five times as long
    lowest = max(rows - 1 - int(state.shares[STEPS - 1] * rows), 0)
    ascending = np.sort(sample[sample >= np.partition(sample, lowest)[lowest]])
    size = len(ascending)
    for step in range(STEPS):
        allowed = state.shares[step] * rows
        score = ascending[max(size - 1 - int(allowed), 0)]
        first, end = np.searchsorted(ascending, score), np.searchsorted(ascending, score, side="right")
        fits = size - end + (end - first) / 2 <= allowed
        state.thresholds[step] = np.nextafter(score, -np.inf) if fits else score
    state.renew_at = state.seen + min(RENEW_ROWS, state.seen)
