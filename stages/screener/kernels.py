"""The kernels of the compiled screener.

QuickScorer follows no tree from root to leaf. A tree has a mask with a bit for each leaf. Each split whose threshold
the row exceeds clears the bits of the leaves on its left; the lowest remaining bit is the row's leaf. The splits of a
column are in order of their thresholds, so a column is done at the first threshold that no row exceeds. Each step
(compare, and, store) handles `LANES` rows at once, in vectors of that many lanes. They are wider than any register:
LLVM splits them into what the processor has (AVX-512, AVX2, SSE, NEON or scalar code).

Splits by category have no order. What all of a tree's splits by a feature leave of a mask depends on the category
alone, so it is a table, and a row takes a look-up for each such feature and tree, however many splits there are.

Walking serves for few rows, and for trees with more leaves than a mask has bits. `GROUP` trees take each step together,
so that the processor waits for all their loads at once.

Sources: Lucchese et al., "QuickScorer", SIGIR 2015; Lucchese et al., "Exploiting CPU SIMD extensions to speed-up
document scoring with tree ensembles", SIGIR 2016; Ye et al., "RapidScorer", KDD 2018.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from cascade.columns import Array, Float32, Float64, Int32, Int64
from cascade.compilation import intrinsic, kernel
from stages.screener.forest import ColumnKind

LANES = 32
GROUP = 16
# The kernels read and write vectors at multiples of this address.
ALIGNMENT_BYTES = 64
# LightGBM treats values up to this magnitude as zero.
ZERO_MAX = np.float32(1e-35)
# numba does not support IntEnum in compiled code
_NAN_LEFT, _NAN_RIGHT = int(ColumnKind.NAN_LEFT), int(ColumnKind.NAN_RIGHT)
_ZERO_LEFT, _ZERO_RIGHT = int(ColumnKind.ZERO_OR_NAN_LEFT), int(ColumnKind.ZERO_OR_NAN_RIGHT)
_NAN_ALONE, _ZERO_ALONE = int(ColumnKind.NAN_ALONE_RIGHT), int(ColumnKind.ZERO_OR_NAN_ALONE_RIGHT)
_CATEGORY = int(ColumnKind.CATEGORY)
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_BIT, _DOUBLE = ir.IntType(1), ir.DoubleType()


def _splat(builder: Any, value: Any) -> Any:
    """A vector with the value in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first_lane = builder.insert_element(undefined, value, _INT32(0))
    return builder.shuffle_vector(first_lane, undefined, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))


def _vector_at(builder: Any, pointer: Any, index: Any, element: Any) -> Any:
    """Pointer to a vector of an array, by the vector's index. `element`: type of the elements."""
    first = builder.gep(pointer, [builder.mul(index, _INT64(LANES))])
    return builder.bitcast(first, ir.VectorType(element, LANES).as_pointer())


@intrinsic
def _address(typing: Any, array: Any) -> Any:
    """Pointer to an array's first element."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_array(array)(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def _clear_leaves(typing: Any, values: Any, column: Any, threshold: Any, leaves: Any, tree: Any, cleared: Any) -> Any:
    """In the masks of the rows that exceed a threshold, clear bits. Returns whether any row exceeds it.

    - `values`, `column`: pointer to the columns' values, and the column to compare.
    - `leaves`, `tree`: pointer to the trees' masks, and the tree whose masks change.
    - `cleared`: the bits to clear.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, column, threshold, leaves, tree, cleared = arguments
        mask = cleared.type
        row_values = builder.load(_vector_at(builder, values, column, ir.FloatType()), align=ALIGNMENT_BYTES)
        exceeds = builder.fcmp_ordered(">", row_values, _splat(builder, threshold))
        place = _vector_at(builder, leaves, tree, mask)
        chosen = builder.and_(builder.sext(exceeds, ir.VectorType(mask, LANES)), _splat(builder, cleared))
        remaining = builder.and_(builder.load(place, align=ALIGNMENT_BYTES), builder.not_(chosen))
        builder.store(remaining, place, align=ALIGNMENT_BYTES)
        bits = ir.IntType(LANES)
        return builder.icmp_unsigned("!=", builder.bitcast(exceeds, bits), bits(0))

    return types.boolean(values, column, threshold, leaves, tree, cleared), generate


