"""Trains the deep model and exports it to ONNX."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnxruntime
import torch
from torch import nn

from cascade.columns import Array, Float32, Float64, Int64
from cascade.features import FeatureEngine
from cascade.progress import Progress
from cascade.protocols import DeepInputs
from stages.deep.model import FEATURES, Codes, DeepModel, tensors
from stages.deep.signature import DeepSignature
from stages.settings import DeepSettings

# An ONNX operator set that every supported server reads (ONNX Runtime 1.14 and newer).
OPSET = 17
# Rows of a call outside training; bounds the memory of scoring a month of transactions.
SCORE_ROWS = 8_192


def train_deep(
    inputs: DeepInputs,
    fraud: Int64,
    weight: Float32,
    codes: Codes,
    settings: DeepSettings,
    seed: int,
    progress: Progress,
) -> DeepModel:
    """Fit a model to rows with fraud int64 [rows] and weight float32 [rows]. `codes`: see `code_columns`."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    model = DeepModel(inputs, codes, settings.hidden, settings.dropout)
    examples = tensors(inputs)
    target, weights = torch.from_numpy(fraud.astype(np.float32)), torch.from_numpy(weight)
    rows = len(target)
    batch_rows = min(settings.batch_rows, rows)
    steps = settings.epochs * (rows // batch_rows)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, total_steps=steps)
    loss_of = nn.BCEWithLogitsLoss(reduction="none")
    model.train()
    done = 0
    for _ in range(settings.epochs):
        order = torch.randperm(rows)
        for start in range(0, rows - batch_rows + 1, batch_rows):
            chosen = order[start : start + batch_rows]
            logit = model(*(example[chosen] for example in examples))[:, 0]
            loss = (loss_of(logit, target[chosen]) * weights[chosen]).mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            done += 1
        progress(done / steps)
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


def sample_genuine(fraud: Int64, share: float, seed: int) -> tuple[Array, Float32]:
    """Draw all frauds and a random share of the genuine rows: their positions in order, int64, and their weights."""
    drawn = np.random.default_rng(seed).random(len(fraud)) < share
    chosen = np.flatnonzero((fraud == 1) | drawn)
    return chosen, np.where(fraud[chosen] == 1, 1.0, 1.0 / share).astype(np.float32)


def score_torch(model: DeepModel, inputs: DeepInputs) -> Float64:
    """Log-odds float64 [rows], computed by PyTorch."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(inputs), SCORE_ROWS):
            logit = model(*tensors(inputs.take(slice(start, start + SCORE_ROWS))))
            parts.append(logit[:, 0].numpy().astype(np.float64))
    return np.concatenate(parts) if parts else np.zeros(0)


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
    """Largest absolute difference between the log-odds of PyTorch and of ONNX Runtime."""
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    signature = signature_of(inputs)
    difference = 0.0
    for start in range(0, len(inputs), SCORE_ROWS):
        part = inputs.take(slice(start, start + SCORE_ROWS))
        (logit,) = session.run([signature.output], signature.tensors(part))
        difference = max(difference, float(np.max(np.abs(logit[:, 0] - score_torch(model, part)))))
    return difference
