"""What is run: a scenario of TOML names the load, the objectives and the variants that take turns."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from bench.load import Arrivals
from cascade.config import ClientName, CodecName
from cascade.errors import CascadeError

SCENARIOS = Path(str(files("bench") / "scenarios"))
Models = Literal["cascade", "deep-only", "screener-only"]
PeerName = Literal["plain-loop", "quix-streams", "kafka-streams"]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A service to be measured: Cascade with these settings, or, where `peer` is given, that application.

    `models`: which of them decide; deep-only escalates every transaction. `live`: also measured as transactions arrive.
    `ledger`: full also keeps carbon, and a line on the disk every second; off keeps nothing (`bench.silent`).
    """

    name: str
    client: ClientName = "kafka-python"
    models: Models = "cascade"
    backend: Literal["triton", "onnxruntime"] = "triton"
    codec: CodecName = "json"
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    peer: PeerName | None = None
    live: bool = True
    ledger: Literal["on", "full", "off"] = "on"


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The simulator's world; its transactions are repeated, later each time, where more are wanted."""

    cards: Count = 20_000
    terminals: Count = 20_000
    days: Count = 20


class Backlog(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Full speed: transactions that are there already, so many that they take a variant about `seconds`; twice.

    The first time is for compilers and caches. The second counts, without the first `warm_up_share` of it.
    """

    seconds: Positive = 6.0
    transactions_max: Count = 600_000
    warm_up_share: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.15


class Live(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """As they arrive: at `rate` a second, or, where it is 0, at `share` of what the backlog's turn has reached.

    `rate_max` bounds that, for a machine that also has to carry load, broker and observer.
    """

    arrivals: Arrivals = "poisson"
    rate: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    rate_max: Positive = 50_000.0
    seconds: Positive = 15.0
    warm_up_s: Annotated[float, msgspec.Meta(ge=0)] = 5.0


class Highest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The highest rate that meets the objectives, by halving, as MLPerf's server scenario asks for it.

    `steps` runs of `seconds` each, between 0 and the backlog's rate.
    """

    steps: Annotated[int, msgspec.Meta(ge=0, le=12)] = 0
    seconds: Positive = 10.0


class Objectives(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """From a transaction's departure, as scheduled, until a consumer downstream has its decision."""

    screened_p99_ms: Positive = 5.0
    escalated_p99_ms: Positive = 15.0
    degraded_share_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.001


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole run. `reference`: the variant to which the others are compared; each round runs every variant once."""

    name: str
    reference: str
    variant: list[Variant]
    rounds: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3
    partitions: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    escalation_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.01
    seed: int = 1
    data: Data = msgspec.field(default_factory=Data)
    backlog: Backlog = msgspec.field(default_factory=Backlog)
    live: Live | None = msgspec.field(default_factory=Live)
    highest: Highest = msgspec.field(default_factory=Highest)
    objectives: Objectives = msgspec.field(default_factory=Objectives)

    def only(self, names: list[str]) -> Scenario:
        """The same with these variants only, the first as the reference; CascadeError where one is not in it."""
        known = {one.name: one for one in self.variant}
        missing = [name for name in names if name not in known]
        if missing:
            raise CascadeError(f"{self.name}: no variant {', '.join(missing)}; there are {', '.join(known)}")
        return msgspec.structs.replace(self, reference=names[0], variant=[known[name] for name in names])


def load_scenario(name_or_path: str) -> Scenario:
    """A shipped scenario by name, or one of a file; raises CascadeError, one line, for what is wrong in it."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = SCENARIOS / f"{name_or_path}.toml"
    if not path.exists():
        shipped = ", ".join(sorted(one.stem for one in SCENARIOS.glob("*.toml")))
        raise CascadeError(f"{name_or_path}: no such scenario; give a file, or one of {shipped}")
    try:
        found: Any = msgspec.toml.decode(path.read_bytes(), type=Scenario)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CascadeError(f"{path}: {error}") from error
    scenario: Scenario = found
    names = [one.name for one in scenario.variant]
    if not names or len(set(names)) != len(names):
        raise CascadeError(f"{path}: variant: give at least one, each with a name of its own")
    if scenario.reference not in names:
        raise CascadeError(f"{path}: reference {scenario.reference!r} is none of the variants {', '.join(names)}")
    return scenario
