"""FP16: the network rounded, raw amounts not, and the same inputs and outputs."""

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
    weights = {one.data_type for one in onnx.load(str(half)).graph.initializer if len(one.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in weights
    chance = np.random.default_rng(1)
    inputs = DeepInputs(
        sequence=chance.normal(
            0, 1e5, (256, signature.sequence_length, signature.sequence_width)
        ).astype(np.float32),
        features=chance.normal(0, 1e5, (256, signature.features)).astype(np.float32),
    )  # fmt: skip

    def scores(path: Path) -> Float64:
        with closing(OnnxDeepStage(path, signature)) as stage:
            return stage.submit(inputs, 30).result()

    apart = np.abs(scores(half) - scores(SHIPPED_BUNDLE / "deep.onnx"))
    assert np.isfinite(apart).all()
    assert 0 < apart.max() < 0.1
