"""Memory and functions of C code in kernels, by address: an argument, so that the compiled code can be cached."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cascade.compilation import intrinsic, kernel

WORD_BYTES, INT_BYTES = 8, 4
_BYTE, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_CLOCK_REALTIME = 0
# Of the result of a function that returns an int; the others are not defined.
INT_BITS = 0xFFFFFFFF


@intrinsic
def call(typing: Any, function: Any, arguments: Any) -> Any:
    """Call a C function by its address, with a tuple of integers and addresses; returns int64."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        passed = cgutils.unpack_tuple(builder, values[1])
        kind = ir.FunctionType(_INT64, [_INT64] * len(passed))
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), passed)

    return types.int64(types.int64, types.UniTuple(types.int64, len(arguments))), generate


def _place(builder: Any, values: Any, item: ir.IntType) -> Any:
    """Pointer to an item of an array, by the array's address and the item's index."""
    return builder.gep(builder.inttoptr(values[0], item.as_pointer()), [values[1]])


def _loads(item: ir.IntType) -> Any:
    def load(typing: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            found = builder.load(_place(builder, values, item))
            return found if item is _INT64 else builder.sext(found, _INT64)

        return types.int64(types.int64, types.int64), generate

    return load


def _stores(item: ir.IntType) -> Any:
    def store(typing: Any, address: Any, index: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            number = values[2] if item is _INT64 else builder.trunc(values[2], item)
            builder.store(number, _place(builder, values, item))
            return context.get_dummy_value()

        return types.none(types.int64, types.int64, types.int64), generate

    return store


# Items of arrays at an address, by index: words of eight bytes, ints of four, single bytes. Loading extends the sign.
load_word, load_int, load_byte = intrinsic(_loads(_INT64)), intrinsic(_loads(_INT32)), intrinsic(_loads(_BYTE))
store_word, store_byte = intrinsic(_stores(_INT64)), intrinsic(_stores(_BYTE))


@intrinsic
def add_word(typing: Any, address: Any, number: Any) -> Any:
    """Add to the eight bytes at an address, as one step for all threads; returns the sum."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], _INT64.as_pointer())
        return builder.add(builder.atomic_rmw("add", place, values[1], "seq_cst"), values[1])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def copy(typing: Any, target: Any, source: Any, octets: Any) -> Any:
    """Copy bytes from address to address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target, source = (builder.inttoptr(value, _BYTE.as_pointer()) for value in values[:2])
        cgutils.raw_memcpy(builder, target, source, values[2], 1)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


@intrinsic
def now_us(typing: Any) -> Any:
    """The time in µs since the epoch."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = cgutils.alloca_once(builder, _INT64, size=2)
        kind = ir.FunctionType(_INT32, [_INT32, _INT64.as_pointer()])
        clock = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(clock, [_INT32(_CLOCK_REALTIME), place])
        seconds, nanoseconds = (builder.load(builder.gep(place, [_INT32(index)])) for index in range(2))
        return builder.add(builder.mul(seconds, _INT64(1_000_000)), builder.sdiv(nanoseconds, _INT64(1_000)))

    return types.int64(), generate


@kernel
def text_octets(text: int) -> int:
    """The length of the text at an address, which a zero byte ends."""
    end = text
    while load_byte(end, 0):
        end += 1
    return end - text
