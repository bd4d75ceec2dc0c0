"""Reads a LightGBM model from its text into arrays.

A split sends a row to the right if its value exceeds a threshold, with two exceptions: missing values (NaN, or zero as
well) go to a default side, and a split by category sends a set of categories to the left. Each way of treating a
feature becomes a column in which a comparison alone decides. In such a column a missing value is minus infinity if it
goes left, and infinity if it goes right. A category is 0 if it goes left, else 1. If only missing values go right
(LightGBM's threshold is then infinite), they are 1 and all other values 0.

Rows are float32, LightGBM's thresholds float64. The largest float32 that does not exceed a threshold decides the same
for every float32, so the columns use that.

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

# decision_type: bit 0: a split by category; bit 1: missing values go left; bits 2 and 3: which values are missing
_CATEGORY, _LEFT = 1, 2
_MISSING_SHIFT = 2
_BETWEEN_0_AND_1 = np.float32(0.5)


class UnsupportedForestError(CascadeError):
    """The compiled screener does not support the model; LightGBM itself can score it."""


class ColumnKind(IntEnum):
    """How the values of a column follow from those of its feature: which are missing, and where they go."""

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
    """The columns that the splits compare.

    - `table` int32 [columns, 4]: feature, ColumnKind, and for a CATEGORY the first word and the number of words of the
      set of categories that go left; the words are in `sets`.
    - `sets` uint32 [words]: sets of categories, a bit for each category.
    """

    table: Int32
    sets: Array

    @property
    def feature(self) -> Int32:
        """Feature of each column, int32 [columns]."""
        return self.table[:, 0]

    def __len__(self) -> int:
        return len(self.table)


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree; a tree of a single leaf has no splits.

    - `column` int32 [splits], `threshold` float32 [splits]: what a split compares.
    - `left`, `right` int32 [splits]: children; c ≥ 0 is a split, c < 0 the leaf ~c.
    - `value` float64 [leaves].
    """

    column: Int32
    threshold: Float32
    left: Int32
    right: Int32
    value: Float64

    @property
    def leaves(self) -> int:
        """Number of leaves."""
        return len(self.value)


@dataclass(frozen=True, slots=True)
class Forest:
    """A model of `width` features. The raw score of a row is the sum of its leaves' values, also in a random forest."""

    width: int
    columns: Columns
    trees: list[Tree]

    @property
    def leaves_max(self) -> int:
        """Number of leaves of the largest tree."""
        return max((tree.leaves for tree in self.trees), default=1)


def read_forest(model_text: bytes) -> Forest:
    """Read LightGBM's text format. Raises UnsupportedForestError unless the model is a sum of plain trees."""
    try:
        header, trees = _blocks(model_text.decode())
        if header.get("num_tree_per_iteration") != "1":
            raise UnsupportedForestError("it gives more than one score per row")
        width, table = int(header["max_feature_idx"]) + 1, _ColumnTable()
        forest = [_tree(fields, table) for fields in trees]
        columns = table.columns()
        if not ((columns.feature >= 0) & (columns.feature < width)).all():
            raise ValueError("a split has a feature that does not exist")
        return Forest(width, columns, forest)
    except (KeyError, ValueError, IndexError) as error:
        raise UnsupportedForestError(f"its text has an unknown form ({type(error).__name__}: {error})") from error


def _blocks(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The fields of the header and of each tree. A line without a value is a field with an empty value."""
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
    """Collects the columns that the splits need, without repetition."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, ColumnKind, bytes], int] = {}

    def number(self, feature: int, kind: ColumnKind, words: bytes = b"") -> int:
        return self._numbers.setdefault((feature, kind, words), len(self._numbers))

    def columns(self) -> Columns:
        table, sets = np.zeros((len(self._numbers), 4), np.int32), b""
        for (feature, kind, words), number in self._numbers.items():
            table[number] = feature, kind, len(sets) // 4, len(words) // 4
            sets += words
        return Columns(table, np.frombuffer(sets, np.uint32))


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
        raise UnsupportedForestError("it has thresholds that are not numbers")
    left, right = _numbers(fields, "left_child", np.int32), _numbers(fields, "right_child", np.int32)
    if {len(decisions), len(features), len(thresholds), len(left), len(right), len(value) - 1} != {leaves - 1}:
        raise ValueError("a tree's lists have different lengths")
    if not (np.sort(np.concatenate([left, right])) == np.delete(np.arange(-leaves, leaves - 1), leaves)).all():
        raise ValueError("a tree's children are not all of its leaves and splits, each once")
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
    """The words of each set of categories, as bytes."""
    if fields.get("num_cat", "0") == "0":
        return []
    bounds = _numbers(fields, "cat_boundaries", np.int64)
    words = _numbers(fields, "cat_threshold", np.uint32)
    return [words[start:end].tobytes() for start, end in itertools.pairwise(bounds)]


def _rounded_down(thresholds: Float64) -> Float32:
    """For each threshold, the largest float32 that does not exceed it."""
    with np.errstate(over="ignore"):
        near: Float32 = thresholds.astype(np.float32)
    above = near.astype(np.float64) > thresholds
    near[above] = np.nextafter(near[above], np.float32(-np.inf))
    return near


def _numbers(fields: Mapping[str, str], name: str, kind: type[np.number]) -> Array:
    return np.array(fields[name].split(" "), np.float64 if kind is np.float64 else np.int64).astype(kind)
