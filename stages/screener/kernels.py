"""The inner loops of the compiled screener, compiled by numba for the processor that it runs on.

QuickScorer: nobody walks a tree. Each split whose threshold a row exceeds strikes out the leaves on its left, a bit
each; what is left lowest is the leaf. With thresholds in order a column's splits are done at the first one that no row
exceeds. The step is compare, and, store over `LANES` rows abreast. It is written in vectors of that many lanes, wider
than any register: LLVM cuts them into what the processor has, AVX-512, AVX2, SSE or NEON, or plain code.

Walking: for few rows, and for trees of more leaves than a mask has bits. `GROUP` trees at a time take each step
together, so that the processor waits for all their loads at once.

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
# Vectors are read from and written to addresses that are multiples of this.
ALIGNMENT_BYTES = 64
# What LightGBM takes for zero, in every feature of a row.
ZERO_MAX = np.float32(1e-35)
# numba knows no enumerations of ours
_NAN_LEFT, _NAN_RIGHT = int(ColumnKind.NAN_LEFT), int(ColumnKind.NAN_RIGHT)
_ZERO_LEFT, _ZERO_RIGHT = int(ColumnKind.ZERO_OR_NAN_LEFT), int(ColumnKind.ZERO_OR_NAN_RIGHT)
_NAN_ALONE, _ZERO_ALONE = int(ColumnKind.NAN_ALONE_RIGHT), int(ColumnKind.ZERO_OR_NAN_ALONE_RIGHT)
_CATEGORY = int(ColumnKind.CATEGORY)
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_BIT, _DOUBLE = ir.IntType(1), ir.DoubleType()


def _splat(builder: Any, value: Any) -> Any:
    """A vector with the value in every lane."""
    kind = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT32(0))
    lanes = ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), lanes)


def _vector_at(builder: Any, pointer: Any, vector: Any, kind: Any) -> Any:
    """Pointer to the vector-th vector of an array."""
    first = builder.gep(pointer, [builder.mul(vector, _INT64(LANES))])
    return builder.bitcast(first, ir.VectorType(kind, LANES).as_pointer())


@intrinsic
def _address(typing: Any, array: Any) -> Any:
    """Pointer to an array's first element."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_array(array)(context, builder, arguments[0]).data

    return types.CPointer(array.dtype)(array), generate


