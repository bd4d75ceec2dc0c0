"""One formula of the saving: by hand, with its corners, and equal to the ledger's own comparison."""

from __future__ import annotations

import msgspec
import pytest

from cascade.ledger.counterfactual import deep_only
from cascade.ledger.deep_cost import Estimate
from cascade.ledger.unit_costs import UnitCosts
from tests.cascade.ledger.test_counterfactual import SERVICE, cost, ledger, state


def exact(value: float) -> Estimate:
    return Estimate(value, value, value)


COSTS = UnitCosts(
    shared_mj=exact(2.0), idle_mj=exact(0.5), screener_mj=0.1, deep_only_mj=exact(20.0), own_deep_mj=exact(40.0)
)


def test_the_saving_is_the_quotient_of_both_services() -> None:
    assert COSTS.whole_mj.value == pytest.approx(22.0)
    assert COSTS.cascade_mj(0.01).value == pytest.approx(2.5)
    assert COSTS.saving(0.01).value == pytest.approx(22.0 / 2.5)
    # nothing is escalated: the screener alone
    assert COSTS.saving(0.0).value == pytest.approx(22.0 / 2.1)
    # everything is, and the screener and smaller calls come on top
    assert COSTS.saving(1.0).value == pytest.approx(22.0 / 42.1)


def test_twenty_times_needs_a_deep_model_of_24_c0_and_25_s() -> None:
    """The arithmetic of the goal: at 1 % escalated in equal calls."""
    deep = 24.0 * 2.0 + 25.0 * 0.1
    enough = msgspec.structs.replace(COSTS, deep_only_mj=exact(deep), own_deep_mj=exact(deep))
    assert enough.saving(0.01).value == pytest.approx(20.0, rel=0.02)


def test_idle_power_is_on_both_sides_or_on_neither() -> None:
    without = COSTS.saving_without_idle(0.01)
    assert without is not None
    assert without.value == pytest.approx(21.5 / 2.0)
    idle_only = msgspec.structs.replace(COSTS, idle_mj=exact(2.0), screener_mj=0.0, own_deep_mj=None)
    assert idle_only.saving_without_idle(0.01) is None


def test_both_services_cost_the_same_at_the_even_share() -> None:
    share = COSTS.even_share()
    assert share is not None
    assert share.value == pytest.approx((20.0 - 0.1) / 40.0)
    assert COSTS.saving(share.value).value == pytest.approx(1.0)
    assert msgspec.structs.replace(COSTS, own_deep_mj=Estimate(1.0, -0.1, 2.0)).even_share() is None


def test_the_interval_has_the_less_favourable_ends() -> None:
    wide = msgspec.structs.replace(
        COSTS, deep_only_mj=Estimate(20.0, 18.0, 23.0), own_deep_mj=Estimate(40.0, 30.0, 50.0)
    )
    saving = wide.saving(0.01)
    assert (saving.low, saving.value, saving.high) == pytest.approx((20.0 / 2.6, 22.0 / 2.5, 25.0 / 2.4))


def test_the_ledgers_comparison_is_the_same_formula() -> None:
    found = deep_only(ledger(*SERVICE, state("cpu-idle", 100.0)), cost(off=0.1))
    (comparison,) = found.comparisons
    for other in (comparison.filled, comparison.as_called):
        assert other is not None
        unit = other.unit_costs
        assert unit.saving(found.asked / found.transactions).value == pytest.approx(other.ratio.value)
        assert unit.even_share() == other.break_even_share
        assert unit.shared_mj.value == pytest.approx(1e3 * comparison.shared_j.value / 10_000)
        assert unit.screener_mj == pytest.approx(2.0)
        # 100 J of reserved cores, and 5 J of the server, in 10,000 transactions
        assert unit.idle_mj.value == pytest.approx(10.5)
        assert other.ratio_without_idle is not None
        assert other.ratio_without_idle.value > other.ratio.value
