"""The ledger: its figures equal what was recorded, kinds of energy stay separate, and readers see consistent counts."""

import threading
import time

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import cascade
from cascade.compilation import compilations
from cascade.errors import DataError
from cascade.ledger import Ledger, LedgerSummary, ModelQuality, QualityComparison, StageLaps
from cascade.ledger.buckets import BUCKETS_S
from cascade.ledger.counters import LABELS_MAX, OTHER_LABEL
from cascade.ledger.export import ledger_registry
from cascade.ledger.stage_clock import STAGES
from tests.cascade.ledger.helpers import FixedMeter, ManualClock, records, rendered

QUALITY = QualityComparison(
    transactions=1_000,
    frauds=10,
    alert_rule="the 1 % with the highest scores",
    models=(
        ModelQuality(name="cascade", frauds_caught=7, frauds_missed=3, auc_roc=0.91, average_precision=0.7),
        ModelQuality(name="screener only", frauds_caught=6, frauds_missed=4),
    ),
)


def _ledger(*meters: FixedMeter) -> Ledger:
    clock = ManualClock()
    ledger = Ledger(meters=meters, watts_per_core=8.0, bundle_version="b-1", screener="walk", clock=clock)
    ledger.record_stage("features", 0.002, 0.001, 1_000)
    ledger.record_batch(StageLaps(), np.full(1_000, 0.0005))
    ledger.record_decisions("screened", np.full(985, 0.003))
    ledger.record_decisions("escalated", np.full(10, 0.012))
    ledger.record_decisions("degraded", np.full(3, 0.05), cause="deadline")
    ledger.record_decisions("degraded", np.full(2, 0.05), cause="queue-full")
    ledger.count_dead_letters("not-json", 4)
    ledger.count_labels(7)
    ledger.count_late(2)
    ledger.add_deep_call(15, 0.008)
    clock.now_s += 2.0
    return ledger


def test_the_summary_has_what_was_recorded() -> None:
    summary = _ledger().summary()
    assert summary.transactions == 1_000
    assert summary.per_second == pytest.approx(500.0)
    assert summary.escalation_share == pytest.approx(0.015)
    assert summary.degraded_share == pytest.approx(0.005)
    assert summary.degraded_by_cause == {"deadline": 3, "queue-full": 2}
    assert summary.dead_letters == {"not-json": 4}
    assert (summary.labels, summary.deep.late_answers, summary.deep.calls, summary.deep.rows) == (7, 2, 1, 15)
    assert summary.paths["all"].decisions == 1_000
    screened = summary.paths["screened"].latency
    assert screened is not None
    assert screened.p99_ms == pytest.approx(3.0, rel=0.01)
    assert summary.bundle_version == "b-1"
    assert summary.machine.cores >= 1
    assert summary.machine.packages["numpy"] == np.__version__


def test_stage_energy_is_its_cpu_seconds_times_the_stated_watts() -> None:
    features = _ledger().summary().stages["features"]
    assert features.cpu_us_per_transaction == pytest.approx(1.0)
    assert features.modelled_mj_per_transaction == pytest.approx(8.0 * 1e-3 * 1e3 / 1_000)


def test_measured_and_modelled_energy_are_never_one_figure() -> None:
    meters = (FixedMeter("gpu0", "measured"), FixedMeter("gpu1", "measured"), FixedMeter("cpu", "modelled"))
    ledger = _ledger(*meters)
    for meter, energy_j in zip(meters, (2.0, 3.0, 7.0), strict=True):
        meter.energy_j = energy_j
    summary = ledger.summary()
    totals = {total.kind: total for total in summary.energy_totals}
    assert len(totals) == len(summary.energy_totals) == 2
    assert totals["measured"].energy_j == pytest.approx(5.0)
    assert totals["measured"].meters == ("gpu0", "gpu1")
    assert totals["modelled"].energy_j == pytest.approx(7.0)
    assert totals["modelled"].per_transaction_mj == pytest.approx(7.0)
    assert "12.0" not in str([total.energy_j for total in summary.energy_totals])


def test_a_lost_meter_makes_its_total_unknown_and_is_named() -> None:
    gpu, other = FixedMeter("gpu0", "measured"), FixedMeter("gpu1", "measured")
    ledger = _ledger(gpu, other)
    gpu.lost = True
    summary = ledger.summary()
    assert summary.energy[0].energy_j is None
    assert summary.energy_totals[0].energy_j is None
    assert "gpu0: gone" in rendered(summary)
    samples = _samples(ledger)
    assert samples["cascade_energy_meter_up", "gpu0"] == 0.0
    assert [key[1:] for key in samples if key[0] == "cascade_energy_joules_total"] == [("measured", "gpu1")]


def test_an_empty_ledger_has_no_shares_and_meets_no_objective() -> None:
    summary = Ledger().summary()
    text = rendered(summary)
    assert "no data" in text
    assert "the ledger has no meter" in text
    assert summary.escalation_share is None
    assert summary.paths["screened"].latency is None
    assert not any(objective.met for objective in summary.objectives)
    assert LedgerSummary.from_json_line(summary.to_json_line()) == summary


