"""A key field's arrays and numbers as one array of integers, which the kernels open as named tuples.

At each call numba looks at the type of each argument, and unpacks each array. A call takes 3.3 µs with 24 arrays, 6.6
with the same in a named tuple, and 0.6 with a handle; the kernel's work for a row takes about one. What a kernel opens
has no owner, so numba counts no references to it; these atomic instructions took a fifth of a row's time.

The functions that a row calls are inlined (`forceinline`). Otherwise numba would pass a tuple as its hundred numbers,
and look for the owner of each array again: a row took ten times as long.

A handle is int64 [fields, 4]: for each field of `KeyState`, `Program` and `Waiting` address and shape, or the number
itself. It is valid as long as the arrays exist and stay where they are; whoever has the handle has the arrays too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numba import carray, types

from cascade.columns import Array, Float64, Int64
from cascade.compilation import intrinsic, kernel
from cascade.features.layout import (
    EVENT_POOL,
    EVENTS,
    FRAUD_POOL,
    FRAUDS,
    REMOTE_POOL,
    REMOTES,
    KeyState,
    Pool,
    Program,
    State,
    Waiting,
)

_WORDS = 4
# Positions of the fields in a handle
(
    _TABLE,
    _SLOTS,
    _COUNTERS,
    _EVENT_BLOCKS,
    _FRAUD_BLOCKS,
    _REMOTE_BLOCKS,
    _TOTALS,
    _EDGES,
    _COLUMNS,
    _SEQUENCE_COLUMNS,
    _INPUTS,
    _TICKS_PER_UNIT,
    _FIRST_COLUMN,
    _HORIZON_MS,
    _KEPT,
    _EVENTS_PER_KEY_MAX,
    _HAS_LABELS,
    _HAS_SEQUENCE,
    _TOTALS_WIDTH,
    _TICKS_MAX,
    VISIBILITY,
    _EVENT,
    _STORED,
    _TICKS,
    _SUMS,
    _FRAUD_ROWS,
    _DISTINCT,
    _TAG_USES,
    _MATCHES,
    _SEEN,
    _REACH,
    _REACH_MAX,
    _ORDER,
    _FIRST_AGE_MS,
    _NEIGHBOURS,
    _REMOTE,
    _HIDDEN,
    _PLACES,
    _WRITTEN,
) = range(len(KeyState._fields) + len(Program._fields) + len(Waiting._fields))


def handle_of(state: KeyState, program: Program, waiting: Waiting) -> Int64:
    """Return the handle of a key field, int64 [fields, 4]. The arrays must be aligned and in C order."""
    return np.array([_words(field) for field in (*state, *program, *waiting)], np.int64)


def set_waiting(handle: Int64, waiting: Waiting) -> None:
    """Replace the arrays of `Waiting` in a handle."""
    handle[_HIDDEN : _HIDDEN + len(waiting)] = np.array([_words(field) for field in waiting], np.int64)


def _words(field: Array | int) -> Iterable[int]:
    words = [field.ctypes.data, *field.shape] if isinstance(field, np.ndarray) else [int(field)]
    return words + [0] * (_WORDS - len(words))


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """Return an address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@kernel(forceinline=True)
def _vector(handle: Int64, field: int) -> Int64:
    return carray(_pointer(handle[field, 0]), (handle[field, 1],), np.int64)


@kernel(forceinline=True)
def _matrix(handle: Int64, field: int) -> Int64:
    return carray(_pointer(handle[field, 0]), (handle[field, 1], handle[field, 2]), np.int64)


@kernel(forceinline=True)
def _float_matrix(handle: Int64, field: int) -> Float64:
    return carray(_pointer(handle[field, 0]), (handle[field, 1], handle[field, 2]), np.float64)


@kernel(forceinline=True)
def _pool(handle: Int64, field: int, chain: int, counters: int) -> Pool:
    singles, shorts = (handle[field, 1], 2 * handle[field, 2]), (handle[field, 1], 4 * handle[field, 2])
    return Pool(
        _matrix(handle, field),
        _float_matrix(handle, field),
        carray(_pointer(handle[field, 0]), singles, np.float32),
        carray(_pointer(handle[field, 0]), shorts, np.uint16),
        chain,
        counters,
    )


@kernel(forceinline=True)
def open_state(handle: Int64) -> State:
    """Return the state of a handle."""
    sequence_shape = (handle[_WRITTEN, 1], handle[_WRITTEN, 2], handle[_WRITTEN, 3])
    return State(
        carray(_pointer(handle[_TABLE, 0]), (handle[_TABLE, 1],), np.int32),
        _matrix(handle, _SLOTS),
        _vector(handle, _COUNTERS),
        _pool(handle, _EVENT_BLOCKS, EVENTS, EVENT_POOL),
        _pool(handle, _FRAUD_BLOCKS, FRAUDS, FRAUD_POOL),
        _pool(handle, _REMOTE_BLOCKS, REMOTES, REMOTE_POOL),
        _matrix(handle, _TOTALS),
        _float_matrix(handle, _TOTALS),
        Waiting(
            carray(_pointer(handle[_HIDDEN, 0]), (handle[_HIDDEN, 1],), np.bool_),
            _vector(handle, _PLACES),
            carray(_pointer(handle[_WRITTEN, 0]), sequence_shape, np.float32),
        ),
    )


@kernel(forceinline=True)
def open_program(handle: Int64) -> Program:
    """Return the program of a handle."""
    seen_shape = (handle[_SEEN, 1], handle[_SEEN, 2], handle[_SEEN, 3])
    return Program(
        _matrix(handle, _EDGES),
        _matrix(handle, _COLUMNS),
        _vector(handle, _SEQUENCE_COLUMNS),
        _vector(handle, _INPUTS),
        carray(_pointer(handle[_TICKS_PER_UNIT, 0]), (handle[_TICKS_PER_UNIT, 1],), np.float64),
        handle[_FIRST_COLUMN, 0],
        handle[_HORIZON_MS, 0],
        handle[_KEPT, 0],
        handle[_EVENTS_PER_KEY_MAX, 0],
        handle[_HAS_LABELS, 0] != 0,
        handle[_HAS_SEQUENCE, 0] != 0,
        handle[_TOTALS_WIDTH, 0],
        handle[_TICKS_MAX, 0],
        handle[VISIBILITY, 0],
        _vector(handle, _EVENT),
        _vector(handle, _STORED),
        _vector(handle, _TICKS),
        _matrix(handle, _SUMS),
        _vector(handle, _FRAUD_ROWS),
        _matrix(handle, _DISTINCT),
        _matrix(handle, _TAG_USES),
        _matrix(handle, _MATCHES),
        carray(_pointer(handle[_SEEN, 0]), seen_shape, np.int64),
        _vector(handle, _REACH),
        handle[_REACH_MAX, 0],
        _matrix(handle, _ORDER),
        _matrix(handle, _FIRST_AGE_MS),
        _matrix(handle, _NEIGHBOURS),
        _float_matrix(handle, _REMOTE),
    )
