"""`cascade worth`: energy by the formula, the verdict where deep pays and where it does not, and the command."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bench.worth.report import Electricity, KindWorth, WorthReport, kind_worth
from bench.worth.shared_cost import by_default, collected_rows, collected_s, of_ledger, read_ledger
from bench.worth.show import show_worth
from bench.worth.verdict import verdict
from cascade.bundle import SHIPPED_BUNDLE, load_bundle, write_bundle
from cascade.cli import main
from cascade.errors import DataError
from cascade.ledger.deep_cost import DeepCost
from cascade.ledger.errors import CounterfactualError
from stages.worth import ways_to_decide
from tests.cascade.ledger.test_counterfactual import GPU, call, cost, cost_meter, estimate, ledger
from tests.stages.test_worth import policy, rows

EUROS = Electricity(price=0.2, currency="EUR", pue=1.5)
RATE = 1_000.0


def report(deep_knows: float, deep_cost: DeepCost | None = None) -> WorthReport:
    found, deep_cost = rows(deep_knows), deep_cost or cost(off=0.1)
    ways = ways_to_decide(found, policy(found), 1)
    shared = by_default(deep_cost, RATE, screener_us=0.4)
    return WorthReport(
        bundle="b-1",
        rate=RATE,
        transactions=len(found),
        frauds=int(found.fraud.sum()),
        reviews_per_day_max=None,
        electricity=EUROS,
        ways=ways,
        kinds=tuple(kind_worth(kind, ways, shared, deep_cost, RATE, EUROS) for kind in deep_cost.kinds),
        shared=shared,
        cost=deep_cost,
    )


@pytest.fixture(scope="module")
def paying() -> WorthReport:
    return report(deep_knows=4.0)


@pytest.fixture(scope="module")
def useless() -> WorthReport:
    return report(deep_knows=0.3)


def only(found: WorthReport) -> KindWorth:
    (kind,) = found.kinds
    return kind


# --- energy -----------------------------------------------------------------------------------------------------------


def test_the_energy_of_a_share_is_the_formula_by_hand(paying: WorthReport) -> None:
    # 304 CPU µs at 10 W, and 0.05 W of the idle server at 1,000/s
    c0, s = 3.04 + 0.05, 0.4e-6 * 10.0 * 1e3
    # 4 rows fill in 3 ms and answer in 1.04 ms; 64 would take 63 ms to fill
    deep_only_mj = (7.0 + 12.0) / 4.0
    *shared, deep_only = only(paying).energy
    assert deep_only.rows_per_call == 4.0
    assert deep_only.mj.value == pytest.approx(c0 + deep_only_mj)
    assert shared[0].mj.value == pytest.approx(c0 + s)
    assert shared[0].saving.value == pytest.approx((c0 + deep_only_mj) / (c0 + s))
    one = shared[3]
    assert one.share == 0.01
    # λ = 10/s · 5 ms, so that nearly every call has one row
    count = 0.05 / -np.expm1(-0.05)
    assert one.rows_per_call == pytest.approx(count)
    own_mj = ((4.0 + 6.0) + (count - 1.0) / 3.0 * (7.0 + 12.0 - 10.0)) / count
    assert one.mj.value == pytest.approx(c0 + s + 0.01 * own_mj)
    assert one.saving.value == pytest.approx(deep_only.mj.value / one.mj.value)
    assert one.saving.low < one.saving.value < one.saving.high
    assert one.saving_without_idle is not None
    assert one.saving_without_idle.value > one.saving.value
    # 1,000 transactions of 3.19 mJ
    assert one.money_per_thousand == pytest.approx(one.mj.value / 3.6e6 * 1.5 * 0.2)


def test_measured_and_modelled_joules_have_a_table_and_a_verdict_each() -> None:
    meters = (*cost().meters, cost_meter("gpu0", "measured", GPU, 50.0), cost_meter("rapl", "measured", "RAPL", 30.0))
    calls = tuple(
        msgspec.structs.replace(found, energy_mj=found.energy_mj | {"gpu0": estimate(gpu), "rapl": estimate(9e6)})
        for found, gpu in zip(cost().calls, (60.0, 90.0, 600.0), strict=True)
    )
    modelled, measured = report(4.0, cost(meters=meters, calls=calls)).kinds
    assert (modelled.kind, measured.kind) == ("modelled", "measured")
    assert modelled.energy[-1].mj.value == pytest.approx(3.09 + 4.75)
    # idle power of the card for 1 ms, and its part of a call
    assert measured.energy[0].mj.value == pytest.approx(50.0)
    assert measured.energy[-1].mj.value == pytest.approx(50.0 + 90.0 / 4.0)


def test_a_ledger_gives_its_own_c0_and_s() -> None:
    summary, deep_cost = ledger(), cost()
    shared = of_ledger(summary, deep_cost, Path("own.json"))
    assert shared.shared_mj["modelled"].value == pytest.approx(1e3 * (430.0 - 20.0 - 25.25) / 10_000)
    assert shared.screener_mj["modelled"] == pytest.approx(2.0)
    assert shared.limit_ms == 20.0
    # 2 rows a call at one escalated transaction a second
    assert collected_rows(1.0, shared.collected_s) == pytest.approx(2.0)
    assert "own.json" in shared.origin
    with pytest.raises(CounterfactualError, match="bundle b-1, but the cost"):
        of_ledger(summary, cost(bundle_version="b-2"), Path("own.json"))


def test_rows_of_a_call_are_the_mean_of_random_arrivals_that_are_not_none() -> None:
    arrivals = np.random.default_rng(1).poisson(1.3, 200_000)
    assert collected_rows(260.0, 0.005) == pytest.approx(arrivals[arrivals > 0].mean(), rel=0.01)
    assert collected_rows(260.0, collected_s(7.7, 260.0)) == pytest.approx(7.7)
    assert collected_s(1.0, 10.0) == pytest.approx(0.0, abs=1e-6)


def test_a_call_that_is_not_surely_dearer_than_idle_is_refused() -> None:
    noisy = cost(calls=tuple(call(rows_, 3.0, cpu_worker=1.0, cpu_deep=1.0) for rows_ in (1, 4)))
    with pytest.raises(CounterfactualError, match="more than idle; measure in longer"):
        report(4.0, noisy)


# --- verdict ----------------------------------------------------------------------------------------------------------


def test_where_deep_pays_the_sentence_has_share_gains_and_energy(paying: WorthReport) -> None:
    found = only(paying)
    totals = [
        way.cost_per_thousand.value + energy.money_per_thousand
        for way, energy in zip(paying.ways[:-1], found.energy[:-1], strict=True)
    ]
    assert found.best == int(np.argmin(totals))
    assert found.pays
    text = verdict(paying, found)
    assert text.startswith("The deep stage pays here: best at ")
    assert "on the screener alone" in text
    assert "than everything deep, which needs " in text


def test_where_deep_does_not_pay_it_says_so(useless: WorthReport) -> None:
    found = only(useless)
    assert not found.pays
    text = verdict(useless, found)
    assert "does not pay here" in text or "is not shown to pay here" in text


def test_no_share_below_the_screener_is_a_plain_no(paying: WorthReport) -> None:
    dearer = tuple(
        msgspec.structs.replace(
            way, cost_per_thousand=msgspec.structs.replace(way.cost_per_thousand, value=1e3 + place)
        )
        for place, way in enumerate(paying.ways)
    )
    found = kind_worth("modelled", dearer, paying.shared, paying.cost, RATE, EUROS)
    assert found.best == 0
    assert not found.pays
    changed = msgspec.structs.replace(paying, ways=dearer)
    assert verdict(changed, found).startswith("The deep stage does not pay here: no escalated share costs less")


def test_electricity_decides_where_decisions_cost_the_same(paying: WorthReport) -> None:
    """At an absurd price of a kWh the screener alone is cheapest, whatever the deep model knows."""
    dear = Electricity(price=1e12, currency="EUR", pue=1.0)
    assert kind_worth("modelled", paying.ways, paying.shared, paying.cost, RATE, dear).best == 0


@pytest.mark.parametrize("name", ["paying", "useless"])
def test_the_report_fits_eighty_columns(name: str, request: pytest.FixtureRequest) -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    show_worth(request.getfixturevalue(name), console)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for part in ("c0 3.09", "s 0.004", "D 4.75", "the default, 304 CPU µs at 1,000/s", "(modelled)", "100 % (both)"):
        assert part in text


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle, whose validation rows are those of a deep model that pays."""
    shipped = load_bundle(SHIPPED_BUNDLE)
    directory = tmp_path_factory.mktemp("worth") / "bundle"
    content = {**shipped.content, "validation.parquet": rows(4.0).to_parquet()}
    write_bundle(directory, "worth", content)
    return directory


