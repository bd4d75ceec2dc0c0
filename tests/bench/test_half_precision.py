"""FP16: the network is rounded, raw amounts are not, and inputs and outputs stay the same."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx

from bench.cluster import simulated
from bench.half_precision import write_half
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.columns import Float64
from stages.assembly import deep_signature, make_engine
from stages.deep.in_process import OnnxDeepStage


def test_the_network_is_fp16_and_scores_hardly_differ_even_for_amounts_beyond_its_range(tmp_path: Path) -> None:
    bundle = load_bundle(SHIPPED_BUNDLE)
    signature = deep_signature(bundle)
    half = write_half(SHIPPED_BUNDLE / "deep.onnx", tmp_path / "half.onnx")
    weights = {weight.data_type for weight in onnx.load(str(half)).graph.initializer if len(weight.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in weights
    data = simulated(bundle.schema, cards=300, terminals=300, days=45, seed=3)
    engine = make_engine(bundle)
    inputs = engine.screen(data.batch).deep_inputs(np.arange(data.batch.rows - 256, data.batch.rows))
    # every other row in a currency of large numbers
    inputs.features[::2, engine.features.names.index("amount")] *= 1e5
    for sequence in inputs.sequences.values():
        # after presence and age, the first field of a step is the amount
        sequence[::2, :, 2] *= 1e5
        assert sequence[::2, :, 2].max() > np.finfo(np.float16).max

    def scores(path: Path) -> Float64:
        with closing(OnnxDeepStage(path, signature)) as stage:
            return stage.submit(inputs, 30).result()

    difference = np.abs(scores(half) - scores(SHIPPED_BUNDLE / "deep.onnx"))
    assert np.isfinite(difference).all()
    assert 0 < difference.max() < 0.01
