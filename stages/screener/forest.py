"""A LightGBM model as arrays, read from its text, with the meaning of each split kept.

A split sends a row to the right where its value exceeds a threshold. What makes that hard are the values that LightGBM
treats apart: missing ones (NaN, or zero as well, to a default side) and categories (a set of them goes left). Each way
of treating a feature becomes a column of its own in which the comparison alone decides: a missing value is minus
infinity there where it goes left and infinity where it goes right; a category is 0 where it goes left and 1 where not,
and so is a value where only missing ones go right (their threshold is infinite).

Rows are float32, thresholds float64. The largest float32 that is not above a threshold decides the same of every
float32, so the comparison is made there.

Source of the format and of the rules: LightGBM 4, `src/io/tree.cpp` and `include/LightGBM/tree.h`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from cascade.columns import Array, Float32, Float64, Int32
from cascade.errors import CascadeError

# decision_type: bit 0 a split by category, bit 1 missing values go left, bits 2 and 3 what is missing
_CATEGORY, _LEFT = 1, 2
_MISSING_SHIFT = 2
_BETWEEN_0_AND_1 = np.float32(0.5)


class UnsupportedForestError(CascadeError):
    """The model is beyond the compiled screener; LightGBM itself has to score it."""


class ColumnKind(IntEnum):
    """How a column is made from its feature."""

    NAN_IS_ZERO = 0
    NAN_LEFT = 1
    NAN_RIGHT = 2
    ZERO_OR_NAN_LEFT = 3
    ZERO_OR_NAN_RIGHT = 4
    NAN_ALONE_RIGHT = 5
    ZERO_OR_NAN_ALONE_RIGHT = 6
    CATEGORY = 7


@dataclass(frozen=True, slots=True)
class Columns:
    """What the splits compare, a column each.

    `feature` int32 [columns], `kind` int32 [columns] of ColumnKind; of a CATEGORY, `set_start` and `set_words` int32
    [columns] say where in `sets` (uint32 words, a bit a category) those that go left stand.
    """

    feature: Int32
    kind: Int32
    set_start: Int32
    set_words: Int32
    sets: Array

    def __len__(self) -> int:
        return len(self.feature)


@dataclass(frozen=True, slots=True)
class Tree:
    """One tree. Child c >= 0 is a split, else the leaf ~c; a tree of one leaf has no splits.

    `column` int32 [splits], `threshold` float32 [splits], `left`, `right` int32 [splits], `value` float64 [leaves].
    """

    column: Int32
    threshold: Float32
    left: Int32
    right: Int32
    value: Float64

    @property
    def leaves(self) -> int:
        """How many leaves it has."""
        return len(self.value)


@dataclass(frozen=True, slots=True)
class Forest:
    """A whole model: the raw score of a row is the sum of its leaves' values, also of a random forest."""

    width: int
    columns: Columns
    trees: list[Tree]

    @property
    def leaves_max(self) -> int:
        """Leaves of the largest tree."""
        return max((tree.leaves for tree in self.trees), default=1)


def read_forest(model_text: bytes) -> Forest:
    """Read LightGBM's text format; raises UnsupportedForestError where the model is not one score by plain trees."""
    try:
        header, trees = _blocks(model_text.decode())
        if header.get("num_tree_per_iteration") != "1":
            raise UnsupportedForestError("it gives more than one score a row")
        width, table = int(header["max_feature_idx"]) + 1, _ColumnTable()
        found = [_tree(fields, table) for fields in trees]
        columns = table.made()
        if not ((columns.feature >= 0) & (columns.feature < width)).all():
            raise ValueError("a split is of no feature")
        return Forest(width, columns, found)
    except (KeyError, ValueError, IndexError) as error:
        raise UnsupportedForestError(f"its text is not as expected ({type(error).__name__}: {error})") from error