@intrinsic
def _add_leaves(typing: Any, leaves: Any, tree: Any, values: Any, first: Any, sums: Any) -> Any:
    """Add the value of each row's leaf, the lowest bit of its mask, to the row's sum.

    - `leaves`, `tree`: pointer to the trees' masks, and the tree.
    - `values`, `first`: pointer to the values of all leaves, and the position of the tree's first leaf.
    - `sums`: pointer to the rows' sums.
    """
    bits = leaves.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        leaves, tree, values, first, sums = arguments
        mask = ir.IntType(bits)
        vector = ir.VectorType(mask, LANES)
        name = f"llvm.cttz.v{LANES}i{bits}"
        count = builder.module.globals.get(name)
        if count is None:
            count = ir.Function(builder.module, ir.FunctionType(vector, [vector, _BIT]), name)
        remaining = builder.load(_vector_at(builder, leaves, tree, mask), align=ALIGNMENT_BYTES)
        lowest = builder.call(count, [remaining, _BIT(1)])
        start = builder.gep(values, [first])
        found = ir.Constant(ir.VectorType(_DOUBLE, LANES), ir.Undefined)
        for lane in range(LANES):
            position = builder.extract_element(lowest, _INT32(lane))
            position = position if bits == 64 else builder.zext(position, _INT64)
            value = builder.load(builder.gep(start, [position]))
            found = builder.insert_element(found, value, _INT32(lane))
        place = builder.bitcast(sums, found.type.as_pointer())
        builder.store(builder.fadd(builder.load(place, align=ALIGNMENT_BYTES), found), place, align=ALIGNMENT_BYTES)
        return context.get_dummy_value()

    return types.void(leaves, tree, values, first, sums), generate


@kernel
def _fill(rows: Float32, first: int, count: int, columns: Int32, sets: Array, compared: Float32) -> None:
    """Write what the splits compare to `compared` float32 [columns, lanes], for `count` rows from `first` on.

    Lanes without a row get minus infinity, which exceeds no threshold.
    """
    for column in range(len(columns)):
        feature, kind, start, words = columns[column, 0], columns[column, 1], columns[column, 2], columns[column, 3]
        for row in range(count):
            compared[column, row] = _as_compared(rows[first + row, feature], kind, start, words, sets)
        for row in range(count, compared.shape[1]):
            compared[column, row] = np.float32(-np.inf)


@kernel
def _as_compared(value: float, kind: int, start: int, words: int, sets: Array) -> float:
    """The value that a column of this ColumnKind has for a feature's value. `start`, `words`: see Columns."""
    if kind == _CATEGORY:
        return np.float32(0.0) if _is_member(value, start, words, sets) else np.float32(1.0)
    # a tuple, since numba would create a set at each call
    if kind in (_NAN_ALONE, _ZERO_ALONE):
        is_missing = np.isnan(value) or (kind == _ZERO_ALONE and abs(value) <= ZERO_MAX)
        return np.float32(1.0) if is_missing else np.float32(0.0)
    if abs(value) > ZERO_MAX:
        return value
    if kind == _ZERO_LEFT or (kind == _NAN_LEFT and np.isnan(value)):
        return np.float32(-np.inf)
    if kind == _ZERO_RIGHT or (kind == _NAN_RIGHT and np.isnan(value)):
        return np.float32(np.inf)
    return np.float32(0.0)


@kernel
def _find_categories(
    rows: Float32, first: int, count: int, category_feature: Int64, category_first: Int64, categories: Int64
) -> None:
    """Write which mask of `reachable` each lane has, for each of the features; `count` rows from `first` on."""
    for feature in range(len(category_feature)):
        start, other = category_first[feature], category_first[feature + 1] - 1
        for row in range(count):
            value = rows[first + row, category_feature[feature]]
            is_known = value > -1.0 and value < other - start
            categories[feature, row] = start + np.int64(value) if is_known else other
        for row in range(count, categories.shape[1]):
            categories[feature, row] = other


