"""The deep model in PyTorch: a recurrent network over each sequence of last transactions, and the current features.

Only training imports this module; the service runs the exported ONNX file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cascade.columns import Float32
from cascade.protocols import DeepInputs
from stages.settings import DeepSettings

# Avoids a division by zero for a column that never varies.
SCALE_MIN = 1e-3
# The longest vector that stands for a code.
EMBEDDING_MAX = 16
# The vector that stands for a number of a step.
PERIODIC_WIDTH = 6
# The name of the features in Codes; the sequences have their own.
FEATURES = "features"
# Columns that are codes, and how many codes there are: by input, by column.
Codes = Mapping[str, Mapping[int, int]]


def compress(values: Tensor) -> Tensor:
    """sign(x) · ln(1 + |x|): compresses amounts and ages, which span six decades, to a range of a few units."""
    return torch.sign(values) * torch.log1p(torch.abs(values))


class DeepModel(nn.Module):
    """A gated recurrent unit over each sequence, then a perceptron over their last states and the current features.

    The inputs are those of `cascade.protocols.DeepInputs`. The model itself compresses and standardises numbers, and
    embeds codes, so that every server of the ONNX file does the same.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014.
    """

    def __init__(self, example: DeepInputs, codes: Codes, settings: DeepSettings) -> None:
        """`example`: training rows, which determine the means and scales for the standardisation."""
        super().__init__()
        hidden = settings.hidden
        self.streams = nn.ModuleList(
            _Stream(sequence, codes.get(name, {}), settings) for name, sequence in example.sequences.items()
        )
        self.current = _Columns(torch.from_numpy(example.features), codes.get(FEATURES, {}))
        joined = hidden * len(self.streams) + self.current.width
        first = [nn.Linear(joined, hidden), nn.ReLU(), nn.Dropout(settings.dropout)]
        self.head = nn.Sequential(*first, nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Linear(hidden // 2, 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Log-odds float32 [rows, 1] of float32 inputs: the sequences in the order of the example's, then features."""
        *sequences, features = inputs
        states = [stream(sequence) for stream, sequence in zip(self.streams, sequences, strict=True)]
        logit: Tensor = self.head(torch.cat([*states, self.current(features)], dim=1))
        return logit


class _Columns(nn.Module):
    """Columns of a tensor [..., columns] as inputs of a network [..., width].

    Numbers are compressed and standardised; a code below `codes[column]` becomes a vector that is learned.
    """

    def __init__(self, rows: Tensor, codes: Mapping[int, int]) -> None:
        super().__init__()
        self.numbers = [column for column in range(rows.shape[1]) if column not in codes]
        self.coded = list(codes)
        numbers = compress(rows[:, self.numbers])
        mean, scale = numbers.mean(dim=0), numbers.std(dim=0).clamp_min(SCALE_MIN)
        self.mean, self.scale = (nn.Parameter(constant, requires_grad=False) for constant in (mean, scale))
        sizes = [min(EMBEDDING_MAX, math.ceil(math.sqrt(count)) + 1) for count in codes.values()]
        self.embeddings = nn.ModuleList(map(nn.Embedding, codes.values(), sizes))
        self.width = len(self.numbers) + sum(sizes)

    def forward(self, values: Tensor) -> Tensor:
        parts = [(compress(values[..., self.numbers]) - self.mean) / self.scale]
        for column, embedding in zip(self.coded, self.embeddings, strict=True):
            # bounded as an integer: what is no number becomes 0, so that no input can end the server
            parts.append(embedding(values[..., column].long().clamp(0, embedding.num_embeddings - 1)))
        return torch.cat(parts, dim=-1)


class _Periodic(nn.Module):
    """Numbers [..., numbers] as vectors [..., numbers · PERIODIC_WIDTH]: what a network can tell 10 % from 12 % by.

    Each number has sines and cosines at learned frequencies, a linear layer of its own, and a rectifier. Source:
    Gorishniy, Rubachev, Babenko, "On Embeddings for Numerical Features in Tabular Deep Learning", NeurIPS 2022 (arXiv
    2203.05556), there called PLR.
    """

    def __init__(self, numbers: int, frequencies: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(2.0 * math.pi * torch.randn(numbers, frequencies))
        waves = 2 * frequencies
        # one product for all numbers is quicker than one for each: the mask keeps them apart
        mask = torch.block_diag(*[torch.ones(waves, PERIODIC_WIDTH)] * numbers)
        self.mask = nn.Parameter(mask, requires_grad=False)
        self.weight = nn.Parameter(torch.randn(mask.shape) * mask / math.sqrt(frequencies))
        self.bias = nn.Parameter(torch.zeros(mask.shape[1]))

    def forward(self, values: Tensor) -> Tensor:
        turned = values.unsqueeze(-1) * self.frequencies
        waves = torch.cat([torch.sin(turned), torch.cos(turned)], dim=-1).flatten(-2)
        return torch.relu(waves @ (self.weight * self.mask) + self.bias)


class _Stream(nn.Module):
    """A gated recurrent unit over the last steps of one sequence; returns its last state [rows, hidden]."""

    def __init__(self, example: Float32, codes: Mapping[int, int], settings: DeepSettings) -> None:
        super().__init__()
        self.steps = settings.steps
        steps = with_gaps(torch.from_numpy(example)).reshape(-1, example.shape[2] + 1)
        self.columns = _Columns(steps[steps[:, 0] > 0], codes)
        self.numbers = len(self.columns.numbers)
        periodic = settings.frequencies
        self.periodic = _Periodic(2 * self.numbers, periodic) if periodic else None
        # a number's change, and the vectors of both
        width = self.columns.width + (self.numbers * (1 + 2 * PERIODIC_WIDTH) if periodic else 0)
        self.recurrent = nn.GRU(width, settings.hidden, batch_first=True)

    def forward(self, sequence: Tensor) -> Tensor:
        sequence = sequence[:, -self.steps :]
        present = sequence[:, :, :1]
        steps = self.columns(with_gaps(sequence)) * present
        if self.periodic is not None:
            numbers = steps[:, :, : self.numbers]
            changed = (numbers[:, 1:] - numbers[:, :-1]) * present[:, :-1]
            changes = torch.cat([torch.zeros_like(numbers[:, :1]), changed], dim=1)
            exact = torch.cat([numbers, changes], dim=2)
            steps = torch.cat([steps, changes, self.periodic(exact)], dim=2) * present
        states, _ = self.recurrent(steps)
        last: Tensor = states[:, -1]
        return last


def with_gaps(sequence: Tensor) -> Tensor:
    """Steps [rows, length, width + 1]: the last column is the time since the step before, in seconds; 0 for the first.

    A step itself has its age, from which a network cannot tell a gap of minutes that lies days back.
    """
    age = sequence[:, :, 1:2]
    present = sequence[:, :-1, :1] * sequence[:, 1:, :1]
    gap = torch.cat([torch.zeros_like(age[:, :1]), (age[:, :-1] - age[:, 1:]) * present], dim=1)
    return torch.cat([sequence, gap], dim=2)


def tensors(inputs: DeepInputs) -> list[Tensor]:
    """The inputs in the order of `DeepModel.forward`."""
    return [torch.from_numpy(array) for array in (*inputs.sequences.values(), inputs.features)]
