"""The contract of the deep model: names, types and shapes of its tensors, which the bundle records."""

from __future__ import annotations

import msgspec

MODEL_NAME = "fraud_deep"
# Largest number of rows of a call: `max_batch_size` of the served model. It bounds the cost of a request.
BATCH_ROWS_MAX = 256
# Parameter of the served model's configuration: the SHA-256 of the bundle's ONNX file, in hexadecimal.
DIGEST_PARAMETER = "sha256"


class DeepSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names and shapes of the deep model's tensors, all float32, with the batch axis first.

    The inputs are `sequence_input` [rows, sequence_length, sequence_width] and `features_input` [rows, features]. The
    screener's score is the last of the features. The output is `output` [rows, 1], raw scores (log-odds). `opset` is
    the version of the ONNX operator set.

    >>> DeepSignature(sequence_length=10, sequence_width=6, features=22).input_shapes
    {'sequence': (10, 6), 'features': (22,)}
    """

    sequence_length: int
    sequence_width: int
    features: int
    opset: int = 17
    sequence_input: str = "sequence"
    features_input: str = "features"
    output: str = "logit"

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs by name, without the batch axis."""
        return {
            self.sequence_input: (self.sequence_length, self.sequence_width),
            self.features_input: (self.features,),
        }

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the output by name, without the batch axis."""
        return {self.output: (1,)}
