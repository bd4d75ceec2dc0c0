"""The deep model reads each of its sequences, in the order and with the names of the feature file."""

from __future__ import annotations

import numpy as np
import pytest

from cascade.protocols import DeepInputs
from stages.deep.train import export_onnx, max_difference, score_torch, signature_of, train_deep
from stages.settings import DeepSettings

pytestmark = pytest.mark.training
ROWS = 800


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
    return DeepInputs(sequences, chance.normal(size=(ROWS, 3)).astype(np.float32))


def test_a_model_learns_from_its_second_sequence_and_its_onnx_file_gives_the_same_scores(inputs: DeepInputs) -> None:
    import onnxruntime

    fraud = (inputs.sequences["card_sequence"][:, 1, 3] > 0).astype(np.int64)
    settings = DeepSettings(hidden=16, epochs=12, batch_rows=64)
    model = train_deep(inputs, fraud, np.ones(ROWS, np.float32), {}, settings, 1, lambda _: None)
    scores = score_torch(model, inputs)
    assert ((scores > 0) == fraud).mean() > 0.9
    onnx = export_onnx(model, inputs)
    assert max_difference(model, onnx, inputs) < 1e-4
    signature = signature_of(inputs)
    assert signature.sequences == {"terminal_sequence": (6, 4), "card_sequence": (3, 5)}
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    assert [tensor.name for tensor in session.get_inputs()] == ["terminal_sequence", "card_sequence", "features"]
    assert {name: tuple(shape) for name, shape in signature.input_shapes.items()} == {
        tensor.name: tuple(tensor.shape[1:]) for tensor in session.get_inputs()
    }


def test_steps_that_are_absent_change_nothing(inputs: DeepInputs) -> None:
    model = train_deep(
        inputs, np.zeros(ROWS, np.int64), np.ones(ROWS, np.float32), {}, DeepSettings(epochs=1), 1, lambda _: None
    )
    other = {name: sequence.copy() for name, sequence in inputs.sequences.items()}
    for sequence in other.values():
        sequence[: ROWS // 2, 0, 1:] = 9.0
    np.testing.assert_array_equal(score_torch(model, inputs), score_torch(model, DeepInputs(other, inputs.features)))
