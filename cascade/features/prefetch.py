"""Telling the processor which memory comes next, so that rows do not wait for it one after another.

A row's key, its slot and its blocks lie anywhere in some gigabytes: half a dozen misses of the cache in a row, each of
which needs the one before. The rows of a micro-batch are known beforehand, so their chains are begun while earlier rows
are worked on. A hint changes nothing but the time.

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

# So many rows ahead: the place in the index, the slot, and the newest block with neighbours and steps. From there on a
# row's chain is followed by a block a row.
INDEX_AHEAD, SLOT_AHEAD, BLOCK_AHEAD = 14, 11, 8
# Places for the rows that are on their way; a power of two.
CURSORS = 8
_LINE_BYTES = 64
_BYTE, _INT32 = ir.IntType(8), ir.IntType(32)
# llvm.prefetch: for reading, to be kept in all caches, data
_READ, _KEEP, _DATA = 0, 3, 1


@intrinsic
def _hint(typing: Any, array: Any, row: Any, column: Any) -> Any:
    """Ask for the line of `array[row, column]` (or `array[row]`) of an array in C order."""
    item_bytes = array.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = context.make_array(signature.args[0])(context, builder, arguments[0])
        stride = builder.extract_value(found.strides, 0)
        place = builder.add(builder.mul(arguments[1], stride), builder.mul(arguments[2], stride.type(item_bytes)))
        address = builder.gep(builder.bitcast(found.data, _BYTE.as_pointer()), [place])
        function_type = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        builder.call(function, [address, _INT32(_READ), _INT32(_KEEP), _INT32(_DATA)])
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), generate


@kernel
def begin(
    row: int, table: Array, slots: Int64, events: Int64, frauds: Int64, step_times: Int64, step_values: Float32,
    has_labels: bool, has_sequence: bool, keys: Int64, cursors: Int64,
) -> None:  # fmt: skip
    """Ask for what the rows after `row` will need, each step as soon as the one before has come.

    `cursors` int64 [CURSORS]: how far each row's chain was followed; zeros before the first row. A block that went to
    another chain meanwhile leads astray, to hints in vain.
    """
    rows, mask = len(keys), len(table) - 1
    ahead = row + INDEX_AHEAD
    if ahead < rows:
        _hint(table, home(keys[ahead], mask), 0)
    ahead = row + SLOT_AHEAD
    if ahead < rows:
        slot = table[home(keys[ahead], mask)]
        _hint(slots, slot, 0)
        _hint(slots, slot, 13)
    ahead = row + BLOCK_AHEAD
    if ahead < rows:
        # where another key has this key's place in the index, the hint is in vain
        slot = table[home(keys[ahead], mask)]
        _hint(slots, slots[slot, LESS_RECENT], 0)
        _hint(slots, slots[slot, MORE_RECENT], 0)
        newest, oldest = slots[slot, EVENTS + NEWEST], slots[slot, EVENTS + OLDEST]
        _hint(events, newest, 0)
        _hint(events, newest, TIMES + 2)
        _hint(events, newest, VALUES + 2)
        _hint(events, oldest, 0)
        if has_labels:
            _hint(frauds, slots[slot, FRAUDS + NEWEST], 0)
        if has_sequence:
            for line in range(0, step_times.shape[1] * 8, _LINE_BYTES):
                _hint(step_times, slot, line // 8)
            for line in range(0, step_values.shape[1] * step_values.shape[2] * 4, _LINE_BYTES):
                _hint(step_values, slot, line // 4)
        cursors[ahead & (CURSORS - 1)] = newest
    for ahead in range(row + 1, min(row + BLOCK_AHEAD, rows)):
        block = cursors[ahead & (CURSORS - 1)]
        if block:
            block = events[block, OLDER]
            cursors[ahead & (CURSORS - 1)] = block
            _hint(events, block, 0)
            _hint(events, block, TIMES + 2)
            _hint(events, block, VALUES + 2)
