"""The deep model in PyTorch: a recurrent network over each sequence of last transactions, and the current features.

Only training imports this module; the service runs the exported ONNX file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade.columns import Float32
from cascade.protocols import DeepInputs

# Avoids a division by zero for a column that never varies.
SCALE_MIN = 1e-3


def compress(values: Tensor) -> Tensor:
    """sign(x) · ln(1 + |x|): compresses amounts and ages, which span six decades, to a range of a few units."""
    return torch.sign(values) * torch.log1p(torch.abs(values))


class DeepModel(nn.Module):
    """A gated recurrent unit over each sequence, then a perceptron over their last states and the current features.

    The inputs are those of `cascade.protocols.DeepInputs`. The model itself compresses and standardises them, so that
    every server of the ONNX file does the same.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014.
    """

    def __init__(self, example: DeepInputs, hidden: int, dropout: float) -> None:
        """`example`: training rows, which determine the means and scales for the standardisation."""
        super().__init__()
        current = compress(torch.from_numpy(example.features))
        self.streams = nn.ModuleList(_Stream(sequence, hidden) for sequence in example.sequences.values())
        self.feature_mean, self.feature_scale = _constants(current)
        joined = hidden * len(self.streams) + current.shape[1]
        first = [nn.Linear(joined, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*first, nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Log-odds float32 [rows, 1] of float32 inputs: the sequences in the order of the example's, then features."""
        *sequences, features = inputs
        states = [stream(sequence) for stream, sequence in zip(self.streams, sequences, strict=True)]
        current = (compress(features) - self.feature_mean) / self.feature_scale
        logit: Tensor = self.head(torch.cat([*states, current], dim=1))
        return logit


class _Stream(nn.Module):
    """A gated recurrent unit over one sequence; returns its last state [rows, hidden]."""

    def __init__(self, example: Float32, hidden: int) -> None:
        super().__init__()
        steps = compress(torch.from_numpy(example)).reshape(-1, example.shape[2])
        self.step_mean, self.step_scale = _constants(steps[steps[:, 0] > 0])
        self.recurrent = nn.GRU(steps.shape[1], hidden, batch_first=True)

    def forward(self, sequence: Tensor) -> Tensor:
        present = sequence[:, :, :1]
        steps = (compress(sequence) - self.step_mean) / self.step_scale * present
        states, _ = self.recurrent(steps)
        last: Tensor = states[:, -1]
        return last


def tensors(inputs: DeepInputs) -> list[Tensor]:
    """The inputs in the order of `DeepModel.forward`."""
    return [torch.from_numpy(array) for array in (*inputs.sequences.values(), inputs.features)]


def _constants(rows: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    mean, scale = rows.mean(dim=0), rows.std(dim=0).clamp_min(SCALE_MIN)
    return nn.Parameter(mean, requires_grad=False), nn.Parameter(scale, requires_grad=False)
