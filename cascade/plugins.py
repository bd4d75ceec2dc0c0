"""Parts that the configuration chooses by name: Cascade's own, and those of installed packages.

A package registers a part as an entry point of one of the groups below, so that it needs no change in Cascade. Only
the part that is chosen is imported. Cascade's own parts are in these tables rather than in entry points: a start with
them reads no metadata of installed packages, and a checkout finds them without being installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cascade.errors import SettingError


@dataclass(frozen=True)
class Registry:
    """The parts of one kind.

    group: of the entry points. key: of the configuration, whose value is a name. own: `module:attribute` by name, of
    Cascade's own parts, which no entry point replaces.

    >>> CODECS.load("json").__name__
    'JsonCodec'
    """

    group: str
    key: str
    own: Mapping[str, str]

    def names(self) -> list[str]:
        """All names, in order."""
        return sorted({*self.own, *(entry.name for entry in entry_points(group=self.group))})

    def check(self, name: str) -> None:
        """Raises SettingError with all names, if the name is not registered, or by several packages."""
        self._entry(name)

    def load(self, name: str) -> Any:
        """Imports the part. Raises SettingError as `check` does, or if the part cannot be imported."""
        return _load(self._entry(name), self.key)

    def _entry(self, name: str) -> EntryPoint:
        if name in self.own:
            return EntryPoint(name, self.own[name], self.group)
        found = {entry.value: entry for entry in entry_points(group=self.group, name=name)}
        if len(found) == 1:
            return found.popitem()[1]
        if found:
            problem = f"registered more than once ({', '.join(sorted(found))})"
            raise SettingError("configuration", self.key, name, problem, "uninstall all packages but one of these")
        names = " or ".join(f'"{known}"' for known in self.names())
        remedy = f"use {names}" if names else f"none is installed; install a package with an entry point {self.group}"
        raise SettingError("configuration", self.key, name, "not one of the choices", remedy)


@cache
def _load(entry: EntryPoint, key: str) -> Any:
    try:
        return entry.load()
    except Exception as error:  # of a package that is not ours
        problem = f"{entry.value} cannot be imported ({type(error).__name__}: {error})"
        remedy = "install a version of its package that fits this release"
        raise SettingError("configuration", key, entry.name, problem, remedy) from error


CODECS = Registry(
    "cascade.codecs",
    "kafka.codec",
    {
        "json": "streaming.codecs.json:JsonCodec",
        "msgpack": "streaming.codecs.msgpack:MsgpackCodec",
        "binary": "streaming.codecs.binary:BinaryCodec",
        "avro": "streaming.codecs.avro:AvroCodec",
    },
)
CLIENTS = Registry(
    "cascade.clients",
    "kafka.client",
    {
        "librdkafka": "streaming.kafka.clients:LibrdkafkaClient",
        "kafka-python": "streaming.kafka.clients:KafkaPythonClient",
    },
)
DEEP_STAGES = Registry(
    "cascade.deep_stages",
    "deep.backend",
    {
        "triton": "stages.assembly:make_triton_stage",
        "onnxruntime": "stages.assembly:make_onnx_stage",
    },
)
# Besides the meters of a machine's hardware, which Cascade finds itself.
METERS = Registry("cascade.meters", "energy.meters", {})
