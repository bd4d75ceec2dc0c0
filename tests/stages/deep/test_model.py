"""The deep model reads each of its sequences, in the order and with the names of the feature file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cascade.errors import DataError
from cascade.protocols import DeepInputs
from stages.deep.cost import us_per_row
from stages.deep.model import FEATURES
from stages.deep.train import Examples, export_onnx, max_difference, score_onnx, score_torch, signature_of, train_deep
from stages.settings import DeepSettings, LargeSettings

pytestmark = pytest.mark.training
ROWS = 800
SMALL = DeepSettings(hidden=16, epochs=12, batch_rows=64)
SMALL_ONCE = DeepSettings(hidden=16, epochs=1, batch_rows=64)
LARGE = LargeSettings(hidden=16, frequencies=3, epochs=12, batch_rows=64, learning_rate=4e-3)


@pytest.fixture(scope="module")
def inputs() -> DeepInputs:
    """Two sequences; in the second a row's last step but one tells what its class is, nothing else does."""
    chance = np.random.default_rng(1)
    sequences = {
        "terminal_sequence": chance.normal(size=(ROWS, 6, 4)).astype(np.float32),
        "card_sequence": chance.normal(size=(ROWS, 3, 5)).astype(np.float32),
    }
    for sequence in sequences.values():
        sequence[:, :, 0] = 1.0
        sequence[: ROWS // 2, 0] = 0.0
    features = chance.normal(size=(ROWS, 3)).astype(np.float32)
    features[:, 2] = chance.integers(4, size=ROWS)
    return DeepInputs(sequences, features)


def examples_of(inputs: DeepInputs, fraud: np.ndarray | None = None) -> Examples:
    fraud = np.zeros(ROWS, np.int64) if fraud is None else fraud.astype(np.int64)
    return Examples(inputs, fraud, np.ones(ROWS, np.float32), {FEATURES: {2: 4}})


EVERYTHING = np.arange(ROWS)


def ignore(_: float) -> None:
    pass


@pytest.mark.parametrize("settings", [SMALL, LARGE], ids=["small", "large"])
def test_a_model_learns_from_its_second_sequence_and_its_onnx_file_gives_the_same_scores(
    inputs: DeepInputs, settings: DeepSettings
) -> None:
    import onnxruntime

    fraud = inputs.sequences["card_sequence"][:, 1, 3] > 0
    model = train_deep(examples_of(inputs, fraud), EVERYTHING, settings, 1, ignore)
    scores = score_torch(model, inputs)
    assert ((scores > 0) == fraud).mean() > 0.9
    onnx = export_onnx(model, inputs)
    assert max_difference(model, onnx, inputs) < 1e-4
    np.testing.assert_allclose(score_onnx(onnx, inputs), scores, atol=1e-4)
    signature = signature_of(inputs)
    assert signature.sequences == {"terminal_sequence": (6, 4), "card_sequence": (3, 5)}
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    assert [tensor.name for tensor in session.get_inputs()] == ["terminal_sequence", "card_sequence", "features"]
    assert {name: tuple(shape) for name, shape in signature.input_shapes.items()} == {
        tensor.name: tuple(tensor.shape[1:]) for tensor in session.get_inputs()
    }
    costs = us_per_row(onnx, signature, inputs)
    assert list(costs) == [1, 16, 256]
    assert costs[256] < costs[1]


def test_a_training_that_diverges_ends_with_a_line_that_says_what_to_lower(inputs: DeepInputs, tmp_path: Path) -> None:
    settings = DeepSettings(hidden=16, epochs=3, batch_rows=64, learning_rate=1e30)
    with pytest.raises(DataError, match=r"diverged in epoch \d: lower deep.small.learning_rate"):
        train_deep(examples_of(inputs), EVERYTHING, settings, 1, ignore, tmp_path)


@pytest.mark.parametrize("settings", [SMALL, LARGE], ids=["small", "large"])
def test_steps_that_are_absent_or_too_old_change_nothing(inputs: DeepInputs, settings: DeepSettings) -> None:
    import msgspec

    settings = msgspec.structs.replace(settings, epochs=1, steps=5)
    model = train_deep(examples_of(inputs), EVERYTHING, settings, 1, ignore)
    other = {name: sequence.copy() for name, sequence in inputs.sequences.items()}
    # the terminal's first step is the sixth last one
    other["terminal_sequence"][:, 0, 1:] = 9.0
    other["card_sequence"][: ROWS // 2, 0, 1:] = 9.0
    np.testing.assert_array_equal(score_torch(model, inputs), score_torch(model, DeepInputs(other, inputs.features)))
    other["card_sequence"][ROWS // 2 :, 0, 1:] = 9.0
    changed = score_torch(model, inputs) != score_torch(model, DeepInputs(other, inputs.features))
    assert changed[ROWS // 2 :].all()


def test_an_input_that_is_no_number_ends_no_call(inputs: DeepInputs) -> None:
    import onnxruntime

    # Triton warms a model up with random bits
    onnx = export_onnx(train_deep(examples_of(inputs), EVERYTHING, SMALL_ONCE, 1, ignore), inputs)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    odd = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, -1.0, 4.0, 1e9], np.float32)
    features = inputs.features[:8].copy()
    features[:, 2] = odd
    (logit,) = session.run(None, signature_of(inputs).tensors(DeepInputs(inputs.take(slice(8)).sequences, features)))
    assert np.isfinite(logit[5:]).all()


class Stop(Exception):
    pass


def test_a_training_that_was_interrupted_goes_on_and_ends_the_same(inputs: DeepInputs, tmp_path: Path) -> None:
    examples = examples_of(inputs, inputs.sequences["card_sequence"][:, 1, 3] > 0)
    whole = score_torch(train_deep(examples, EVERYTHING, LARGE, 1, ignore), inputs)

    def stop_in_the_middle(share: float) -> None:
        if share > 0.6:
            raise Stop

    with pytest.raises(Stop):
        train_deep(examples, EVERYTHING, LARGE, 1, stop_in_the_middle, tmp_path)
    shares: list[float] = []
    resumed = train_deep(examples, EVERYTHING, LARGE, 1, shares.append, tmp_path)
    assert shares[0] > 0.5, "it began anew"
    np.testing.assert_array_equal(score_torch(resumed, inputs), whole)
    again: list[float] = []
    np.testing.assert_array_equal(
        score_torch(train_deep(examples, EVERYTHING, LARGE, 1, again.append, tmp_path), inputs), whole
    )
    assert again == [1.0], "it was complete"
    assert len(list(tmp_path.iterdir())) == 1
    others = [
        train_deep(examples, EVERYTHING, LARGE, 2, ignore, tmp_path),
        train_deep(examples, EVERYTHING[1:], LARGE, 1, ignore, tmp_path),
    ]
    assert len(list(tmp_path.iterdir())) == 3
    assert not any(np.array_equal(score_torch(other, inputs), whole) for other in others)


def test_sequences_in_files_give_the_same_model(inputs: DeepInputs, tmp_path: Path) -> None:
    mapped = {}
    for name, sequence in inputs.sequences.items():
        np.save(tmp_path / f"{name}.npy", sequence)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r+")
    of_files = DeepInputs(mapped, inputs.features)
    scores = [
        score_torch(train_deep(examples_of(one), EVERYTHING, SMALL, 1, ignore), one) for one in (inputs, of_files)
    ]
    np.testing.assert_array_equal(*scores)
