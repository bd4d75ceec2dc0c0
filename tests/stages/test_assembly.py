"""From a bundle to its models."""

from __future__ import annotations

from dataclasses import replace

import lightgbm
import msgspec
import numpy as np
import pytest

from cascade.bundle import Bundle
from cascade.errors import BundleError
from cascade.features import parse_spec
from stages.assembly import deep_signature, make_engine, make_forest, make_screener


def test_the_shipped_screener_is_compiled_and_scores_as_lightgbm_does(bundle: Bundle) -> None:
    width = make_engine(bundle).features.width
    screener = make_screener(bundle, width)
    assert screener.method == "quickscorer"
    rows = np.random.default_rng(1).lognormal(2, 2, (2_000, width)).astype(np.float32)
    wanted = lightgbm.Booster(model_str=bundle.content["screener.txt"].decode()).predict(rows, raw_score=True)
    assert np.abs(screener.score(rows) - wanted).max() < 1e-9


def test_a_model_that_cannot_be_compiled_is_scored_by_lightgbm(bundle: Bundle) -> None:
    chance = np.random.default_rng(2)
    rows = chance.normal(size=(500, 4))
    data = lightgbm.Dataset(rows, (rows[:, 0] > 0).astype(int), params={"linear_tree": True, "verbose": -1})
    booster = lightgbm.train({"objective": "binary", "linear_tree": True, "verbose": -1}, data, 3)
    linear = replace(bundle, content=dict(bundle.content) | {"screener.txt": booster.model_to_string().encode()})
    screener = make_screener(linear, 4)
    assert screener.method == "lightgbm"
    features = rows.astype(np.float32)
    assert np.array_equal(screener.score(features), booster.predict(features, raw_score=True))


@pytest.mark.parametrize("file", ["screener.txt", "escalation.txt"])
@pytest.mark.parametrize("width", [3, 300])
def test_rows_of_another_width_are_refused(bundle: Bundle, width: int, file: str) -> None:
    with pytest.raises(BundleError, match=rf"expects \d+ features, features.toml has {width}"):
        make_forest(bundle, file, width)


@pytest.mark.parametrize("rule", ["gain", "uncertainty"])
def test_only_the_rule_that_needs_the_gain_model_loads_it(bundle: Bundle, rule: str) -> None:
    escalation = msgspec.structs.replace(bundle.policy.escalation, rule=rule)
    broken = replace(
        bundle,
        content={**bundle.content, "escalation.txt": bundle.content["screener.txt"]},
        policy=msgspec.structs.replace(bundle.policy, escalation=escalation),
    )
    if rule == "uncertainty":
        make_engine(broken)
    else:
        with pytest.raises(BundleError, match=r"expects \d+ features"):
            make_engine(broken)


@pytest.mark.parametrize(("old", "new"), [
    ("length = 64", "length = 63"),
    ('"amount", "hour", ', '"amount", '),
    ('key = "card"\nlength', 'key = "device_id"\nlength'),
])  # fmt: skip
def test_a_deep_model_with_other_sequences_than_the_feature_file_is_refused(bundle: Bundle, old: str, new: str) -> None:
    assert deep_signature(bundle).sequences == make_engine(bundle).features.sequence_shapes
    text = bundle.content["features.toml"].decode()
    start = text.index("[[sequence]]")
    assert old in text[start:]
    spec = parse_spec((text[:start] + text[start:].replace(old, new)).encode(), "features.toml")
    with pytest.raises(BundleError, match=r"deep\.json: the model reads sequences .* train the bundle again"):
        deep_signature(replace(bundle, spec=spec))
