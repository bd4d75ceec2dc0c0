"""Triton's Python backend for the deep model: runs the ONNX file in this directory with ONNX Runtime on the CPU."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """An instance of the model. The configuration has the names of its tensors."""

    def initialize(self, args):
        """Open the session, with the number of threads from the configuration's parameter `threads`."""
        config = json.loads(args["model_config"])
        self.input_names = [tensor["name"] for tensor in config["input"]]
        self.output_name = config["output"][0]["name"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["threads"]["string_value"])
        options.inter_op_num_threads = 1
        # a thread that spins while it waits would consume the energy that the service saves
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        """Answer all requests of a batch with a single run. Errors become responses; nothing is raised."""
        try:
            inputs = [
                [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
                for name in self.input_names
            ]
            alone = len(requests) == 1  # as most are on a quiet stream: nothing to join and to split
            feeds = {
                name: parts[0] if alone else np.concatenate(parts) for name, parts in zip(self.input_names, inputs)
            }
            logits = self.session.run([self.output_name], feeds)[0]
            rows = [len(part) for part in inputs[0]]
            if logits.shape != (sum(rows), 1):
                raise ValueError(f"the model answered {logits.shape} for {sum(rows)} rows")
        except Exception as error:
            failure = pb_utils.TritonError(f"{type(error).__name__}: {error}")
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]
        parts = [logits] if alone else np.split(logits, np.cumsum(rows)[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor(self.output_name, part)]) for part in parts]
