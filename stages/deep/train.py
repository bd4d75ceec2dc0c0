"""Trains the deep model and exports it to ONNX."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from cascade.columns import Array, Float32, Float64, Int64
from cascade.errors import DataError
from cascade.features import FeatureEngine
from cascade.progress import Progress
from cascade.protocols import DeepInputs
from stages.deep.checkpoint import Checkpoint
from stages.deep.model import FEATURES, Codes, DeepModel, tensors
from stages.deep.signature import BATCH_ROWS_MAX, DeepSignature
from stages.settings import DeepSettings

# An ONNX operator set that every supported server reads (ONNX Runtime 1.14 and newer).
OPSET = 17
# Rows from which the means and scales of the inputs come.
SCALE_ROWS = 8_192
# Rows on which PyTorch and ONNX Runtime are compared.
PARITY_ROWS = 4_096


@dataclass(frozen=True, slots=True)
class Examples:
    """What a deep model learns from, rows in order of time.

    - `inputs`: its sequences may be memory-mapped files, of which a batch reads its rows.
    - `fraud` int64 [rows], `weight` float32 [rows]; `codes`: see `code_columns`.
    """

    inputs: DeepInputs
    fraud: Int64
    weight: Float32
    codes: Codes

    def __len__(self) -> int:
        return len(self.fraud)


def train_deep(
    examples: Examples,
    rows: Int64,
    settings: DeepSettings,
    seed: int,
    progress: Progress,
    checkpoints: Path | None = None,
) -> DeepModel:
    """Fit a model to the examples at the positions `rows` int64 [rows].

    `checkpoints`: a directory. There each epoch leaves a file, with which a training of the same examples and settings
    goes on; the result is the same as without an interruption. Raises DataError if the training diverges.
    """
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    model = DeepModel(examples.inputs.take(spread(rows, SCALE_ROWS)), examples.codes, settings)
    target, weights = torch.from_numpy(examples.fraud.astype(np.float32)), torch.from_numpy(examples.weight)
    batch_rows = min(settings.batch_rows, len(rows))
    batches = len(rows) // batch_rows
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.epochs * batches
    )
    inputs = examples.inputs
    learned: list[Array] = [*inputs.sequences.values(), inputs.features, examples.fraud, examples.weight, rows]
    checkpoint = Checkpoint.of(checkpoints, learned, (settings, seed))
    done = checkpoint.restore(model, optimiser, schedule, batches)
    loss_of = nn.BCEWithLogitsLoss(reduction="none")
    model.train()
    for epoch in range(done, settings.epochs):
        # an epoch depends on its number alone, so that it can be the first after an interruption
        torch.manual_seed(seed * 10_007 + epoch)
        order = rows[torch.randperm(len(rows)).numpy()]
        for batch in range(batches):
            chosen = order[batch * batch_rows : (batch + 1) * batch_rows]
            logit = model(*tensors(examples.inputs.take(chosen)))[:, 0]
            loss = (loss_of(logit, target[chosen]) * weights[chosen]).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            progress((epoch + (batch + 1) / batches) / settings.epochs)
        if not torch.isfinite(loss):
            remedy = "lower deep.small.learning_rate or deep.large.learning_rate of the training file"
            raise DataError(f"the training of the deep model diverged in epoch {epoch + 1}: {remedy}")
        checkpoint.save(model, optimiser, epoch + 1)
    progress(1.0)
    model.eval()
    return model


def code_columns(engine: FeatureEngine) -> Codes:
    """The columns of the deep model's inputs that are codes of a category or of a bucket, and their numbers."""
    codes = engine.codes
    found = {FEATURES: {column: codes[name] for column, name in enumerate(engine.names) if name in codes}}
    for sequence in engine.plan.sequences:
        # a step begins with two columns of its own: present, and age
        fields = enumerate((engine.names[column] for column in sequence.columns), 2)
        found[sequence.name] = {column: codes[name] for column, name in fields if name in codes}
    return found


def spread(rows: Int64, count: int) -> Int64:
    """About `count` of the positions `rows` int64 [rows], at equal distances."""
    return rows[:: max(1, len(rows) // count)]


def score_torch(model: DeepModel, inputs: DeepInputs, rows: Int64 | None = None) -> Float64:
    """Log-odds float64 [rows], computed by PyTorch, of the rows at these positions int64 [rows]; None: of all."""
    parts = [np.zeros(0)]
    with torch.inference_mode():
        for part in _parts(inputs, rows):
            parts.append(model(*tensors(part))[:, 0].numpy().astype(np.float64))
    return np.concatenate(parts)


def score_onnx(onnx: bytes, inputs: DeepInputs) -> Float64:
    """Log-odds float64 [rows], computed by ONNX Runtime from an exported model."""
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    signature = signature_of(inputs)
    parts = [np.zeros(0)]
    for part in _parts(inputs):
        (logit,) = session.run([signature.output], signature.tensors(part))
        parts.append(logit[:, 0].astype(np.float64))
    return np.concatenate(parts)


def _parts(inputs: DeepInputs, rows: Int64 | None = None) -> Iterator[DeepInputs]:
    """The inputs in calls of the size that a server takes at most: this bounds the memory."""
    for start in range(0, len(inputs) if rows is None else len(rows), BATCH_ROWS_MAX):
        part = slice(start, start + BATCH_ROWS_MAX)
        yield inputs.take(part if rows is None else rows[part])


def signature_of(inputs: DeepInputs) -> DeepSignature:
    """The signature of a model that is trained on these inputs."""
    shapes = {name: (sequence.shape[1], sequence.shape[2]) for name, sequence in inputs.sequences.items()}
    return DeepSignature(sequences=shapes, features=inputs.features.shape[1], opset=OPSET)


def export_onnx(model: DeepModel, example: DeepInputs) -> bytes:
    """The model as ONNX, with the tensors of `signature_of` and a dynamic number of rows."""
    target, signature = io.BytesIO(), signature_of(example)
    arguments = tuple(tensors(example.take(slice(1))))
    inputs, outputs = list(signature.input_shapes), list(signature.output_shapes)
    names = {"input_names": inputs, "output_names": outputs}
    axes = {name: {0: "rows"} for name in (*inputs, *outputs)}
    with warnings.catch_warnings():
        # this exporter writes the recurrent unit as one fused operator; its successor unrolls it into sixteen steps
        warnings.simplefilter("ignore")
        torch.onnx.export(model, arguments, target, dynamo=False, opset_version=OPSET, dynamic_axes=axes, **names)
    return target.getvalue()


def max_difference(model: DeepModel, onnx: bytes, inputs: DeepInputs) -> float:
    """Largest absolute difference between the log-odds of PyTorch and of ONNX Runtime, on about PARITY_ROWS rows."""
    part = inputs.take(spread(np.arange(len(inputs)), PARITY_ROWS))
    return float(np.max(np.abs(score_onnx(onnx, part) - score_torch(model, part)), initial=0.0))
