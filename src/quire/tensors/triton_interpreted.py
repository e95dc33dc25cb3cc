"""Products of tiles in Triton's interpreter, whose bits for a row do not depend on where in a tile the row is.

The interpreter multiplies by numpy's matmul, so by a BLAS. OpenBLAS's kernels for CPUs with AVX2 alone (Haswell, Zen) add up a row in another order
at the end of a tile than at its beginning, and one token's logits would depend on what else is in the batch. numpy's own loops treat all rows alike.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from triton.runtime import interpreter

_create_dot: Final = interpreter.InterpreterBuilder.create_dot


def multiply(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """a [..., m, k] times b [..., k, n], of floats, in fp32."""
    product: np.ndarray[Any, Any] = np.einsum("...mk,...kn->...mn", a.astype(np.float32, copy=False), b.astype(np.float32, copy=False))
    return product


def _dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
    narrow = a.dtype.primitive_bitwidth == 8 or b.dtype.primitive_bitwidth == 8
    if narrow or d.data.dtype != np.float32:
        return _create_dot(self, a, b, d, *precision)
    return interpreter.TensorHandle(multiply(a.data, b.data) + d.data, d.dtype.scalar)


def multiply_rows_alike() -> None:
    """Have the interpreter multiply so, in this process. Twice is once."""
    interpreter.InterpreterBuilder.create_dot = _dot
