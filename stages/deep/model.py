"""The deep model in PyTorch: a recurrent network over the card's last transactions, and the current features.

Only training imports this module; the service runs the exported ONNX file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade.protocols import DeepInputs

# Avoids a division by zero for a column that never varies.
SCALE_MIN = 1e-3


def compress(values: Tensor) -> Tensor:
    """sign(x) · ln(1 + |x|): compresses amounts and ages, which span six decades, to a range of a few units."""
    return torch.sign(values) * torch.log1p(torch.abs(values))


class DeepModel(nn.Module):
    """A gated recurrent unit over the sequence, then a perceptron over its last state and the current features.

    The inputs are those of `cascade.protocols.DeepInputs`. The model itself compresses and standardises them, so that
    every server of the ONNX file does the same.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014.
    """

    def __init__(self, example: DeepInputs, hidden: int, dropout: float) -> None:
        """`example`: training rows, which determine the means and scales for the standardisation."""
        super().__init__()
        steps = compress(torch.from_numpy(example.sequence)).reshape(-1, example.sequence.shape[2])
        present = steps[steps[:, 0] > 0]
        current = compress(torch.from_numpy(example.features))
        self.step_mean, self.step_scale = _constants(present)
        self.feature_mean, self.feature_scale = _constants(current)
        self.recurrent = nn.GRU(steps.shape[1], hidden, batch_first=True)
        joined = hidden + current.shape[1]
        first = [nn.Linear(joined, hidden), nn.ReLU(), nn.Dropout(dropout)]
        self.head = nn.Sequential(*first, nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, 1))

    def forward(self, sequence: Tensor, features: Tensor) -> Tensor:
        """Log-odds float32 [rows, 1] of float32 inputs."""
        present = sequence[:, :, :1]
        steps = (compress(sequence) - self.step_mean) / self.step_scale * present
        states, _ = self.recurrent(steps)
        current = (compress(features) - self.feature_mean) / self.feature_scale
        logit: Tensor = self.head(torch.cat([states[:, -1], current], dim=1))
        return logit


def _constants(rows: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    mean, scale = rows.mean(dim=0), rows.std(dim=0).clamp_min(SCALE_MIN)
    return nn.Parameter(mean, requires_grad=False), nn.Parameter(scale, requires_grad=False)
