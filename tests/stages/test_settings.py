"""The training file: the example is complete, and a mistake is one line with file, key, value and remedy."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cascade.costs import Cell, Costs
from cascade.errors import SettingError
from cascade.features.spec import DAY_MS
from stages.settings import DataSettings, DeepSizes, EscalationSettings, LargeSettings, TrainingFile, load_training_file
from stages.split import VALIDATION_DAYS_MIN

EXAMPLE = Path(__file__).parents[2] / "docs" / "training.example.toml"


def load(tmp_path: Path, content: str | bytes) -> TrainingFile:
    file = tmp_path / "training.toml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_training_file(file)


def refusal(tmp_path: Path, content: str | bytes) -> str:
    with pytest.raises(SettingError) as caught:
        load(tmp_path, content)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(str(tmp_path / "training.toml"))
    assert caught.value.remedy
    return line.removeprefix(f"{tmp_path / 'training.toml'}: ")


def keys(section: object, within: str = "") -> set[str]:
    """The dotted keys of a section that have a default in a file: those of a cell are one key."""
    found = set()
    for name in section.__struct_fields__:  # type: ignore[attr-defined]
        value = getattr(section, name)
        nested = hasattr(value, "__struct_fields__") and not isinstance(value, Cell)
        found |= keys(value, f"{within}{name}.") if nested else {within + name}
    return found


def test_the_example_names_every_key_with_its_default() -> None:
    assert load_training_file(EXAMPLE) == TrainingFile()
    content = tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE))
    sizes = {f"deep.{size}": content["deep"].pop(size) for size in ("small", "large")}
    written = {f"{section}.{key}" for section, table in (content | sizes).items() for key in table}
    assert written == keys(TrainingFile())
    cells = [cell for cell in content["costs"].values() if isinstance(cell, dict)]
    assert len(cells) == 6
    assert all(set(cell) == {"fixed", "share"} for cell in cells)


def test_the_example_explains_the_bounds_of_auto() -> None:
    assert f"at least {VALIDATION_DAYS_MIN} days, at most a third" in EXAMPLE.read_text()


def test_an_empty_file_is_complete(tmp_path: Path) -> None:
    assert load(tmp_path, "") == TrainingFile()


def test_what_is_written_is_used(tmp_path: Path) -> None:
    file = load(
        tmp_path,
        """
        data = { warm_up = "36h", validation = "14d", validation_frauds_min = 50 }
        escalation.budget = 0.02
        deep = { sizes = ["large"], genuine_share = 1.0, large.hidden = 8 }
        [costs]
        review_fraud = { fixed = 4.0, share = 0.1 }
        reviews_per_day_max = 200
        [screener]
        leaves = [7]
        objectives = []
        monotone = { amount = "increasing", hour = "decreasing" }
        """,
    )
    assert file.data == DataSettings("36h", "14d", 50)
    assert (file.warm_up_ms, file.validation_ms) == (1.5 * DAY_MS, 14 * DAY_MS)
    assert file.escalation == EscalationSettings(0.02)
    assert file.costs == Costs(review_fraud=Cell(4.0, 0.1), reviews_per_day_max=200.0)
    assert file.deep == DeepSizes(("large",), 1.0, large=LargeSettings(hidden=8))
    assert (file.screener.leaves, file.screener.objectives) == ((7,), ())
    assert file.screener.monotone == {"amount": "increasing", "hour": "decreasing"}


def test_auto_has_no_length_before_the_frauds_are_known() -> None:
    assert TrainingFile().validation_ms is None


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[screner]\n", "screner: unknown key; did you mean screener? known: data, escalation, costs, screener, deep"),
        ("[data]\nwarmup = '1d'", "data.warmup: unknown key; did you mean warm_up?"),
        ("[costs]\nreview = 5.0", "costs.review: unknown key; did you mean review_"),
        ("[costs]\nreview_fraud = { part = 1.0 }", "costs.review_fraud.part: unknown key; known: fixed, share"),
        ("[costs]\nreview_fraud = 5.0", "costs.review_fraud = 5.0: "),
        ("[costs]\napprove_fraud.share = -1.0", "costs.approve_fraud.share = -1.0: "),
        ("[costs]\nreviews_per_day_max = -1", "costs.reviews_per_day_max = -1: "),
        ("[data]\nwarm_up = '5 days'", "data.warm_up = '5 days': not a duration"),
        ("[data]\nwarm_up = 'auto'", "data.warm_up = 'auto': not a duration"),
        ("[data]\nvalidation = 'a week'", "data.validation = 'a week': not a duration"),
        ("[data]\nvalidation = 7", "data.validation = 7: "),
        ("[data]\nvalidation_frauds_min = 19", "data.validation_frauds_min = 19: "),
        ("[escalation]\nbudget = 1.5", "escalation.budget = 1.5: expected `float` <= 1.0; use 0"),
        ("[escalation]\nbudget = nan", "escalation.budget = nan: "),
        ("[escalation]\nbudget = '1%'", "escalation.budget = '1%': "),
        ("[screener]\nus_per_row_max = 0", "screener.us_per_row_max = 0: "),
        ("[screener]\nleaves = []", "screener.leaves: "),
        ("[screener]\nleaves = [1]", "screener.leaves[0] = 1: "),
        ("[screener]\nleaves = [15, 256]", "screener.leaves[1] = 256: "),
        ("[screener]\nlearning_rates = [0.1, 0]", "screener.learning_rates[1] = 0: "),
        ("[screener]\nfraud_weights = [-3]", "screener.fraud_weights[0] = -3: "),
        ("[screener]\nobjectives = ['auc']", "screener.objectives[0] = 'auc': not one of the choices; "),
        ("[screener]\nmonotone.amount = 'up'", "screener.monotone.amount = 'up': not one of the choices; "),
        ("[screener]\nmonotone.amount = 1", "screener.monotone"),
        ("[screener]\ntuning_share = 0.9", "screener.tuning_share = 0.9: "),
        ("[screener]\ntrees_max = 0", "screener.trees_max = 0: "),
        ("[screener]\nworse_share_max = 1.0", "screener.worse_share_max = 1.0: "),
        ("[deep]\nhidden = 64", "deep.hidden: unknown key"),
        ("[deep]\nsizes = []", "deep.sizes = []: none, or one twice"),
        ("[deep]\nsizes = ['small', 'small']", "deep.sizes = ['small', 'small']: none, or one twice"),
        ("[deep]\nsizes = ['huge']", "deep.sizes[0] = 'huge': "),
        ("[deep.small]\nhidden = 0", "deep.small.hidden = 0: "),
        ("[deep.large]\nsteps = 0", "deep.large.steps = 0: "),
        ("[deep.large]\nfrequencies = -1", "deep.large.frequencies = -1: "),
        ("[deep.small]\ndropout = 1.0", "deep.small.dropout = 1.0: "),
        ("[deep]\ngenuine_share = 0", "deep.genuine_share = 0: "),
        ("[deep.small]\nepochs = 2.5", "deep.small.epochs = 2.5: "),
        ("deep = 5", "deep = 5: "),
        ("[data", "file: is not TOML"),
        (b"\xff", "file: is not UTF-8"),
    ],
)
def test_a_mistake_is_one_line_with_its_key_and_value(tmp_path: Path, content: str | bytes, line: str) -> None:
    found = refusal(tmp_path, content)
    assert line.replace("`", "") in found


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("[data]\nwarm_up = '5 days'", 'write "14d", "36h" or the like'),
        ("[screener]\nmonotone.amount = 'up'", 'use "increasing" or "decreasing"'),
        ("[screener]\nobjectives = ['auc']", '"lambdarank"'),
        ("[screener]\ntuning_share = 0.9", "use 0.05 to 0.5"),
        ("[screener]\nleaves = [1]", "use 2 to 255"),
        ("[screener]\nus_per_row_max = 0", "docs/training.example.toml"),
    ],
)
def test_the_remedy_names_what_can_be_written(tmp_path: Path, content: str, remedy: str) -> None:
    assert remedy in refusal(tmp_path, content)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nowhere\.toml: file: cannot be read \(No such file"):
        load_training_file(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("settings", [TrainingFile(), TrainingFile(data=DataSettings(validation="9d"))])
def test_durations_are_milliseconds(settings: TrainingFile) -> None:
    lengths: dict[str, Any] = {"auto": None, "9d": 9 * DAY_MS}
    assert (settings.warm_up_ms, settings.validation_ms) == (37 * DAY_MS, lengths[settings.data.validation])
