"""Compiles the kernels before the first transaction: at a worker's start, or ahead of it by `cascade compile`.

`cascade.compilation` caches the compiled code. The first call takes half a minute, a later one less than a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import get_args

import llvmlite.binding

from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.config import CodecName, Config
from cascade.engine import Engine
from cascade.errors import SettingError
from cascade.ledger import Ledger
from stages.assembly import make_engine
from stages.screener.compiled import CompiledScreener
from streaming.codecs.ahead import warm_up_ahead
from streaming.codecs.avro import compile_avro_kernel
from streaming.codecs.json_columns import compile_json_kernel
from streaming.pipeline.duplicates import FirstDecisions
from streaming.pipeline.encode import warm_up_encoder
from streaming.pipeline.offset_kernels import warm_up_offsets
from streaming.pipeline.table_kernels import warm_up_table

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
    on_progress()
    FirstDecisions(config.duplicates).warm_up()
    on_progress()
    Ledger().warm_up()
    on_progress()
    if "json" in codecs:
        compile_json_kernel()
        on_progress()
    if "avro" in codecs:
        compile_avro_kernel()
        on_progress()
    if config.kafka.client == "librdkafka":
        # the library loads only where it is used
        from streaming.kafka.rdkafka_compilation import compile_client_kernels

        compile_client_kernels()
        on_progress()


def compile_every_kernel() -> None:
    """Compiles the kernels that a worker may need, for any bundle, configuration and codec.

    They depend on no bundle but for the masks of the screener, which have two dtypes.
    """
    bundle = load_bundle(SHIPPED_BUNDLE)
    compile_kernels(make_engine(bundle), Config(), get_args(CodecName))
    CompiledScreener(bundle.content["screener.txt"]).compile_every_mask()
