"""Compiles the kernels before the first transaction: at a worker's start, or ahead of it by `cascade local install`.

`cascade.compilation` caches the compiled code. The first call takes half a minute, a later one less than a second.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from cascade.config import CodecName, Config
from cascade.engine import Engine
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
