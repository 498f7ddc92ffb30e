"""What is measured side by side on a CPU: this package and transformers in their dtypes, and how their times are taken and compared."""

import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from granite_kernels.cpu import has_bfloat16

__all__ = ["OURS", "REFERENCES", "SYSTEMS", "compared", "error", "fastest", "seconds_in_turns", "torch_dtype"]

OURS = ("ours float32", "ours bfloat16", "ours int8")
REFERENCES = ("transformers float32", "transformers bfloat16")
SYSTEMS = OURS + REFERENCES


def fastest() -> str:
    """The dtype that multiplies fastest on this processor: "bfloat16" or "float32"."""
    return "bfloat16" if has_bfloat16() else "float32"


def torch_dtype(system: str) -> torch.dtype:
    """Of a system's activations. With int8 weights they have the fastest dtype."""
    name = system.rpartition(" ")[2]
    return getattr(torch, fastest() if name == "int8" else name)


def seconds_in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    Args:
        calls: made once before, so that none is slow the first time.
        rounds: each begins with another call, and every second one runs backwards, so that no call always finds the caches and the
            allocator as the same other call left them.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        order = names[first:] + names[:first]
        for name in order if number % 2 else reversed(order):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(seconds: dict[str, list[float]], against: Collection[str] = REFERENCES) -> dict[str, Any]:
    """Median seconds of each system, and how many times as fast as each of `against` it is: of every round, and their median."""
    ratios = {
        name: {
            reference: [theirs / mine for mine, theirs in zip(taken, seconds[reference], strict=True)]
            for reference in against
            if reference != name
        }
        for name, taken in seconds.items()
    }
    return {
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "speedup": {name: {one: statistics.median(values) for one, values in each.items()} for name, each in ratios.items()},
        "ratios": {name: {one: [round(value, 4) for value in values] for one, values in each.items()} for name, each in ratios.items()},
    }


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm())
