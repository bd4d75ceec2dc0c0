"""Prefetching of the memory that the next rows need, while the kernel computes earlier ones.

A row's key, slot and blocks lie anywhere in some gigabytes: half a dozen cache misses, each of which needs the result
of the one before. The kernel has all rows of a micro-batch, so it starts the accesses of later rows early. Prefetches
affect the time only: without them a row takes 1.27 times as long (20,000 cards with 60 events each, by turns).

Source: Chen, Ailamaki, Gibbons, Mowry, "Improving hash join performance through prefetching", ICDE 2004 (software
pipelining).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cascade.columns import Int64
from cascade.compilation import intrinsic, kernel
from cascade.features.chains import home
from cascade.features.layout import (
    BLOCK,
    EDGE_AGE_MS,
    EDGE_OLDEST,
    EDGE_OLDEST_MS,
    EDGE_PLACE,
    EVENTS,
    FRAUDS,
    INPUT_TIMES,
    LESS_RECENT,
    MORE_RECENT,
    NEWEST,
    OLDEST,
    SLOT_WIDTH,
    TIMES,
    VALUES,
    Program,
    State,
)

# How many rows ahead the kernel prefetches the place in the index, the slot with its totals, and the blocks.
INDEX_AHEAD, SLOT_AHEAD, BLOCK_AHEAD = 14, 11, 8
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


@kernel(forceinline=True)
def prefetch_next_rows(state: State, program: Program, inputs: Int64, row: int, rows: int) -> None:
    """Prefetch what the rows after `row` need, each step when the memory of the step before has arrived.

    Arguments are those of `kernels.update`.
    """
    table, slots, events, totals = state.table, state.slots, state.events.blocks, state.totals
    mask, field = len(table) - 1, program.inputs[0]
    ahead = row + INDEX_AHEAD
    if ahead < rows:
        _prefetch(table, home(inputs[field, ahead], mask), 0)
    ahead = row + SLOT_AHEAD
    if ahead < rows:
        slot = table[home(inputs[field, ahead], mask)]
        _prefetch(slots, slot, 0)
        _prefetch(slots, slot, SLOT_WIDTH - 1)
        for column in range(0, totals.shape[1], _LINE_BYTES // 8):
            _prefetch(totals, slot, column)
    ahead = row + BLOCK_AHEAD
    if ahead < rows:
        # useless where another key has this key's place in the index
        slot = table[home(inputs[field, ahead], mask)]
        _prefetch(slots, slots[slot, LESS_RECENT], 0)
        _prefetch(slots, slots[slot, MORE_RECENT], 0)
        newest, oldest = slots[slot, EVENTS + NEWEST], slots[slot, EVENTS + OLDEST]
        _prefetch(events, newest, 0)
        _prefetch(events, newest, TIMES + 2)
        _prefetch(events, newest, VALUES + 2)
        _prefetch(events, oldest, 0)
        _prefetch(events, oldest, TIMES + 2)
        for edge in range(len(program.edges)):
            place = program.edges[edge, EDGE_PLACE]
            if (
                place
                and totals[slot, place + EDGE_OLDEST_MS]
                <= inputs[INPUT_TIMES, ahead] - program.edges[edge, EDGE_AGE_MS]
            ):
                block = totals[slot, place + EDGE_OLDEST] // BLOCK
                _prefetch(events, block, TIMES + 2)
                _prefetch(events, block, VALUES + 2)
        if program.has_labels:
            _prefetch(state.frauds.blocks, slots[slot, FRAUDS + NEWEST], 0)
        # the step fields, which the row writes
        for column in range(VALUES + BLOCK * (len(program.inputs) - 1), events.shape[1], BLOCK):
            _prefetch(events, newest, column + 2)
