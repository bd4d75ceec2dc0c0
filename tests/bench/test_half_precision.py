"""FP16: the network is rounded, raw amounts are not, and inputs and outputs stay the same."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx

from bench.half_precision import write_half
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Float64
from cascade.protocols import DeepInputs
from stages.assembly import deep_signature
from stages.deep.in_process import OnnxDeepStage


def test_the_network_is_fp16_and_scores_hardly_differ_even_for_amounts_beyond_its_range(tmp_path: Path) -> None:
    bundle = load_bundle(SHIPPED_BUNDLE)
    signature = deep_signature(bundle)
    half = write_half(SHIPPED_BUNDLE / "deep.onnx", tmp_path / "half.onnx")
    weights = {weight.data_type for weight in onnx.load(str(half)).graph.initializer if len(weight.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in weights
    chance = np.random.default_rng(1)
    sequences = {
        name: chance.normal(0, 1e5, (256, *shape)).astype(np.float32) for name, shape in signature.sequences.items()
    }
    for sequence in sequences.values():
        sequence[:, :, 0] = 1.0  # every step is there
    inputs = DeepInputs(sequences, chance.normal(0, 1e5, (256, signature.features)).astype(np.float32))

    def scores(path: Path) -> Float64:
        with closing(OnnxDeepStage(path, signature)) as stage:
            return stage.submit(inputs, 30).result()

    difference = np.abs(scores(half) - scores(SHIPPED_BUNDLE / "deep.onnx"))
    assert np.isfinite(difference).all()
    assert 0 < difference.max() < 0.1
