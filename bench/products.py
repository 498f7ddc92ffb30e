"""The matrix products of a run on a CPU: their FLOPs, and the time that they take alone."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Products"]

aten = torch.ops.aten
# Where the two factors are among the arguments.
FACTORS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
# Products with packed int8 weights: the rows are the first argument, and the weights are among the others.
PACKED = (
    torch.ops.onednn.qlinear_pointwise.default,
    torch.ops.quantized.linear_dynamic.default,
    torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default,
)
REPEATS = 5

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Products(TorchDispatchMode):
    """Counts the matrix products in its `with` block, by operation, shapes and strides; not those in fused attention or convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self._found: Counter[tuple[Any, tuple[Layout, ...]]] = Counter()
        self._packed: Counter[tuple[Any, tuple[int, ...], tuple[int, ...]]] = Counter()
        self._calls: dict[tuple[Any, tuple[int, ...], tuple[int, ...]], Callable[[], Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in FACTORS:
            tensors = args[: FACTORS[func] + 2]
            self._found[func, tuple((tuple(one.shape), tuple(one.stride()), one.dtype) for one in tensors)] += 1
        result = func(*args, **(kwargs or {}))
        if func in PACKED:
            key = func, tuple(args[0].shape), tuple(result.shape)
            self._packed[key] += 1
            # The layout of packed weights is the library's own, so the first ones of these shapes are used again.
            self._calls.setdefault(key, partial(func, *args, **(kwargs or {})))
        return result

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        total = sum(count * 2 * math.prod(rows) * out[-1] for (_, rows, out), count in self._packed.items())
        for (func, layouts), count in self._found.items():
            (a, *_), (b, *_) = layouts[FACTORS[func] :]
            total += count * 2 * math.prod(a) * b[-1]
        return total

    def seconds(self) -> float:
        """Time of all of them, each alone on inputs of the same shapes and strides: the shortest of several."""
        packed = sum(count * _shortest(self._calls[key]) for key, count in self._packed.items())
        return packed + sum(count * _shortest(_call(func, layouts)) for (func, layouts), count in self._found.items())


def _call(func: Any, layouts: tuple[Layout, ...]) -> Callable[[], Any]:
    tensors = [torch.empty_strided(shape, stride, dtype=dtype).normal_() for shape, stride, dtype in layouts]
    return partial(func, *tensors)


def _shortest(call: Callable[[], Any]) -> float:
    call()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
