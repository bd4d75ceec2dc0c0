"""The compiled screener against LightGBM's own predict: equal for any model of plain trees and any row."""

from __future__ import annotations

from typing import Any

import lightgbm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.columns import Array, Float32
from stages.screener.compiled import LEAVES_MAX_MASKED, CompiledScreener
from stages.screener.forest import UnsupportedForestError, read_forest
from stages.screener.kernels import LANES

DIFFERENCE_MAX = 1e-9
WIDTH = 6
# Values at which comparisons are likely to go wrong: not a number, infinite, the smallest numbers, those that LightGBM
# treats as zero, and categories at and beyond the ends of their sets.
EDGES = np.fromstring(
    "nan inf -inf 0.0 -0.0 1e-45 -1e-45 1e-38 1e-35 -1e-35 1.1e-35 3.4e38 -3.4e38 -0.5 -1.0 "
    "0.5 1.0 31.0 32.0 63.9 64.0 2147483648.0 -2147483649.0 1e20",
    np.float32,
    sep=" ",
)


def lines(values: Any, form: str = "%.17g") -> str:
    return " ".join(form % value for value in values)


def random_tree(chance: np.random.Generator, leaves: int, thresholds: Array, skewed: bool) -> str:
    """The text of a tree grown by splitting random leaves; `skewed`: always the newest leaf."""
    splits = leaves - 1
    left, right = np.zeros(splits, int), np.zeros(splits, int)
    place: dict[int, tuple[Array, int]] = {}
    for split in range(splits):
        # LightGBM's numbers: the leaf that is split becomes the left leaf, the new leaf is the right one
        leaf = split if skewed else int(chance.integers(split + 1))
        if leaf in place:
            side, parent = place[leaf]
            side[parent] = split
        left[split], right[split] = ~leaf, ~(split + 1)
        place[leaf], place[split + 1] = (left, split), (right, split)
    categorical = chance.random(splits) < 0.2
    sets = [chance.integers(0, 2**32, chance.integers(1, 4), dtype=np.uint32) for _ in range(int(categorical.sum()))]
    threshold = chance.choice(thresholds, splits).astype(float)
    threshold[categorical] = np.arange(len(sets))
    missing = chance.integers(0, 3, splits) << 2 | chance.integers(0, 2, splits) << 1
    decision = np.where(categorical, 1, missing)
    fields = {
        "num_leaves": str(leaves),
        "num_cat": str(len(sets)),
        "split_feature": lines(chance.integers(0, WIDTH, splits), "%d"),
        "threshold": lines(threshold),
        "decision_type": lines(decision, "%d"),
        "left_child": lines(left, "%d"),
        "right_child": lines(right, "%d"),
        "leaf_value": lines(chance.normal(size=leaves)),
    }
    if sets:
        fields["cat_boundaries"] = lines(np.cumsum([0, *map(len, sets)]), "%d")
        fields["cat_threshold"] = lines(np.concatenate(sets), "%d")
    fields |= {"is_linear": "0", "shrinkage": "1"}
    return "\n".join(f"{name}={value}" for name, value in fields.items())


def model_text(trees: list[str], **header: str) -> str:
    names = " ".join(f"f{number}" for number in range(WIDTH))
    fields = {
        "version": "v4",
        "num_class": "1",
        "num_tree_per_iteration": "1",
        "label_index": "0",
        "max_feature_idx": str(WIDTH - 1),
        "objective": "binary sigmoid:1",
        "feature_names": names,
        "feature_infos": " ".join(["[-1:1]"] * WIDTH),
    }
    head = "\n".join(["tree", *(f"{name}={value}" for name, value in (fields | header).items())])
    bodies = [f"Tree={number}\n{tree}\n\n" for number, tree in enumerate(trees)]
    return f"{head}\n\n{''.join(bodies)}\nend of trees\n"


def check_equal(text: str, rows: Float32) -> CompiledScreener:
    screener = CompiledScreener(text.encode())
    wanted = lightgbm.Booster(model_str=text).predict(rows, raw_score=True, num_threads=1)
    for batch in (rows, np.asfortranarray(rows)):
        assert np.abs(screener.score(batch) - wanted).max(initial=0.0) <= DIFFERENCE_MAX
    for row in range(min(len(rows), 5)):
        assert abs(screener.score(rows[row : row + 1])[0] - wanted[row]) <= DIFFERENCE_MAX
    return screener


def rows_around(chance: np.random.Generator, thresholds: Array, count: int) -> Float32:
    """Rows of edges, of the thresholds themselves and of their neighbours."""
    exact = thresholds.astype(np.float32)
    values = np.concatenate([EDGES, exact, np.nextafter(exact, np.float32(9e9)), np.nextafter(exact, np.float32(-9e9))])
    return chance.choice(values, (count, WIDTH)).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6) | st.lists(st.integers(1, 90), min_size=1, max_size=6),
    skewed=st.booleans(),
    rows=st.integers(0, 3 * LANES),
)
def test_any_forest_and_any_row(seed: int, sizes: list[int], skewed: bool, rows: int) -> None:
    chance = np.random.default_rng(seed)
    thresholds = np.concatenate([chance.normal(size=8), [0.0, 1e-35, -1e-35, 1e-40, 1e300, -1e300, 0.1, np.inf]])
    trees = [
        "num_leaves=1\nnum_cat=0\nleaf_value=0.25" if leaves == 1 else random_tree(chance, leaves, thresholds, skewed)
        for leaves in sizes
    ]
    check_equal(model_text(trees), rows_around(chance, thresholds[np.abs(thresholds) < 1e38], rows))