@intrinsic
def _strike_out(typing: Any, values: Any, column: Any, threshold: Any, leaves: Any, tree: Any, ruled_out: Any) -> Any:
    """Where a column's rows exceed the threshold, strike leaves of a tree out; whether any row did."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, column, threshold, leaves, tree, ruled_out = arguments
        mask = ruled_out.type
        row_values = builder.load(_vector_at(builder, values, column, ir.FloatType()), align=ALIGNMENT_BYTES)
        exceeds = builder.fcmp_ordered(">", row_values, _splat(builder, threshold))
        place = _vector_at(builder, leaves, tree, mask)
        chosen = builder.and_(builder.sext(exceeds, ir.VectorType(mask, LANES)), _splat(builder, ruled_out))
        left = builder.and_(builder.load(place, align=ALIGNMENT_BYTES), builder.not_(chosen))
        builder.store(left, place, align=ALIGNMENT_BYTES)
        bits = ir.IntType(LANES)
        return builder.icmp_unsigned("!=", builder.bitcast(exceeds, bits), bits(0))

    return types.boolean(values, column, threshold, leaves, tree, ruled_out), generate


@intrinsic
def _add_leaves(typing: Any, leaves: Any, tree: Any, values: Any, first: Any, sums: Any) -> Any:
    """Add to each row's sum the value of its lowest leaf that is left; `first`: where the tree's values begin."""
    bits = leaves.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        leaves, tree, values, first, sums = arguments
        mask = ir.IntType(bits)
        kind = ir.VectorType(mask, LANES)
        name = f"llvm.cttz.v{LANES}i{bits}"
        count = builder.module.globals.get(name)
        if count is None:
            count = ir.Function(builder.module, ir.FunctionType(kind, [kind, _BIT]), name)
        left = builder.load(_vector_at(builder, leaves, tree, mask), align=ALIGNMENT_BYTES)
        lowest = builder.call(count, [left, _BIT(1)])
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
def _fill(
    rows: Float32, first: int, here: int, feature: Int32, kind: Int32, set_start: Int32, set_words: Int32, sets: Array,
    compared: Float32,
) -> None:  # fmt: skip
    """What each column holds of some rows; minus infinity, which exceeds nothing, in lanes without a row."""
    for column in range(len(feature)):
        source, how, start, words = feature[column], kind[column], set_start[column], set_words[column]
        for row in range(here):
            compared[column, row] = _as_compared(rows[first + row, source], how, start, words, sets)
        for row in range(here, compared.shape[1]):
            compared[column, row] = np.float32(-np.inf)


@kernel
def _as_compared(value: float, how: int, start: int, words: int, sets: Array) -> float:
    """A value as a column of the kind `how` holds it."""
    if how == _CATEGORY:
        return np.float32(0.0) if _is_member(value, start, words, sets) else np.float32(1.0)
    # numba makes a set anew each time, but not a tuple
    if how in (_NAN_ALONE, _ZERO_ALONE):
        is_missing = np.isnan(value) or (how == _ZERO_ALONE and abs(value) <= ZERO_MAX)
        return np.float32(1.0) if is_missing else np.float32(0.0)
    if abs(value) > ZERO_MAX:
        return value
    if how == _ZERO_LEFT or (how == _NAN_LEFT and np.isnan(value)):
        return np.float32(-np.inf)
    if how == _ZERO_RIGHT or (how == _NAN_RIGHT and np.isnan(value)):
        return np.float32(np.inf)
    return np.float32(0.0)


@kernel
def _is_member(value: float, start: int, words: int, sets: Array) -> bool:
    """Whether the category, a value without what follows its point, is in a set."""
    if not (value > -1.0 and value < 32 * words):
        return False
    category = np.int64(value)
    return (sets[start + (category >> 5)] >> np.uint32(category & 31)) & np.uint32(1) != 0


@kernel
def quickscore(
    rows: Float32, feature: Int32, kind: Int32, set_start: Int32, set_words: Int32, sets: Array,
    block: Int64, tree_block: Int64, column: Int64, start: Int64, threshold: Float32, tree: Int64, ruled_out: Array,
    value: Float64, compared: Float32, leaves: Array, sums: Float64, scores: Float64,
) -> None:  # fmt: skip
    """Scores of rows float32 [rows, width] into `scores` float64 [rows]; see MaskTables and Columns for the rest.

    Scratch: `compared` float32 [columns, LANES], `leaves` of the masks' dtype [trees of a block, LANES], `sums` float64
    [LANES], all aligned to ALIGNMENT_BYTES.
    """
    lanes, values, all_sums = _address(compared), _address(value), _address(sums)
    masks = _address(leaves)
    every_leaf = ~leaves.dtype.type(0)
    leaves_max = value.shape[1]
    for first in range(0, rows.shape[0], LANES):
        here = min(LANES, rows.shape[0] - first)
        _fill(rows, first, here, feature, kind, set_start, set_words, sets, compared)
        sums[:] = 0.0
        for part in range(len(block) - 1):
            trees_first, trees_here = tree_block[part], tree_block[part + 1] - tree_block[part]
            leaves[:trees_here] = every_leaf
            for segment in range(block[part], block[part + 1]):
                for split in range(start[segment], start[segment + 1]):
                    if not _strike_out(lanes, column[segment], threshold[split], masks, tree[split], ruled_out[split]):
                        break
            for one in range(trees_here):
                _add_leaves(masks, one, values, (trees_first + one) * leaves_max, all_sums)
        for row in range(here):
            scores[first + row] = sums[row]


@kernel
def walk(
    rows: Float32, feature: Int32, kind: Int32, set_start: Int32, set_words: Int32, sets: Array,
    column: Int32, threshold: Float32, child: Int32, value: Float64, root: Int32, depth: Int32,
    compared: Float32, scores: Float64,
) -> None:  # fmt: skip
    """Scores of rows float32 [rows, width] into `scores` float64 [rows]; see WalkTables and Columns for the rest.

    Scratch: `compared` float32 [columns, 1].
    """
    at = np.empty(GROUP, np.int64)
    for row in range(rows.shape[0]):
        _fill(rows, row, 1, feature, kind, set_start, set_words, sets, compared)
        total = 0.0
        for group in range(len(depth)):
            first = group * GROUP
            here = min(GROUP, len(root) - first)
            for one in range(here):
                at[one] = root[first + one]
            for _ in range(depth[group]):
                for one in range(here):
                    node = at[one]
                    at[one] = child[2 * node + (compared[column[node], 0] > threshold[node])]
            for one in range(here):
                total += value[at[one]]
        scores[row] = total
