"""Compiles the kernels before the first transaction: at a worker's start, or ahead of it by `cascade compile`.

`cascade.compilation` caches the compiled code. The first call takes half a minute, a later one less than a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection

import llvmlite.binding

from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.config import CodecName, Config
from cascade.engine import Engine
from cascade.errors import SettingError
from cascade.ledger import Ledger
from cascade.plugins import CODECS
from stages.assembly import make_engine
from stages.screener.compiled import CompiledScreener
from streaming.codecs.ahead import warm_up_ahead
from streaming.kafka import client_named
from streaming.pipeline.decisions import decision_format
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.encode import warm_up_encoder
from streaming.pipeline.offset_kernels import warm_up_offsets
from streaming.pipeline.table_kernels import warm_up_table
from streaming.pipeline.watch import warm_up_watch

# What distinguishes these processors, for which an image may be compiled, from those before (x86-64 psABI, table 3.1).
FEATURES = {
    "x86-64-v3": ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"),
    "x86-64-v4": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}


def check_processor() -> None:
    """Raises SettingError if the kernels are compiled for a processor with features that this one lacks.

    The first such instruction would end the process without a message.
    """
    name = os.environ.get("NUMBA_CPU_NAME", "")
    here = llvmlite.binding.get_host_cpu_features()
    missing = [feature for feature in FEATURES.get(name, ()) if not here.get(feature, False)]
    if missing:
        problem = f"this processor lacks {', '.join(missing)}"
        raise SettingError("environment", "NUMBA_CPU_NAME", name, problem, 'set it to "generic"')


def compile_kernels(
    engine: Engine, config: Config, codecs: Collection[CodecName], on_progress: Callable[[], None] = lambda: None
) -> None:
    """Compiles all kernels that a worker calls. Raises SettingError as check_processor does.

    engine: its kernels, and its memory for `worker.batch_rows_max` rows. config: the worker's. codecs: those whose
    kernels are compiled. on_progress: called after each group of kernels.
    """
    check_processor()
    engine.warm_up(config.worker.batch_rows_max)
    on_progress()
    warm_up_encoder()
    warm_up_ahead()
    warm_up_table()
    warm_up_offsets()
    warm_up_watch()
    on_progress()
    FirstDecisions(config.duplicates).warm_up()
    on_progress()
    Ledger().warm_up()
    on_progress()
    for name in codecs:
        getattr(CODECS.load(name), "warm_up", _nothing_to_compile)()
        decision_format(name)
        on_progress()
    client_named(config.kafka.client).warm_up()
    on_progress()


def _nothing_to_compile() -> None:
    """Of a codec without kernels."""


def compile_every_kernel() -> None:
    """Compiles the kernels that a worker may need, for any bundle, configuration and codec.

    They depend on no bundle but for the masks of the screener, which have two dtypes.
    """
    bundle = load_bundle(SHIPPED_BUNDLE)
    compile_kernels(make_engine(bundle), Config(), list(CODECS.own))
    CompiledScreener(bundle.content["screener.txt"]).compile_every_mask()
