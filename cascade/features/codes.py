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
    """Functions of a key's events and frauds."""

    COUNT = 0
    SUM = 1
    MEAN = 2
    MAX = 3
    STD = 4
    RATIO_TO_MEAN = 5
    DISTINCT = 6
    SECONDS_SINCE_LAST = 7
    LABELLED_COUNT = 8
    FRAUD_COUNT = 9
    FRAUD_RATE = 10