def test_the_command_measures_in_process_and_prints_the_verdict_last(
    bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["worth", "--bundle", str(bundle), "--rate", "1000", "--seconds", "0.2", "--json"]) == 0
    found = msgspec.json.decode(capfd.readouterr().out, type=WorthReport)
    assert found.cost.backend == "onnxruntime"
    assert found.bundle == load_bundle(bundle).version
    assert len(found.ways) == len(found.kinds[0].energy) == 8


def test_the_command_takes_a_cost_of_the_same_model_and_refuses_another(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_bundle(bundle)
    path = tmp_path / "cost.json"
    same = cost(model_sha256=hashlib.sha256(loaded.content["deep.onnx"]).hexdigest())
    path.write_bytes(msgspec.json.encode(same))
    arguments = ["worth", "--bundle", str(bundle), "--rate", "1000", "--cost", str(path)]
    assert main([*arguments, "--review-capacity", "3"]) == 0
    text = capfd.readouterr().out
    assert "at most 3" in text
    assert "deep stage" in text.split("electricity at")[-1]
    path.write_bytes(msgspec.json.encode(cost()))
    assert main(arguments) == 1
    assert "of the deep model of bundle b-1, not of worth-" in capfd.readouterr().err


def test_a_missing_rate_and_a_file_that_is_no_ledger_are_errors_of_a_line(
    bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["worth", "--bundle", str(bundle)]) == 1
    assert "--rate: is missing; state your load" in capfd.readouterr().err
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(DataError, match=r"ledger\.json: .*use a file of `cascade run --ledger`"):
        read_ledger(tmp_path / "ledger.json")
    summary = ledger()
    (tmp_path / "ledger.json").write_bytes(summary.to_json_line())
    assert read_ledger(tmp_path / "ledger.json") == summary
