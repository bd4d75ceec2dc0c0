"""Compiles the kernels before the first transaction: at a worker's start, or ahead of it by `cascade local install`.

`cascade.compilation` caches the compiled code. The first call takes half a minute, a later one less than a second.
"""

from __future__ import annotations

from cascade.config import Config
from cascade.engine import Engine
from streaming.decisions import warm_up_encoder
from streaming.duplicates import FirstDecisions


def compile_kernels(engine: Engine, config: Config) -> None:
    """Now, and not with the first transaction."""
    engine.warm_up(config.worker.batch_rows_max)
    warm_up_encoder()
    FirstDecisions(config.duplicates).warm_up()
