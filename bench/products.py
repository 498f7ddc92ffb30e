"""The matrix products of a run on a CPU: their FLOPs, and the time that they take alone."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Products"]

aten = torch.ops.aten
# Where the two factors are among the arguments.
FACTORS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
REPEATS = 5

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class Products(TorchDispatchMode):
    """Counts the matrix products in its `with` block, by operation, shapes and strides; not those in fused attention or convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self._found: Counter[tuple[Any, tuple[Layout, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in FACTORS:
            tensors = args[: FACTORS[func] + 2]
            self._found[func, tuple((tuple(one.shape), tuple(one.stride()), one.dtype) for one in tensors)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        total = 0
        for (func, layouts), count in self._found.items():
            (a, *_), (b, *_) = layouts[FACTORS[func] :]
            total += count * 2 * torch.Size(a).numel() * b[-1]
        return total

    def seconds(self) -> float:
        """Time of all of them, each measured alone on random numbers of the same shapes and strides."""
        return sum(count * _median(_call(func, layouts)) for (func, layouts), count in self._found.items())


def _call(func: Any, layouts: tuple[Layout, ...]) -> Callable[[], Any]:
    tensors = [torch.empty_strided(shape, stride, dtype=dtype).normal_() for shape, stride, dtype in layouts]
    return lambda: func(*tensors)


def _median(call: Callable[[], Any]) -> float:
    call()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