def test_a_summary_survives_its_json_line_and_anything_else_is_refused() -> None:
    summary = _ledger(FixedMeter("cpu", "modelled")).summary(QUALITY)
    line = summary.to_json_line()
    assert b"\n" not in line
    assert LedgerSummary.from_json_line(line) == summary
    with pytest.raises(DataError, match="ledger summary"):
        LedgerSummary.from_json_line(b"{}")


def test_exactly_the_degraded_decisions_have_a_cause() -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="cause"):
        ledger.record_decisions("screened", np.array([0.1]), cause="deadline")
    with pytest.raises(ValueError, match="cause"):
        ledger.record_decisions("degraded", np.array([0.1]))


def test_the_number_of_reasons_is_bounded() -> None:
    ledger = Ledger()
    for number in range(3 * LABELS_MAX):
        ledger.count_dead_letters(f"reason {number}", 1)
    counted = ledger.summary().dead_letters
    assert len(counted) == LABELS_MAX + 1
    assert counted[OTHER_LABEL] == 2 * LABELS_MAX


def test_readers_see_whole_batches_while_the_worker_writes() -> None:
    ledger = Ledger()
    batch = np.full(64, 0.001)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            ledger.record_decisions("screened", batch)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(200):
            histogram = ledger.counters().paths["screened"]
            assert histogram.count % 64 == 0
            assert histogram.count == sum(histogram.to_dict()["buckets"].values())
            assert histogram.sum_s == pytest.approx(histogram.count * 0.001)
    finally:
        stop.set()
        worker.join()


def test_laps_divide_the_time_of_a_batch_among_its_stages() -> None:
    laps = StageLaps()
    for _ in range(2):
        laps.begin()
        threading.Event().wait(0.03)
        laps.end("decode", 5)
        assert laps.cpu_share() < 0.5, "it has waited"
        sum(range(300_000))
        laps.end("features", 4)
        threading.Event().wait(0.03)
        laps.skip()
        laps.end("produce", 3)
        decode, features, produce = (STAGES.index(name) for name in ("decode", "features", "produce"))
        assert laps.rows[[decode, features, produce]].tolist() == [5, 4, 3]
        assert laps.rows.sum() == 12, "no stage of the batch before"
        assert laps.wall_s[decode] > 0.025
        assert laps.wall_s[features] > 0.0
        assert laps.wall_s[produce] < 0.02, "the pause belongs to no stage"
        assert laps.wall_ms("decode") == laps.wall_s[decode] * 1e3


def test_the_cpu_time_of_a_batch_is_measured() -> None:
    laps = StageLaps()
    laps.begin()
    started_s, cpu_s = time.perf_counter(), time.thread_time()
    while time.thread_time() - cpu_s < 0.05:
        sum(range(10_000))
    threading.Event().wait(0.05)
    expected = (time.thread_time() - cpu_s) / (time.perf_counter() - started_s)
    assert laps.cpu_share() == pytest.approx(expected, rel=0.2)


def test_a_batch_counts_as_its_stages_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StageLaps, "cpu_share", lambda _: 0.75)
    laps, together, each = StageLaps(), Ledger(), Ledger()
    rng = np.random.default_rng(3)
    for rows in (1, 7, 1_000):
        laps.begin()
        queue_s = rng.lognormal(-6.0, 2.0, rows)
        for stage in ("decode", "features", "screener", "decide", "produce"):
            laps.end(stage, rows)  # type: ignore[arg-type]
        laps.wall_s[:] = rng.lognormal(-8.0, 2.0, len(STAGES))
        together.record_batch(laps, queue_s)
        each.record_batch(StageLaps(), queue_s)
        for number, stage in enumerate(STAGES):
            if laps.rows[number]:
                each.record_stage(stage, laps.wall_s[number], laps.wall_s[number] * 0.75, rows)
    found, expected = together.counters(), each.counters()
    assert found.stage_cpu_s == expected.stage_cpu_s
    assert found.stages["deep"].count == 0
    for stage in STAGES:
        assert found.stages[stage].to_dict() == expected.stages[stage].to_dict()


def test_a_batch_with_a_wait_of_nan_is_not_counted() -> None:
    ledger, laps = Ledger(), StageLaps()
    laps.begin()
    laps.end("decode", 2)
    with pytest.raises(ValueError, match="NaN"):
        ledger.record_batch(laps, np.array([0.1, np.nan]))
    assert all(histogram.count == 0 for histogram in ledger.counters().stages.values())
    assert set(ledger.counters().stage_cpu_s.values()) == {0.0}


def test_a_warm_ledger_has_counted_nothing_and_compiles_no_more() -> None:
    ledger, laps = Ledger(), StageLaps()
    ledger.warm_up()
    before = compilations()
    assert not any(histogram.count for histogram in ledger.counters().stages.values())
    laps.begin()
    laps.end("decode", 1)
    ledger.record_batch(laps, np.array([0.1]))
    ledger.record_decisions("screened", np.array([0.1]), None, records(1))
    ledger.record_stage("deep", 0.1, 0.0, 1)
    ledger.add_deep_call(1, 0.1)
    ledger.record_recovery(0.1)
    assert compilations() == before


