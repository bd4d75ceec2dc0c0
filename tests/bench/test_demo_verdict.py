"""The four lines for a CFO: good and bad news in the same plain words, within 80 columns."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bench.cores import Cores
from bench.deep_calls import ROWS
from bench.demo_cost import sizes_of
from bench.demo_kept import Kept, kept_of
from bench.demo_verdict import energy_lines, light_line, quality_line, service_line
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.ledger import LedgerSummary
from cascade.ledger.counterfactual import deep_only
from cascade.ledger.deep_cost import Estimate
from cascade.ledger.sla import ObjectiveResult
from cascade.ledger.summary import Counterfactual
from stages.intervals import Figure
from tests.cascade.ledger.test_counterfactual import cost, ledger

# 80 columns less the longest name and the padding
WIDTH_MAX = 69


def compared(low: float, value: float, high: float) -> LedgerSummary:
    """A ledger whose deep-only needs `value` times the energy."""
    found = deep_only(ledger(), cost())
    (comparison,) = found.comparisons
    filled = msgspec.structs.replace(comparison.filled, ratio=Estimate(value, low, high))
    changed: Counterfactual = msgspec.structs.replace(
        found, comparisons=(msgspec.structs.replace(comparison, filled=filled),)
    )
    return msgspec.structs.replace(ledger(), counterfactual=changed)


def objective(name: str, value: float, limit: float) -> ObjectiveResult:
    return ObjectiveResult(name, "ms", limit, value, "met" if value <= limit else "missed", None)


def cores(waited_share: float | None) -> Cores:
    used = {"service": 0.28, "Kafka": 0.54, "Triton": 0.01, "load": 0.31, "others": 0.04}
    return Cores(cores=2, used=used, waited_share=waited_share)


MORE, LESS, SAME = (21.0, 22.0, 23.0), (0.75, 0.8, 0.9), (0.95, 1.02, 1.1)


@pytest.mark.parametrize(
    ("backlog", "live", "text"),
    [
        (MORE, (10.5, 11.0, 11.5), "deep-only needs more: backlog 22.0 ×, live 11.0 × (modelled)"),
        (LESS, LESS, "deep-only needs less: backlog 0.800 ×, live 0.800 × (modelled)"),
        (SAME, SAME, "deep-only needs as much: backlog 1.02 ×, live 1.02 × (modelled)"),
        (MORE, SAME, "mixed: deep-only backlog 22.0 ×, live 1.02 × (modelled)"),
        ((2.5, 4.1, 6.0), (11.0, 19.0, 21.0), "deep-only needs more: backlog 2.5–6 ×, live 11–21 × (modelled)"),
        (
            (130.0, 170.0, 240.0),
            (99.0, 100.0, 140.0),
            "deep-only needs more: backlog 130–240 ×, live 99–140 × (modelled)",
        ),
        (SAME, LESS, "mixed: deep-only backlog 1.02 ×, live 0.800 × (modelled)"),
    ],
)
def test_the_energy_line_says_who_needs_more(backlog: tuple[float, ...], live: tuple[float, ...], text: str) -> None:
    (line,) = energy_lines(compared(*backlog), compared(*live))
    assert line == text
    assert len(line) <= WIDTH_MAX


def test_an_energy_that_was_not_measured_is_no_number() -> None:
    (line,) = energy_lines(compared(*MORE), ledger())
    assert "not measured" in line
    assert "×" not in line
    assert len(line) <= WIDTH_MAX


def test_the_service_line_says_by_whom_a_limit_is_missed() -> None:
    late, early = objective("p99 of screened", 41.3, 5.0), objective("p99 of escalated", 12.0, 20.0)
    assert service_line([early], cores(0.6)) == "met: all 1 limits"
    assert service_line([late, early], cores(0.6)) == "missed 1 of 2 limits; no free core: Kafka, load took 0.85 of 2"
    assert service_line([late, late], cores(0.01)) == ("missed 2 of 2 limits; a core was free: the service is too slow")
    assert "not known" in service_line([late, early], cores(None))
    others = Cores(cores=64, used={"service": 1.0, "others": 51.1, "Kafka": 12.0}, waited_share=0.3)
    for line in (service_line([late] * 3, others), service_line([late], cores(0.0)), service_line([late], cores(None))):
        assert len(line) <= WIDTH_MAX


def test_the_first_two_lines_are_shares_of_all_and_of_deep_only() -> None:
    assert light_line(0.0081, 162_598) == "99.2 % of 162,598 transactions never reached the deep model"
    found = Kept(Figure(0.9234, 0.9, 0.95), Figure(0.966, 0.94, 0.99))
    assert quality_line(found) == "92.3 % of deep-only's average precision, 96.6 % of its caught frauds"
    assert "not known" in quality_line(None)


def test_what_is_kept_of_deep_only_is_counted_by_hand_with_an_interval_that_contains_it() -> None:
    policy = load_bundle(SHIPPED_BUNDLE).policy
    chance = np.random.default_rng(4)
    rows = 6_000
    fraud = chance.random(rows) < 0.05
    day, card = np.arange(rows) * 40 // rows, chance.integers(0, 300, rows)
    deep = np.where(fraud, 0.9, policy.review_from / 2)
    # the cascade approves every fourth fraud, and ranks it below all genuine transactions
    lost = fraud & (np.cumsum(fraud) % 4 == 0)
    found = kept_of(np.where(lost, 0.0, deep), deep, np.ones(rows), fraud, day, card, policy)
    assert found is not None
    assert found.caught.value == pytest.approx(1.0 - lost.sum() / fraud.sum())
    assert found.caught.low < found.caught.value < found.caught.high
    assert 0.7 < found.precision.value < 0.85
    assert kept_of(deep, np.zeros(rows), np.ones(rows), fraud, day, card, policy) is None
    # deep-only's figures from a third of its genuine rows, each of which stands for three
    sampled = fraud | (np.arange(rows) % 3 == 0)
    weight = np.where(fraud, 1.0, np.where(sampled, 3.0, 0.0))
    again = kept_of(np.where(lost, 0.0, deep), np.where(sampled, deep, 0.0), weight, fraud, day, card, policy)
    assert again is not None
    assert again.precision.value == pytest.approx(found.precision.value, abs=0.01)
    assert again.caught == found.caught


def test_the_sizes_measured_are_those_that_occur() -> None:
    # 100/s and 20 ms: deep-only fills calls of 3 at most; the cascade's own have 2 rows
    assert sizes_of([ledger()]) == [1, 2]
    fast = msgspec.structs.replace(ledger(), per_second=25_000.0)
    assert sizes_of([ledger(), fast]) == list(ROWS)
    large = ledger(rows=50 * 20)
    assert sizes_of([large]) == [1, 2, 4, 8, 16, 32]
