"""The GPUs that MIG can divide: their profiles with slices, SMs, memory and start slots (`gpus.toml`, with sources)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Annotated, Final

import msgspec

from cascade.errors import DataError

# Of every GPU in the table. The eighth memory slice has no compute slice of its own.
COMPUTE_SLICES: Final = 7
MEMORY_SLICES: Final = 8

Count = Annotated[int, msgspec.Meta(ge=1)]
Watts = Annotated[float, msgspec.Meta(gt=0)]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A size of GPU instance, by its name at NVIDIA: `1g.5gb`.

    compute_slices, memory_slices: of the GPU's 7 and 8.
    sms: streaming multiprocessors of an instance.
    memory_gb: the figure in the name; the memory that a process sees is a little less.
    starts: memory slices at which an instance may begin.
    count_max: instances on one GPU.
    """

    name: str
    compute_slices: Count
    memory_slices: Count
    sms: Count
    memory_gb: Count
    starts: tuple[int, ...]
    count_max: Count


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model of GPU.

    key: its name in options, `a100-40gb`.
    models: its names at NVML and DCGM.
    sms: of the whole device with MIG off.
    idle_w: the whole device with clocks up and nothing running.
    power_w_max: its power limit as delivered.
    profiles: from the smallest to the whole GPU.
    sources, assumptions: a sentence each.
    """

    key: str
    name: str
    models: tuple[str, ...]
    sms: Count
    memory_gb: Count
    idle_w: Watts
    power_w_max: Watts
    sources: tuple[str, ...]
    assumptions: tuple[str, ...]
    profiles: tuple[Profile, ...]

    def profile(self, name: str) -> Profile:
        """The profile of this name. Raises DataError if the GPU has none."""
        for profile in self.profiles:
            if profile.name == name:
                return profile
        known = ", ".join(profile.name for profile in self.profiles)
        raise DataError(f"profile {name}: {self.key} has no such profile; use one of {known}")


def find_gpu(key: str) -> Gpu:
    """The GPU of this key. Raises DataError if the table has none."""
    if key not in GPUS:
        raise DataError(f"GPU {key}: not in the table; use one of {', '.join(GPUS)}")
    return GPUS[key]


def _read_table() -> Mapping[str, Gpu]:
    text = resources.files(__package__).joinpath("gpus.toml").read_text("utf-8")
    table = msgspec.toml.decode(text, type=dict[str, dict[str, object]])
    return MappingProxyType({key: msgspec.convert({"key": key, **gpu}, Gpu) for key, gpu in table.items()})


GPUS: Final = _read_table()
