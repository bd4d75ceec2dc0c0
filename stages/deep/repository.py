"""Writes the Triton model repository of a deep model, from the templates in `triton_models`."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from cascade.local_parts import staged_directory
from stages.deep.signature import BATCH_ROWS_MAX, DIGEST_PARAMETER, MODEL_NAME, DeepSignature

Target = Literal["cpu", "gpu"]
# `triton_models` is beside `stages` both in a checkout and in an installed wheel.
_TEMPLATES = Path(__file__).resolve().parents[2] / "triton_models"


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """How Triton runs the model, and which requests it refuses.

    - `instances`: copies of the model.
    - `threads`: CPU threads of ONNX Runtime in each copy.

    The other three configure Triton's queue; 0 omits a setting (see docs/decisions/0003-triton-queue.md).

    - `batch_delay_us`: time that a batch waits for more requests.
    - `queue_requests_max`: requests that may wait; Triton refuses further ones.
    - `queue_timeout_us`: time after which Triton refuses a waiting request; a request may set less.
    """

    instances: int = 1
    threads: int = 1
    batch_delay_us: int = 0
    queue_requests_max: int = 0
    queue_timeout_us: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            lowest = 1 if name in ("instances", "threads") else 0
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} = {getattr(self, name)}: use {lowest} or more")

    def batching(self) -> str:
        """The lines of `dynamic_batching`."""
        lines = [f"  max_queue_delay_microseconds: {self.batch_delay_us}"] if self.batch_delay_us else []
        policy = []
        if self.queue_requests_max:
            policy.append(f"    max_queue_size: {self.queue_requests_max}")
        if self.queue_timeout_us:
            policy.append("    timeout_action: REJECT")
            policy.append(f"    default_timeout_microseconds: {self.queue_timeout_us}")
            policy.append("    allow_timeout_override: true")
        if policy:
            lines += ["  default_queue_policy {", *policy, "  }"]
        return "".join(line + "\n" for line in lines)


# On a GPU, Triton bounds its queue too. The local CPU server must not: its batcher stalls with any queue policy.
DEFAULT_LIMITS: dict[Target, ServingLimits] = {
    "cpu": ServingLimits(),
    "gpu": ServingLimits(batch_delay_us=200, queue_requests_max=256, queue_timeout_us=20_000),
}


def write_repository(
    onnx: Path, signature: DeepSignature, out: Path, target: Target, limits: ServingLimits | None = None
) -> Path:
    """Write a repository with the model `fraud_deep` to `out`, and return `out`; an existing directory is replaced.

    - `onnx`: file of the model.
    - `target`: `gpu` for Triton's ONNX Runtime backend on a GPU, `cpu` for the Python backend with ONNX Runtime.
    - `limits`: by default DEFAULT_LIMITS of the target.

    The configuration states the SHA-256 of `onnx`, so that a worker calls only the model of its own bundle. Raises
    OSError if a file cannot be read or written; `out` is then unchanged.
    """
    template = _TEMPLATES / target / MODEL_NAME
    with staged_directory(Path(out)) as staged:
        version = staged / MODEL_NAME / "1"
        version.mkdir(parents=True)
        (staged / MODEL_NAME / "config.pbtxt").write_text(
            Template((template / "config.pbtxt.template").read_text()).substitute(
                _values(signature, hashlib.sha256(onnx.read_bytes()).hexdigest(), limits or DEFAULT_LIMITS[target])
            )
        )
        shutil.copyfile(onnx, version / "model.onnx")
        if target == "cpu":
            shutil.copyfile(template / "1" / "model.py", version / "model.py")
    return Path(out)


def _values(signature: DeepSignature, digest: str, limits: ServingLimits) -> dict[str, object]:
    shapes = signature.input_shapes
    return {
        "digest_parameter": DIGEST_PARAMETER,
        "digest": digest,
        "model_name": MODEL_NAME,
        "batch_rows_max": BATCH_ROWS_MAX,
        "inputs": ",\n".join(
            f'  {{ name: "{name}" data_type: TYPE_FP32 dims: [ {_dims(shape)} ] }}' for name, shape in shapes.items()
        ),
        "warm_up_inputs": ",\n".join(_warm_up_input(name, shape) for name, shape in shapes.items()),
        "output": signature.output,
        "batching": limits.batching(),
        "instances": limits.instances,
        "threads": limits.threads,
    }


def _dims(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))


def _warm_up_input(name: str, shape: tuple[int, ...]) -> str:
    value = f"{{ data_type: TYPE_FP32 dims: [ {_dims(shape)} ] random_data: true }}"
    return f'      {{\n        key: "{name}"\n        value: {value}\n      }}'
