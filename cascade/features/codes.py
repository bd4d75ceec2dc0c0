"""The functions that the kernels compute, by number. Their names are those of a feature file, in capitals."""

from __future__ import annotations

from enum import IntEnum


class TransactionCode(IntEnum):
    """Functions of the transaction alone."""

    VALUE = 0
    ONE_HOT = 1
    HOUR = 2
    WEEKDAY = 3
    NIGHT = 4
    WEEKEND = 5


class WindowCode(IntEnum):
    """Functions of a key's events and frauds. From `SUM` on they are functions of the values of a window."""

    SECONDS_SINCE_LAST = 0
    DISTINCT = 1
    LABELLED_COUNT = 2
    FRAUD_COUNT = 3
    FRAUD_RATE = 4
    COUNT = 5
    SUM = 6
    MEAN = 7
    MAX = 8
    STD = 9
    RATIO_TO_MEAN = 10
