"""The contract of the deep model: names, types and shapes of its tensors, which the bundle records."""

from __future__ import annotations

import msgspec
import numpy as np

from cascade.columns import Float32
from cascade.protocols import DeepInputs

MODEL_NAME = "fraud_deep"
# Largest number of rows of a call: `max_batch_size` of the served model. It bounds the cost of a request.
BATCH_ROWS_MAX = 256
# Parameter of the served model's configuration: the SHA-256 of the bundle's ONNX file, in hexadecimal.
DIGEST_PARAMETER = "sha256"


class DeepSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names and shapes of the deep model's tensors, all float32, with the batch axis first.

    The inputs are the `sequences`, each [rows, length, width] with its length and width here, and `features_input`
    [rows, features]. The screener's score is the last of the features. The output is `output` [rows, 1], raw scores
    (log-odds). `opset` is the version of the ONNX operator set.

    >>> DeepSignature(sequences={"card_sequence": (10, 6)}, features=22).input_shapes
    {'card_sequence': (10, 6), 'features': (22,)}
    """

    sequences: dict[str, tuple[int, int]]
    features: int
    opset: int = 17
    features_input: str = "features"
    output: str = "logit"

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs by name, without the batch axis."""
        return {**self.sequences, self.features_input: (self.features,)}

    def tensors(self, inputs: DeepInputs) -> dict[str, Float32]:
        """The inputs by name, in the order of `input_shapes`: float32, and contiguous."""
        arrays = {name: inputs.sequences[name] for name in self.sequences} | {self.features_input: inputs.features}
        return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the output by name, without the batch axis."""
        return {self.output: (1,)}
