"""No transaction waits for the compilation of a kernel."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llvmlite.binding
import pytest

from cascade import cli
from cascade.bundle import SHIPPED_BUNDLE, Bundle
from cascade.compilation import cache_directory, compilations
from cascade.config import BundleSettings, Config
from cascade.engine import Engine
from cascade.errors import SettingError
from stages.assembly import make_engine
from stages.screener.compiled import CompiledScreener
from stages.screener.kernels import quickscore
from streaming.health_state import HealthState
from streaming.service import serve as service
from streaming.service.kernel_compilation import FEATURES, check_processor

QUICKSCORE_LEAVES = list(inspect.signature(quickscore.py_func).parameters).index("leaves")  # type: ignore[attr-defined]
# Runs simulated workers, with restarts and rebalances, and prints the kernels that are compiled after the start. The
# digests are the simulator's own.
PROGRAM = """
import sys
from pathlib import Path
from numba.core.dispatcher import Dispatcher
from bench.faults.run import simulate
from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.config import Config
from cascade.schema import Field
from stages.assembly import make_engine
from streaming.codecs.avro import AvroCodec
from streaming.codecs.avro_schemas import schema_text
from streaming.codecs.schema_sources import DirectorySchemas
from streaming.service.kernel_compilation import compile_kernels

def signatures():
    own = ("cascade.", "stages.", "streaming.")
    modules = [module for name, module in sys.modules.items() if name.startswith(own)]
    kernels = {kernel for module in modules for kernel in vars(module).values() if isinstance(kernel, Dispatcher)}
    kernels = {kernel for kernel in kernels if kernel.__module__ != "cascade.features.digest"}
    return {(kernel.__module__, kernel.__name__, signature) for kernel in kernels for signature in kernel.signatures}

compile_kernels(make_engine(load_bundle(SHIPPED_BUNDLE)), Config(), ["json", "avro"])
at_start = signatures()
for seed in range(20):
    simulate(seed)
schemas = DirectorySchemas(Path(sys.argv[1]))
codec = AvroCodec({"card_id": Field(type="string", max_length=8), "amount": Field(type="float64")}, 1024, schemas)
(Path(sys.argv[1]) / "1.avsc").write_text(schema_text(codec._fields))
assert codec.decode([b"\\0\\0\\0\\0\\1\\0" + bytes(8)]).batch.rows == 1
print(sorted({f"{module}.{name}" for module, name, _ in signatures() - at_start}))
"""


def test_a_worker_compiles_no_kernel_after_its_start(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "[]"


def test_an_installation_compiles_the_screener_for_few_and_for_many_leaves() -> None:
    CompiledScreener((SHIPPED_BUNDLE / "screener.txt").read_bytes()).compile_every_mask()
    masks = {str(signature[QUICKSCORE_LEAVES].dtype) for signature in quickscore.signatures}
    assert masks == {"uint32", "uint64"}


def test_kernels_for_a_processor_with_more_features_are_refused_before_one_of_them_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = dict.fromkeys(FEATURES["x86-64-v3"], True)
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: here)
    monkeypatch.setenv("NUMBA_CPU_NAME", "x86-64-v3")
    check_processor()
    here |= {"avx2": False}
    del here["fma"]
    with pytest.raises(SettingError) as refused:
        check_processor()
    assert str(refused.value) == (
        "environment: NUMBA_CPU_NAME = 'x86-64-v3': this processor lacks avx2, fma; set it to \"generic\""
    )
    monkeypatch.delenv("NUMBA_CPU_NAME")
    check_processor()


def test_the_names_of_features_are_those_that_llvm_reports() -> None:
    known = llvmlite.binding.get_host_cpu_features()
    assert all(feature in known for features in FEATURES.values() for feature in features)


def test_the_command_reports_what_it_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "--json"]) == 0
    capsys.readouterr()
    # the first call has compiled what was missing, so the second has nothing to compile
    before = compilations()
    assert cli.main(["compile", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["directory"] == str(cache_directory())
    assert report["compiled"] == before == compilations()


def test_kernels_are_compiled_before_the_worker_joins_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    health, events = HealthState(60.0), list[Any]()

    def compile_kernels(engine: object, config: Config, codecs: list[str], on_progress: object) -> None:
        events.append((codecs, health.not_ready()))

    monkeypatch.setattr(service, "compile_kernels", compile_kernels)
    monkeypatch.setattr(service, "HealthState", lambda stall_s_max: health)
    monkeypatch.setattr(service, "await_broker", lambda *_: events.append("broker"))
    monkeypatch.setattr(service, "await_model", lambda *_: None)
    monkeypatch.setattr(service, "await_topics", lambda *_: None)
    monkeypatch.setattr(service.Sessions, "run", lambda *_: events.append("join"))
    monkeypatch.setattr(service, "_settle_interpreter", lambda: None)
    monkeypatch.setattr(
        service, "LagWatch", lambda **_: SimpleNamespace(lags=dict, start=lambda: None, close=lambda: None)
    )
    service.serve(Config(bundle=BundleSettings(path=str(SHIPPED_BUNDLE))))
    (codecs, waiting_for), *later = events
    assert (codecs, later) == (["json"], ["broker", "join"])
    assert "kernels: compiling, half a minute at the first start" in waiting_for
    assert not any(line.startswith("kernels") for line in health.not_ready())


@pytest.mark.parametrize(("version", "made"), [("", 0), ("of-yesterday", 1)], ids=["the same bundle", "another"])
def test_a_standby_that_becomes_a_worker_loads_nothing_again_unless_the_bundle_was_replaced(
    version: str, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("await_broker", "await_topics", "_settle_interpreter"):
        monkeypatch.setattr(service, name, lambda *_: None)
    monkeypatch.setattr(service.Sessions, "run", lambda *_: None)
    waits_s: list[float] = []
    monkeypatch.setattr(service, "await_model", lambda *parts: waits_s.append(parts[-1]))
    config = Config(bundle=BundleSettings(path=str(SHIPPED_BUNDLE)))
    loaded = service.load(config)
    if version:
        other: Any = SimpleNamespace(version=version)
        loaded = service.Loaded(other, loaded.engine)
    engines, warmed = list[object](), list[object]()

    def make(bundle: Bundle) -> Engine:
        engine = make_engine(bundle)
        engines.append(engine)
        return engine

    monkeypatch.setattr(service, "make_engine", make)
    monkeypatch.setattr(service, "compile_kernels", lambda engine, *_: warmed.append(engine))
    monkeypatch.setattr(
        service, "LagWatch", lambda **_: SimpleNamespace(lags=dict, start=lambda: None, close=lambda: None)
    )
    service.serve(config, loaded=loaded)
    assert len(engines) == made
    assert warmed == (engines or [loaded.engine])
    assert waits_s == [service.MODEL_WAIT_S_MAX], "transactions wait for it"
