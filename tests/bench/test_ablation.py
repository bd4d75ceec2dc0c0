"""`cascade bench ablation`: what a part of the inputs is, and a run on data in which one part decides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from bench.ablation import PARTS, run_ablation, show_ablation
from cascade.protocols import DeepInputs
from cascade.simulator import SimulatorSettings, simulate
from stages.screener.search import SearchSettings
from stages.settings import DataSettings, DeepSettings, DeepSizes, TrainingFile
from stages.training import TrainingSettings
from tests.stages.test_training import FEATURES, SCHEMA


def inputs() -> DeepInputs:
    sequences = {name: np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3) for name in ("card_s", "terminal_s")}
    for sequence in sequences.values():
        sequence[:, :, 0] = 1.0
        sequence[0, :2] = 0.0
    return DeepInputs(sequences, np.ones((2, 4), np.float32))


def test_each_part_takes_away_what_it_names_and_nothing_else() -> None:
    whole = inputs()
    found = {part: change(inputs()) for part, change in PARTS.items()}
    for name in whole.sequences:
        np.testing.assert_array_equal(found["nothing"].sequences[name], whole.sequences[name])
        shuffled = found["order"].sequences[name]
        np.testing.assert_array_equal(shuffled[:, -1], whole.sequences[name][:, -1])
        np.testing.assert_array_equal(shuffled[0, :2], 0.0)
        np.testing.assert_array_equal(np.sort(shuffled, axis=1), np.sort(whole.sequences[name], axis=1))
        timeless = found["time"].sequences[name]
        assert (timeless[:, :, 1] == 0.0).all()
        np.testing.assert_array_equal(timeless[:, :, [0, 2]], whole.sequences[name][:, :, [0, 2]])
    assert any((found["order"].sequences[name] != whole.sequences[name]).any() for name in whole.sequences)
    for part, name, other in (("card", "card_s", "terminal_s"), ("terminal", "terminal_s", "card_s")):
        emptied = found[part].sequences[name]
        assert (emptied[:, -1, 0] == 1.0).all(), "a network learns from the steps that are there"
        assert emptied.sum() == len(emptied)
        np.testing.assert_array_equal(found[part].sequences[other], whole.sequences[other])
    assert not found["features"].features.any()
    np.testing.assert_array_equal(found["card"].features, whole.features)


@pytest.mark.training
def test_a_run_finds_the_part_that_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for seed in (5, 6):
        simulated = simulate(SimulatorSettings(cards=150, terminals=120, days=34, seed=seed, fraud_share=0.04))
        small = pl.col("amount") < pl.col("amount").quantile(0.06)
        after_a_small_one = small.shift(1).over("card_id").fill_null(value=False)
        files.append(tmp_path / f"seed-{seed}.parquet")
        kind = simulated["fraud"].dtype
        simulated.with_columns(fraud=after_a_small_one.cast(kind)).write_parquet(files[-1])
    settings = TrainingSettings(
        seed=3,
        file=TrainingFile(
            data=DataSettings(warm_up="10d", validation="8d"),
            screener=SearchSettings(us_per_row_max=1e6, trees_max=20, leaves=(7,), learning_rates=(0.1,)),
            deep=DeepSizes(("small",), 0.5, DeepSettings(hidden=24, epochs=10, batch_rows=32)),
        ),
    )
    arguments = (SCHEMA, FEATURES, settings, "small", ["nothing", "card"], tmp_path / "out", lambda *_: None)
    report = run_ablation(files, *arguments)
    assert report.beyond_screener is not None
    for result in report.files:
        whole, without = result.parts
        assert whole.lost is None
        assert without.lost is not None
        assert whole.average_precision.value - without.average_precision.value == pytest.approx(without.lost.value)
        assert without.lost.value > 0.1
        assert without.average_precision.value > 0.02, "no scores would be worse than chance"
        assert whole.beyond_screener.value > 0.1
    mean = np.mean([result.parts[0].beyond_screener.value for result in report.files])
    assert report.beyond_screener.value == pytest.approx(mean)
    assert report.beyond_screener.low < mean < report.beyond_screener.high
    with monkeypatch.context() as patch:
        patch.setattr("bench.ablation.prepare", lambda *_: pytest.fail("a file was used again"))
        assert run_ablation(files[:1], *arguments).files[0] == report.files[0], "from its results"
    (kept,) = (tmp_path / "out").glob("seed-5-*.json")
    kept.unlink()
    assert run_ablation(files[:1], *arguments).files[0] == report.files[0], "from its checkpoints"
    console = Console(width=80, record=True)
    show_ablation(report, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("mean of 2 files" in line for line in lines)
