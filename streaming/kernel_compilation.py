"""Compiles the kernels before the first transaction: at a worker's start, or ahead of it by `cascade compile`.

`cascade.compilation` caches the compiled code. The first call takes half a minute, a later one less than a second.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import get_args

from cascade.bundle import SHIPPED_BUNDLE, load_bundle
from cascade.config import CodecName, Config
from cascade.engine import Engine
from stages.assembly import make_engine
from stages.screener.compiled import CompiledScreener
from streaming.codecs.avro import compile_avro_kernel
from streaming.decisions import warm_up_encoder
from streaming.duplicates import FirstDecisions


def compile_kernels(
    engine: Engine, config: Config, codecs: Collection[CodecName], on_progress: Callable[[], None] = lambda: None
) -> None:
    """Compiles all kernels that a worker calls.

    engine: its kernels, and its memory for `worker.batch_rows_max` rows. config: the worker's. codecs: those whose
    kernels are compiled. on_progress: called after each group of kernels.
    """
    engine.warm_up(config.worker.batch_rows_max)
    on_progress()
    warm_up_encoder()
    on_progress()
    FirstDecisions(config.duplicates).warm_up()
    on_progress()
    if "avro" in codecs:
        compile_avro_kernel()
        on_progress()


def compile_every_kernel() -> None:
    """Compiles the kernels that a worker may need, for any bundle, configuration and codec.

    They depend on no bundle but for the masks of the screener, which have two dtypes.
    """
    bundle = load_bundle(SHIPPED_BUNDLE)
    compile_kernels(make_engine(bundle), Config(), get_args(CodecName))
    CompiledScreener(bundle.content["screener.txt"]).compile_every_mask()
