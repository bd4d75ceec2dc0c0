"""Returns the buffered records of a resumed partition: kafka-python 3.0 can forget them.

While a partition is paused, kafka-python sets its fetched records aside and does not fetch it. After `resume` it takes
them back only if its slot for the current records is None. But a slot whose records were all returned stays, empty and
not None: the partition is then never returned or fetched again. Here an empty slot is set to None first.
"""

from __future__ import annotations

from typing import Any

from kafka.consumer.fetcher import Fetcher


def return_paused_records(fetcher: Fetcher) -> None:
    """Makes this fetcher return the records of a partition that was paused and is resumed."""
    fetched = fetcher.fetched_records

    def fetched_records(
        max_records: int | None = None, update_offsets: bool = True
    ) -> tuple[dict[Any, list[Any]], bool]:
        if not fetcher._next_partition_records:
            fetcher._next_partition_records = None
        records, partial = fetched(max_records, update_offsets)
        return records, partial

    fetcher.fetched_records = fetched_records
