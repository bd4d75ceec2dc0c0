"""Prefetching of the memory that the next rows need, while the kernel computes earlier ones.

A row's key, slot and blocks lie anywhere in some gigabytes: half a dozen cache misses, each of which needs the result
of the one before. The kernel has all rows of a micro-batch, so it starts the accesses of later rows early. Prefetches
affect the time only.

Source: Chen, Ailamaki, Gibbons, Mowry, "Improving hash join performance through prefetching", ICDE 2004 (software
pipelining).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cascade.columns import Array, Float32, Int64
from cascade.compilation import intrinsic, kernel
from cascade.features.chains import home
from cascade.features.layout import (
    EVENTS,
    FRAUDS,
    LESS_RECENT,
    MORE_RECENT,
    NEWEST,
    OLDER,
    OLDEST,
    TIMES,
    VALUES,
)

# How many rows ahead the kernel prefetches the place in the index, the slot, and the newest block with neighbours and
# steps. From there on it follows the row's chain by one block at each row.
INDEX_AHEAD, SLOT_AHEAD, BLOCK_AHEAD = 14, 11, 8
# A power of two, at least BLOCK_AHEAD.
CURSORS = 8
_LINE_BYTES = 64
_BYTE, _INT32 = ir.IntType(8), ir.IntType(32)
# Arguments of llvm.prefetch: for reading, into all levels of the cache, data.
_READ, _ALL_LEVELS, _DATA = 0, 3, 1


@intrinsic
def _prefetch(typing: Any, array: Any, row: Any, column: Any) -> Any:
    """Prefetch the cache line of `array[row, column]` (or `array[row]`) of an array in C order."""
    item_bytes = array.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = context.make_array(signature.args[0])(context, builder, arguments[0])
        stride = builder.extract_value(found.strides, 0)
        place = builder.add(builder.mul(arguments[1], stride), builder.mul(arguments[2], stride.type(item_bytes)))
        address = builder.gep(builder.bitcast(found.data, _BYTE.as_pointer()), [place])
        function_type = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        builder.call(function, [address, _INT32(_READ), _INT32(_ALL_LEVELS), _INT32(_DATA)])
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), generate


@kernel
def prefetch_next_rows(
    row: int,
    table: Array,
    slots: Int64,
    events: Int64,
    frauds: Int64,
    step_times: Int64,
    step_values: Float32,
    has_labels: bool,
    has_sequence: bool,
    keys: Int64,
    cursors: Int64,
) -> None:
    """Prefetch what the rows after `row` need, each step when the memory of the step before has arrived.

    Arguments are those of `kernels.update`, and `cursors` int64 [CURSORS]: the block at which the kernel has arrived in
    each row's chain, zeros before the first row. A block that has moved to another chain leads to useless prefetches.
    """
    rows, mask = len(keys), len(table) - 1
    ahead = row + INDEX_AHEAD
    if ahead < rows:
        _prefetch(table, home(keys[ahead], mask), 0)
    ahead = row + SLOT_AHEAD
    if ahead < rows:
        slot = table[home(keys[ahead], mask)]
        _prefetch(slots, slot, 0)
        _prefetch(slots, slot, 13)
    ahead = row + BLOCK_AHEAD
    if ahead < rows:
        # useless where another key has this key's place in the index
        slot = table[home(keys[ahead], mask)]
        _prefetch(slots, slots[slot, LESS_RECENT], 0)
        _prefetch(slots, slots[slot, MORE_RECENT], 0)
        newest, oldest = slots[slot, EVENTS + NEWEST], slots[slot, EVENTS + OLDEST]
        _prefetch(events, newest, 0)
        _prefetch(events, newest, TIMES + 2)
        _prefetch(events, newest, VALUES + 2)
        _prefetch(events, oldest, 0)
        if has_labels:
            _prefetch(frauds, slots[slot, FRAUDS + NEWEST], 0)
        if has_sequence:
            for line in range(0, step_times.shape[1] * 8, _LINE_BYTES):
                _prefetch(step_times, slot, line // 8)
            for line in range(0, step_values.shape[1] * step_values.shape[2] * 4, _LINE_BYTES):
                _prefetch(step_values, slot, line // 4)
        cursors[ahead & (CURSORS - 1)] = newest
    for ahead in range(row + 1, min(row + BLOCK_AHEAD, rows)):
        block = cursors[ahead & (CURSORS - 1)]
        if block:
            block = events[block, OLDER]
            cursors[ahead & (CURSORS - 1)] = block
            _prefetch(events, block, 0)
            _prefetch(events, block, TIMES + 2)
            _prefetch(events, block, VALUES + 2)