TRAINED: dict[str, dict[str, Any]] = {
    "shipped size": {"num_leaves": 16, "max_depth": 5},
    "31 leaves": {"num_leaves": 31},
    "63 leaves": {"num_leaves": 63},
    "200 leaves": {"num_leaves": 200},
    "dart": {"num_leaves": 31, "boosting": "dart"},
    "random forest": {"num_leaves": 31, "boosting": "rf", "bagging_freq": 1, "bagging_fraction": 0.6},
    "zero is missing": {"num_leaves": 31, "zero_as_missing": True},
    "missing is not used": {"num_leaves": 31, "use_missing": False},
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_with_categories_and_missing_values(name: str) -> None:
    chance = np.random.default_rng(7)
    rows = chance.normal(size=(4_000, WIDTH)).astype(np.float32)
    rows[:, 1] = chance.integers(0, 70, len(rows))
    rows[chance.random(rows.shape) < 0.1] = np.nan
    rows[chance.random(rows.shape) < 0.1] = 0.0
    fraud = (np.nan_to_num(rows[:, 0]) + (rows[:, 1] % 3 == 0) + chance.normal(size=len(rows)) > 1.2).astype(int)
    parameters = {"objective": "binary", "verbose": -1, "min_data_in_leaf": 5, "num_threads": 1, **TRAINED[name]}
    data = lightgbm.Dataset(rows, fraud, categorical_feature=[1], params={"verbose": -1})
    booster = lightgbm.train(parameters, data, 20)
    fresh = np.concatenate([rows, rows_around(chance, np.linspace(-1, 1, 9), 500)])
    screener = check_equal(booster.model_to_string(), fresh)
    assert screener.method == ("walk" if TRAINED[name]["num_leaves"] > LEAVES_MAX_MASKED else "quickscorer")


@pytest.mark.parametrize(("bytes_max", "method"), [(3 * 32 * 4 * 20, "walk"), (4 * 32 * 4 * 20, "quickscorer")])
def test_a_model_with_too_many_masks_of_categories_is_walked(
    bytes_max: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.screener.compiled.CATEGORY_BYTES_MAX", bytes_max)
    chance = np.random.default_rng(7)
    rows = chance.normal(size=(4_000, WIDTH)).astype(np.float32)
    # three words of 32 categories, and a mask for any other value
    rows[:, 1] = chance.integers(0, 95, len(rows))
    fraud = ((rows[:, 1] % 3 == 0) & (chance.random(len(rows)) < 0.9)).astype(int)
    parameters = {"objective": "binary", "verbose": -1, "min_data_in_leaf": 5, "num_threads": 1, "num_leaves": 31}
    data = lightgbm.Dataset(rows, fraud, categorical_feature=[1], params={"verbose": -1})
    screener = check_equal(lightgbm.train(parameters, data, 20).model_to_string(), rows)
    assert screener.method == method


def test_blocks_of_trees_add_up() -> None:
    chance = np.random.default_rng(3)
    thresholds = chance.normal(size=20)
    trees = [random_tree(chance, 40, thresholds, False) for _ in range(200)]
    screener = check_equal(model_text(trees), rows_around(chance, thresholds, 200))
    assert screener.method == "quickscorer"


def test_a_model_without_trees_scores_nothing() -> None:
    assert CompiledScreener(model_text([]).encode()).score(np.ones((3, WIDTH), np.float32)).tolist() == [0.0] * 3


STUMP = model_text(
    [
        "num_leaves=2\nnum_cat=0\nsplit_feature=5\nthreshold=0.5\ndecision_type=2\nleft_child=-1\nright_child=-2\n"
        "leaf_value=1 2"
    ]
)


def test_a_stump_is_a_forest() -> None:
    scores = CompiledScreener(STUMP.encode()).score(np.array([[0] * 5 + [0.4], [0] * 5 + [0.6]], np.float32))
    assert scores.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (model_text(["num_leaves=1\nnum_cat=0\nleaf_value=1\nis_linear=1"]), "linear"),
        (model_text([], num_tree_per_iteration="3"), "more than one score"),
        (model_text([]).replace("end of trees", ""), "no end of trees"),
        (model_text(["num_leaves=2\nnum_cat=0"]), "leaf_value"),
        (
            model_text([random_tree(np.random.default_rng(1), 3, np.array([np.nan]), False)]),
            "not numbers",
        ),
        ("", "no end of trees"),
        (STUMP.replace("threshold=0.5", "threshold=0.5 1"), "different lengths"),
        (STUMP.replace("right_child=-2", "right_child=-1"), "all of its leaves and splits, each once"),
        (STUMP.replace("right_child=-2", "right_child=7"), "all of its leaves and splits, each once"),
        (STUMP.replace("split_feature=5", "split_feature=6"), "a feature that does not exist"),
        (STUMP.replace("split_feature=5", "split_feature=-1"), "a feature that does not exist"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(UnsupportedForestError, match=reason):
        read_forest(text.encode())


def test_a_vector_of_the_kernel_is_wide_enough_for_its_rows() -> None:
    # one row more than a vector, one less, and none
    chance = np.random.default_rng(5)
    thresholds = chance.normal(size=5)
    text = model_text([random_tree(chance, 12, thresholds, False) for _ in range(5)])
    for count in (0, 1, LANES - 1, LANES, LANES + 1):
        check_equal(text, rows_around(chance, thresholds, count))
