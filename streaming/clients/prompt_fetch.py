"""Records that arrive at the wrong moment, which kafka-python 3.0 leaves lying for a tenth of a second.

The vendor's fetch looks for records that are there, then asks for more, then waits for what is under way. An answer
that comes between the first look and the request leaves nothing to ask for and nothing under way: the vendor takes
that for an idle consumer and sleeps its back-off (100 ms) beside the records. Here it looks once more before it calls
itself idle.
"""

from __future__ import annotations

from typing import Any

from kafka.consumer.fetcher import Fetcher


def look_again_before_sleeping(fetcher: Fetcher) -> None:
    """Make this fetcher give the records that came while it was asking for more."""
    fetch = fetcher.fetch_records

    def fetch_records(
        max_records: int | None = None, update_offsets: bool = True, timeout_ms: float | None = None
    ) -> tuple[dict[Any, list[Any]], bool]:
        records, idle = fetch(max_records, update_offsets=update_offsets, timeout_ms=timeout_ms)
        if idle and not records:
            records, _ = fetcher.fetched_records(max_records, update_offsets=update_offsets)
        return records, idle

    fetcher.fetch_records = fetch_records
