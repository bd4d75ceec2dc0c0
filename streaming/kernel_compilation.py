"""Compiling what numba compiles: a worker's start waits for it, and so may the set-up of a machine.

numba keeps what it compiled beside the modules. Half a minute is spent once, a second at each later start.
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
