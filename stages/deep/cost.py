"""What a row costs in the deep model: CPU time in ONNX Runtime, on this machine, without the call over the network."""

from __future__ import annotations

import time

import onnxruntime

from cascade.protocols import DeepInputs
from stages.deep.signature import DeepSignature

# Calls of one row, of a few, and of as many as a server takes at once.
ROWS = (1, 16, 256)
SECONDS = 0.5


def us_per_row(onnx: bytes, signature: DeepSignature, inputs: DeepInputs) -> dict[int, float]:
    """Microseconds of one thread's CPU time for a row, in calls of each number of ROWS; the mean of half a second.

    `inputs`: rows of real data, at least one; sizes beyond their number are left out.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    found = {}
    for rows in ROWS:
        if rows > len(inputs):
            continue
        tensors = signature.tensors(inputs.take(slice(rows)))
        session.run([signature.output], tensors)
        calls, started_s = 0, time.thread_time()
        while time.thread_time() - started_s < SECONDS:
            session.run([signature.output], tensors)
            calls += 1
        found[rows] = 1e6 * (time.thread_time() - started_s) / (calls * rows)
    return found