@kernel
def _is_member(value: float, start: int, words: int, sets: Array) -> bool:
    """Whether the category, which is the integer part of a value, is in a set."""
    if not (value > -1.0 and value < 32 * words):
        return False
    category = np.int64(value)
    return (sets[start + (category >> 5)] >> np.uint32(category & 31)) & np.uint32(1) != 0


@kernel
def quickscore(
    rows: Float32,
    sets: Array,
    columns: Int32,
    category_feature: Int64,
    category_first: Int64,
    block_segment: Int64,
    block_tree: Int64,
    segment_column: Int64,
    segment_split: Int64,
    threshold: Float32,
    tree: Int64,
    left_leaves: Array,
    reachable: Array,
    value: Float64,
    compared: Float32,
    leaves: Array,
    sums: Float64,
    categories: Int64,
    scores: Float64,
) -> None:
    """Write the scores of rows float32 [rows, width] to `scores` float64 [rows].

    - `sets`: see Columns.
    - `columns` to `value`: see MaskTables.
    - `compared` float32 [columns, LANES], `leaves` (masks) [trees of a block, LANES], `sums` float64 [LANES],
      `categories` int64 [features by category, LANES]: scratch memory, the first three aligned to ALIGNMENT_BYTES.
    """
    compared_at, value_at, leaves_at, sums_at = _address(compared), _address(value), _address(leaves), _address(sums)
    every_leaf = ~leaves.dtype.type(0)
    leaves_max = value.shape[1]
    for first in range(0, rows.shape[0], LANES):
        count = min(LANES, rows.shape[0] - first)
        _fill(rows, first, count, columns, sets, compared)
        _find_categories(rows, first, count, category_feature, category_first, categories)
        sums[:] = 0.0
        for block in range(len(block_tree) - 1):
            first_tree, trees = block_tree[block], block_tree[block + 1] - block_tree[block]
            leaves[:trees] = every_leaf
            for feature in range(len(category_feature)):
                for position in range(trees):
                    for lane in range(LANES):
                        leaves[position, lane] &= reachable[first_tree + position, categories[feature, lane]]
            for segment in range(block_segment[block], block_segment[block + 1]):
                column = segment_column[segment]
                for split in range(segment_split[segment], segment_split[segment + 1]):
                    if not _clear_leaves(
                        compared_at, column, threshold[split], leaves_at, tree[split], left_leaves[split]
                    ):
                        break
            for position in range(trees):
                _add_leaves(leaves_at, position, value_at, (first_tree + position) * leaves_max, sums_at)
        for row in range(count):
            scores[first + row] = sums[row]


@kernel
def walk(
    rows: Float32,
    columns: Int32,
    sets: Array,
    column: Int32,
    threshold: Float32,
    child: Int32,
    value: Float64,
    root: Int32,
    depth: Int32,
    compared: Float32,
    scores: Float64,
) -> None:
    """Write the scores of rows float32 [rows, width] to `scores` float64 [rows].

    - `columns`, `sets`: see `Columns.table`.
    - `column` to `depth`: see WalkTables.
    - `compared` float32 [columns, 1]: scratch memory.
    """
    node = np.empty(GROUP, np.int64)
    for row in range(rows.shape[0]):
        _fill(rows, row, 1, columns, sets, compared)
        total = 0.0
        for group in range(len(depth)):
            first = group * GROUP
            trees = min(GROUP, len(root) - first)
            for tree in range(trees):
                node[tree] = root[first + tree]
            for _ in range(depth[group]):
                for tree in range(trees):
                    at = node[tree]
                    node[tree] = child[2 * at + (compared[column[at], 0] > threshold[at])]
            for tree in range(trees):
                total += value[node[tree]]
        scores[row] = total
