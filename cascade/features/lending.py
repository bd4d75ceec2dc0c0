"""Arrays that numba does not count references of.

A kernel's arrays belong to whoever calls it. Numba counts a reference at each call from function to function all the
same, in two atomic steps; those were a fifth of the time of a row of the feature engine.
"""

from __future__ import annotations

from typing import Any

from cascade.compilation import intrinsic


@intrinsic
def lent(typing: Any, array: Any) -> Any:
    """The same array without an owner, for as long as the caller of the kernel holds it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = context.make_array(signature.args[0])(context, builder, arguments[0])
        found.meminfo = found.meminfo.type(None)
        found.parent = found.parent.type(None)
        return found._getvalue()

    return array(array), generate
