"""Scenarios: a TOML file names the load, the objectives and the variants that take turns."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from bench.load import Arrivals
from cascade.config import ClientName, CodecName
from cascade.errors import CascadeError
from cascade.plugins import CLIENTS, CODECS

SCENARIOS = Path(str(files("bench") / "scenarios"))
Models = Literal["cascade", "deep-only", "screener-only"]
PeerName = Literal["plain-loop", "quix-streams", "kafka-streams"]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A service to measure: Cascade with these settings, or the application that `peer` names.

    `models`: those that decide; deep-only escalates every transaction. `live`: measure also under an open-loop load.
    `ledger`: full adds carbon and a journal line every second; off records nothing (`bench.silent`).
    """

    name: str
    client: ClientName = "librdkafka"
    models: Models = "cascade"
    backend: Literal["triton", "onnxruntime"] = "triton"
    codec: CodecName = "json"
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    peer: PeerName | None = None
    live: bool = True
    ledger: Literal["on", "full", "off"] = "on"


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Size of the simulated data; its transactions repeat at later times where the load needs more."""

    cards: Count = 20_000
    terminals: Count = 20_000
    days: Count = 20


class Backlog(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Full speed: a backlog that takes a variant about `seconds`, twice.

    The first backlog warms compilers and caches. The second counts, without its first `warm_up_share`.
    """

    seconds: Positive = 6.0
    transactions_max: Count = 600_000
    warm_up_share: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.15


class Live(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An open-loop load of `rate` transactions a second, or, where it is 0, of `share` of the backlog's throughput.

    `rate_max` bounds the rate, since load, broker and observer run on the same machine.
    """

    arrivals: Arrivals = "poisson"
    rate: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    rate_max: Positive = 50_000.0
    seconds: Positive = 15.0
    warm_up_s: Annotated[float, msgspec.Meta(ge=0)] = 5.0


class Highest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Search for the highest rate that meets the objectives, by bisection, as in MLPerf's server scenario.

    `steps` runs of `seconds` each, between 0 and the backlog's throughput.
    """

    steps: Annotated[int, msgspec.Meta(ge=0, le=12)] = 0
    seconds: Positive = 10.0


class Objectives(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits on the time from a transaction's scheduled departure until a consumer reads its decision."""

    screened_p99_ms: Positive = 5.0
    escalated_p99_ms: Positive = 15.0
    degraded_share_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.001


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole run: each round runs every variant once.

    `reference`: the variant that the others are compared with. `deep`: the size of the deep model of the shipped bundle
    that decides.
    """

    name: str
    reference: str
    variant: list[Variant]
    rounds: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    partitions: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    escalation_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.01
    deep: Literal["small", "large"] = "small"
    seed: int = 1
    data: Data = msgspec.field(default_factory=Data)
    backlog: Backlog = msgspec.field(default_factory=Backlog)
    live: Live | None = msgspec.field(default_factory=Live)
    highest: Highest = msgspec.field(default_factory=Highest)
    objectives: Objectives = msgspec.field(default_factory=Objectives)

    def only(self, names: list[str]) -> Scenario:
        """The scenario with these variants, the first as the reference; raises CascadeError for an unknown variant."""
        known = {variant.name: variant for variant in self.variant}
        missing = [name for name in names if name not in known]
        if missing:
            raise CascadeError(f"{self.name}: no variant {', '.join(missing)}; use {', '.join(known)}")
        return msgspec.structs.replace(self, reference=names[0], variant=[known[name] for name in names])


def load_scenario(name_or_path: str) -> Scenario:
    """Reads a shipped scenario by name, or a TOML file; raises CascadeError where it is missing or wrong."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = SCENARIOS / f"{name_or_path}.toml"
    if not path.exists():
        shipped = ", ".join(sorted(file.stem for file in SCENARIOS.glob("*.toml")))
        raise CascadeError(f"{name_or_path}: no such scenario; use a TOML file, or {shipped}")
    try:
        scenario: Scenario = msgspec.toml.decode(path.read_bytes(), type=Scenario)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CascadeError(f"{path}: {error}") from error
    for variant in scenario.variant:
        CLIENTS.check(variant.client)
        CODECS.check(variant.codec)
    names = [variant.name for variant in scenario.variant]
    if not names or len(set(names)) != len(names):
        raise CascadeError(f"{path}: variant: name at least one, and no name twice")
    if scenario.reference not in names:
        raise CascadeError(f"{path}: reference {scenario.reference!r}: no such variant; use {', '.join(names)}")
    return scenario
