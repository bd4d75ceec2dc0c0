"""The deep model in FP16, for measurements; needs the extra `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

# These operators do nearly all of the arithmetic. Others see raw amounts and counts, which FP16 overflows or rounds.
_HALVED: Final = frozenset({"GRU", "Gemm", "Relu"})


def write_half(onnx_path: Path, out: Path) -> Path:
    """Writes the model to `out` with an FP16 network; inputs, normalization and outputs stay FP32. Returns `out`."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = OnnxModel(onnx.load(str(onnx_path)))
    full = {node.op_type for node in model.nodes()} - _HALVED
    model.convert_float_to_float16(use_symbolic_shape_infer=False, keep_io_types=True, op_block_list=sorted(full))
    model.topological_sort()
    onnx.checker.check_model(model.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model.model, str(out))
    return out