def test_each_energy_figure_has_its_kind_beside_it() -> None:
    gpu, cpu = FixedMeter("gpu0", "measured"), FixedMeter("cpu-model", "modelled")
    ledger = _ledger(gpu, cpu)
    gpu.energy_j, cpu.energy_j = 12.3, 1.7
    lines = rendered(ledger.summary(QUALITY)).splitlines()
    assert any("gpu0" in line and "12.3" in line and "measured" in line for line in lines)
    assert any("cpu-model" in line and "1.70" in line and "modelled" in line for line in lines)
    assert any("* modelled" in line for line in lines)


def test_the_tables_fit_eighty_columns_and_have_each_section() -> None:
    text = rendered(_ledger(FixedMeter("cpu-model", "modelled")).summary(QUALITY), width=80)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    for word in ("screened", "escalated", "degraded", "queue-full 2", "Service level", "missed", "features", "cascade"):
        assert word in text


def test_an_objective_has_its_value_its_limit_and_its_status() -> None:
    rows = [line.split() for line in rendered(_ledger().summary()).splitlines()]
    assert ["p99", "of", "screened", "3.00", "ms", "≤", "5", "ms", "met"] in rows
    assert ["degraded", "share", "0.500", "%", "≤", "0.1", "%", "missed"] in rows
    assert ["p99", "of", "screened", "–", "≤", "5", "ms", "no", "data"] in [
        line.split() for line in rendered(Ledger().summary()).splitlines()
    ]


def _samples(ledger: Ledger) -> dict[tuple[str, ...], float]:
    """The exported values, by name and by the values of the labels in the order of the labels' names."""
    text = generate_latest(ledger_registry(ledger)).decode()
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_exposition_parses_and_agrees_with_the_counters() -> None:
    samples = _samples(_ledger(FixedMeter("gpu0", "measured")))
    assert samples["cascade_decisions_total", "screened"] == 985
    assert samples["cascade_degraded_total", "queue-full"] == 2
    assert samples["cascade_dead_letters_total", "not-json"] == 4
    assert samples["cascade_labels_total",] == 7
    assert samples["cascade_late_answers_total",] == 2
    assert samples["cascade_deep_rows_total",] == 15
    assert samples["cascade_deep_call_duration_seconds_count",] == 1
    assert samples["cascade_stage_cpu_seconds_total", "features"] == pytest.approx(0.001)
    assert samples["cascade_stage_duration_seconds_count", "queue"] == 1_000
    assert samples["cascade_energy_joules_total", "measured", "gpu0"] == 0.0
    assert samples["cascade_objective_met", "p99 of screened"] == 1.0
    assert samples["cascade_objective_met", "degraded share"] == 0.0
    assert samples["cascade_objective_events_total", "degraded share"] == 1_000
    assert samples["cascade_objective_breaches_total", "degraded share"] == 5
    assert samples["cascade_objective_budget_ratio", "degraded share"] == 0.001
    assert samples["cascade_build_info", "b-1", "walk", cascade.__version__] == 1.0


def test_a_cold_state_and_a_lowered_budget_are_exported_and_printed() -> None:
    ledger = _ledger()
    assert ("cascade_state_covered_ratio",) not in _samples(ledger), "it is not known yet"
    assert _samples(ledger)["cascade_escalation_budget_factor",] == 1.0
    assert "cold state" not in rendered(ledger.summary())
    assert "overload" not in rendered(ledger.summary())
    for share, factor in ((0.02, 1.0), (0.02, 0.25), (0.95, 0.5)):
        ledger.set_state_covered(share)
        ledger.set_budget_factor(factor)
    assert _samples(ledger)["cascade_state_covered_ratio",] == 0.95
    assert _samples(ledger)["cascade_escalation_budget_factor",] == 0.5
    text = " ".join(rendered(ledger.summary(), width=200).split())
    assert "cold state: it covered as little as 2% of its longest window; 95% at the end" in text
    assert "overload lowered the escalation budget to as little as 25.0% of it" in text


def test_the_lowest_share_of_an_interval_is_at_most_that_of_its_ends() -> None:
    ledger = _ledger()
    ledger.set_state_covered(0.5)
    earlier = ledger.counters()
    ledger.set_state_covered(0.75)
    assert ledger.counters().since(earlier).state_covered_min == 0.5
    ledger.set_state_covered(0.25)
    ledger.set_state_covered(0.75)
    assert ledger.counters().since(earlier).state_covered_min == 0.25
    assert ledger.counters().since(earlier).state_covered == 0.75


def test_exported_histogram_is_cumulative_and_sums_up() -> None:
    samples = _samples(_ledger())
    name = "cascade_decision_latency_seconds"
    counts = [samples[f"{name}_bucket", le, "screened"] for le in [*map(str, BUCKETS_S), "+Inf"]]
    assert counts == sorted(counts)
    assert counts[BUCKETS_S.index(0.0025)] == 0
    assert counts[BUCKETS_S.index(0.005)] == 985
    assert samples[f"{name}_count", "screened"] == 985
    assert samples[f"{name}_sum", "screened"] == pytest.approx(985 * 0.003)
