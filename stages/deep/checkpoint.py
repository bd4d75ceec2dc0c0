"""Files from which an interrupted training of a deep model goes on: numbers only, so reading one executes nothing."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cascade.columns import Array

# What Adam keeps of each parameter that it has changed.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a training after its last whole epoch, in `path`; None: nothing is kept."""

    path: Path | None

    @classmethod
    def of(cls, directory: Path | None, data: Iterable[Array], settings: object) -> Checkpoint:
        """The checkpoint of a training of these data with these settings, and with this version of PyTorch."""
        if directory is None:
            return cls(None)
        digest = hashlib.sha256(msgspec.json.encode((str(torch.__version__), settings)))
        for array in data:
            digest.update(np.ascontiguousarray(array).data)
        return cls(directory / f"{digest.hexdigest()[:16]}.npz")

    def save(self, model: nn.Module, optimiser: Optimizer, epochs: int) -> None:
        """Writes the state after so many epochs, in place of an earlier one."""
        if self.path is None:
            return
        arrays = {f"model/{name}": value.numpy() for name, value in model.state_dict().items()}
        for number, moments in optimiser.state_dict()["state"].items():
            arrays |= {f"optimiser/{number}/{name}": moments[name].numpy() for name in _MOMENTS}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".part.npz")
        np.savez(written, epochs=epochs, **arrays)
        written.replace(self.path)

    def restore(self, model: nn.Module, optimiser: Optimizer, schedule: LRScheduler, batches: int) -> int:
        """Puts all three into the saved state, and returns how many epochs of `batches` are done; 0 without a file."""
        if self.path is None or not self.path.exists():
            return 0
        state: dict[int, dict[str, torch.Tensor]] = {}
        with np.load(self.path, allow_pickle=False) as saved:
            epochs = int(saved["epochs"])
            model.load_state_dict({name: torch.from_numpy(saved[f"model/{name}"]) for name in model.state_dict()})
            for key in saved.files:
                if key.startswith("optimiser/"):
                    _, number, name = key.split("/")
                    state.setdefault(int(number), {})[name] = torch.from_numpy(saved[key])
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        with warnings.catch_warnings():
            # it expects a step of the optimiser before each of its own
            warnings.simplefilter("ignore")
            for _ in range(epochs * batches):
                schedule.step()
        return epochs
