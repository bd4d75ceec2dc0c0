"""Calls of librdkafka that may not return.

It has been seen to send offsets to the coordinator of a killed node for minutes, whatever the time limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from confluent_kafka import KafkaError, KafkaException

# While a call drops records, which it waits for, their events are dropped this often.
SERVE_S = 0.02
# A call may exceed its own time limit by this much.
GRACE_S = 1.0


def within(
    timeout_s: float, call: Callable[..., object], *arguments: object, serve: Callable[[], object] | None = None
) -> None:
    """Runs a call, whose last argument is its time limit, in a thread; raises KafkaException after it and GRACE_S.

    serve: called every SERVE_S meanwhile. The thread of a call that does not return is left alone.
    """
    outcome: list[BaseException | None] = []
    thread = threading.Thread(
        target=_make, args=(outcome, call, *arguments, timeout_s), name="cascade-call", daemon=True
    )
    # librdkafka ends with the last reference: the traceback of an error must not have one
    del call
    thread.start()
    give_up_s = time.monotonic() + timeout_s + GRACE_S
    while serve is not None and thread.is_alive() and time.monotonic() < give_up_s:
        serve()
        thread.join(SERVE_S)
    thread.join(max(give_up_s - time.monotonic(), 0.0))
    if not outcome:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no answer within {timeout_s:.3g} s"))
    if outcome[0] is not None:
        raise outcome[0]


def _make(outcome: list[BaseException | None], call: Callable[..., object], *arguments: object) -> None:
    try:
        call(*arguments)
    except BaseException as error:
        outcome.append(error.with_traceback(None))
    else:
        outcome.append(None)