def _blocks(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The fields of the header and of each tree; lines without a value are fields that are there."""
    blocks: list[dict[str, str]] = [{}]
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "end of trees":
            return blocks[0], blocks[1:]
        if name == "Tree":
            blocks.append({})
        elif name:
            blocks[-1][name] = value
    raise ValueError("no end of trees")


class _ColumnTable:
    """Columns as the splits ask for them, each once."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, ColumnKind, bytes], int] = {}

    def number(self, feature: int, kind: ColumnKind, words: bytes = b"") -> int:
        return self._numbers.setdefault((feature, kind, words), len(self._numbers))

    def made(self) -> Columns:
        features, kinds, words = zip(*self._numbers, strict=True) if self._numbers else ((), (), ())
        sizes = np.array([len(one) // 4 for one in words], np.int32)
        return Columns(
            feature=np.array(features, np.int32),
            kind=np.array(kinds, np.int32),
            set_start=(np.cumsum(sizes) - sizes).astype(np.int32),
            set_words=sizes,
            sets=np.frombuffer(b"".join(words), np.uint32),
        )


def _tree(fields: Mapping[str, str], columns: _ColumnTable) -> Tree:
    if fields.get("is_linear", "0") != "0":
        raise UnsupportedForestError("its leaves are linear models")
    leaves = int(fields["num_leaves"])
    value = _numbers(fields, "leaf_value", np.float64)
    if leaves == 1:
        none: Int32 = np.zeros(0, np.int32)
        return Tree(none, np.zeros(0, np.float32), none, none, value[:1])
    decisions = _numbers(fields, "decision_type", np.int64)
    features = _numbers(fields, "split_feature", np.int64)
    thresholds = _numbers(fields, "threshold", np.float64)
    if np.isnan(thresholds).any():
        raise UnsupportedForestError("it has thresholds that are no numbers")
    left, right = _numbers(fields, "left_child", np.int32), _numbers(fields, "right_child", np.int32)
    if {len(decisions), len(features), len(thresholds), len(left), len(right), len(value) - 1} != {leaves - 1}:
        raise ValueError("a tree's lists are not of one length")
    if not (np.sort(np.concatenate([left, right])) == np.delete(np.arange(-leaves, leaves - 1), leaves)).all():
        raise ValueError("a tree's children are not each of its leaves and splits once")
    sets = _category_sets(fields)
    compared = _rounded_down(thresholds)
    column = np.empty(leaves - 1, np.int32)
    for split, decision in enumerate(decisions.tolist()):
        feature = int(features[split])
        if decision & _CATEGORY:
            column[split] = columns.number(feature, ColumnKind.CATEGORY, sets[int(thresholds[split])])
            compared[split] = _BETWEEN_0_AND_1
        else:
            kind = _kind(decision, alone=bool(np.isposinf(thresholds[split])))
            column[split] = columns.number(feature, kind)
            if kind in {ColumnKind.NAN_ALONE_RIGHT, ColumnKind.ZERO_OR_NAN_ALONE_RIGHT}:
                compared[split] = _BETWEEN_0_AND_1
    return Tree(column, compared, left, right, value)


def _kind(decision: int, alone: bool) -> ColumnKind:
    missing = decision >> _MISSING_SHIFT
    if missing == 0:
        return ColumnKind.NAN_IS_ZERO
    nan_only = missing != 1
    if decision & _LEFT:
        return ColumnKind.NAN_LEFT if nan_only else ColumnKind.ZERO_OR_NAN_LEFT
    if alone:
        return ColumnKind.NAN_ALONE_RIGHT if nan_only else ColumnKind.ZERO_OR_NAN_ALONE_RIGHT
    return ColumnKind.NAN_RIGHT if nan_only else ColumnKind.ZERO_OR_NAN_RIGHT


def _category_sets(fields: Mapping[str, str]) -> list[bytes]:
    """The words of each set of categories, as octets."""
    if fields.get("num_cat", "0") == "0":
        return []
    bounds = _numbers(fields, "cat_boundaries", np.int64)
    words = _numbers(fields, "cat_threshold", np.uint32)
    return [words[start:end].tobytes() for start, end in itertools.pairwise(bounds)]


def _rounded_down(thresholds: Float64) -> Float32:
    """The largest float32 that is not above each."""
    with np.errstate(over="ignore"):
        near: Float32 = thresholds.astype(np.float32)
    above = near.astype(np.float64) > thresholds
    near[above] = np.nextafter(near[above], np.float32(-np.inf))
    return near


def _numbers(fields: Mapping[str, str], name: str, kind: type[np.number]) -> Array:
    return np.array(fields[name].split(" "), np.float64 if kind is np.float64 else np.int64).astype(kind)
