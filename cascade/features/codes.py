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
    """Functions of a key's events and frauds. From `SUM` on they are functions of the values of a window.

    `RISES` to `LONGEST_RISING_RUN` follow one another as the rows of `Program.order`.
    """

    SECONDS_SINCE_LAST = 0
    DISTINCT = 1
    LABELLED_COUNT = 2
    FRAUD_COUNT = 3
    FRAUD_RATE = 4
    SAME_AS_LAST = 5
    SEEN = 6
    RATIO_TO_LAST = 7
    RISES = 8
    FALLS = 9
    RISING_RUN = 10
    LONGEST_RISING_RUN = 11
    CHANGES = 12
    SECONDS_SINCE_FIRST = 13
    COUNT = 14
    SUM = 15
    MEAN = 16
    MAX = 17
    STD = 18
    RATIO_TO_MEAN = 19
