"""The deep model in PyTorch: a recurrent network over the card's last transactions, joined with the current features.

Only training imports this module; serving reads the exported ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cascade.protocols import DeepInputs

# Keeps a column that never varies from being divided by nothing.
SCALE_MIN = 1e-3


def compress(values: Tensor) -> Tensor:
    """sign(x) · ln(1 + |x|): amounts and ages span six decades, and a network wants a few units."""
    return torch.sign(values) * torch.log1p(torch.abs(values))


class DeepModel(nn.Module):
    """A gated recurrent unit over the steps, then a perceptron over its last state and the current features.

    Inputs as in `cascade.protocols.DeepInputs`, raw: compression and standardisation are part of the model, so that
    every server of the ONNX file does the same. Output: log-odds float32 [rows, 1].

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014.
    """

    def __init__(self, example: DeepInputs, hidden: int, dropout: float) -> None:
        """`example`: training rows from which the scales are taken."""
        super().__init__()
        steps = compress(torch.from_numpy(example.sequence)).reshape(-1, example.sequence.shape[2])
        present = steps[steps[:, 0] > 0]
        current = compress(torch.from_numpy(example.features))
        self.step_mean, self.step_scale = _constants(present)
        self.feature_mean, self.feature_scale = _constants(current)
        self.recurrent = nn.GRU(steps.shape[1], hidden, batch_first=True)
        self.head = nn.Sequential(
            nn.Linear(hidden + current.shape[1], hidden), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, 1),
        )  # fmt: skip

    def forward(self, sequence: Tensor, features: Tensor) -> Tensor:
        """Log-odds float32 [rows, 1]."""
        present = sequence[:, :, :1]
        steps = (compress(sequence) - self.step_mean) / self.step_scale * present
        states, _ = self.recurrent(steps)
        current = (compress(features) - self.feature_mean) / self.feature_scale
        logit: Tensor = self.head(torch.cat([states[:, -1], current], dim=1))
        return logit


def _constants(rows: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    mean, scale = rows.mean(dim=0), rows.std(dim=0).clamp_min(SCALE_MIN)
    return nn.Parameter(mean, requires_grad=False), nn.Parameter(scale, requires_grad=False)
