"""Returns records at once that kafka-python 3.0 delays by its fetch backoff of 100 ms.

kafka-python's fetch returns buffered records, else sends fetch requests, else waits for those in flight. If a response
arrives between the first step and the second, there is nothing to request and nothing in flight: kafka-python takes
the consumer for idle and sleeps, although records are buffered. Here the buffer is read again before the sleep.
"""

from __future__ import annotations

from typing import Any

from kafka.consumer.fetcher import Fetcher


def recheck_before_backoff(fetcher: Fetcher) -> None:
    """Makes this fetcher return records that arrive while it sends its requests."""
    fetch = fetcher.fetch_records

    def fetch_records(
        max_records: int | None = None, update_offsets: bool = True, timeout_ms: float | None = None
    ) -> tuple[dict[Any, list[Any]], bool]:
        records, idle = fetch(max_records, update_offsets=update_offsets, timeout_ms=timeout_ms)
        if idle and not records:
            records, _ = fetcher.fetched_records(max_records, update_offsets=update_offsets)
        return records, idle

    fetcher.fetch_records = fetch_records
