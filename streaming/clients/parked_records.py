"""Partitions that kafka-python 3.0 forgets: paused over fetched records, resumed, and never given or fetched again.

Records of a partition that is paused are parked, and the partition is not fetched while they are. After `resume` the
vendor takes parked records back where its in-line slot is None; but a slot whose records were all given is left
there, empty and not None. From then on nothing is taken back, and the partition stands still for good. Here an empty
slot is made None first.
"""

from __future__ import annotations

from typing import Any

from kafka.consumer.fetcher import Fetcher


def give_parked_records(fetcher: Fetcher) -> None:
    """Make this fetcher take parked records back when their partition is resumed."""
    give = fetcher.fetched_records

    def fetched_records(
        max_records: int | None = None, update_offsets: bool = True
    ) -> tuple[dict[Any, list[Any]], bool]:
        if not fetcher._next_partition_records:
            fetcher._next_partition_records = None
        records, partial = give(max_records, update_offsets)
        return records, partial

    fetcher.fetched_records = fetched_records
