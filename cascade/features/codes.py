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
    CATEGORY = 6
    BUCKET = 7


class WindowCode(IntEnum):
    """Functions of a key's events and frauds. From `SUM` on they are functions of the values of a window."""

    SECONDS_SINCE_LAST = 0
    DISTINCT = 1
    LABELLED_COUNT = 2
    FRAUD_COUNT = 3
    FRAUD_RATE = 4
    SAME_AS_LAST = 5
    SEEN = 6
    RATIO_TO_LAST = 7
    RISES = 8
    CHANGES = 9
    SECONDS_SINCE_FIRST = 10
    COUNT = 11
    SUM = 12
    MEAN = 13
    MAX = 14
    STD = 15
    RATIO_TO_MEAN = 16
