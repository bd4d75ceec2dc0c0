"""The deep model in FP16, for measurements; needs the extra `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

# Where the arithmetic is. What comes before sees raw amounts and counts, which FP16 would overflow or round.
_HALVED: Final = frozenset({"GRU", "Gemm", "Relu"})


def write_half(onnx_path: Path, out: Path) -> Path:
    """Write the model to `out` with the network in FP16, inputs, normalization and outputs in FP32; returns `out`."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = OnnxModel(onnx.load(str(onnx_path)))
    kept = {node.op_type for node in model.nodes()} - _HALVED
    model.convert_float_to_float16(use_symbolic_shape_infer=False, keep_io_types=True, op_block_list=sorted(kept))
    model.topological_sort()
    onnx.checker.check_model(model.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model.model, str(out))
    return out
