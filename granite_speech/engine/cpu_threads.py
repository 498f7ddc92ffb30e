"""OpenMP threads on a CPU: the engine's worker is the only thread that should have a team.

GNU OpenMP gives each thread that calls PyTorch a team of its own. With more threads in all teams than cores, it no longer waits for
them by spinning, and every operation in parallel waits for the kernel to wake them: with 2 cores, that made an engine three times
slower. So a caller's thread prepares its requests without a team.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

__all__ = ["without_team"]

_SOFT = 1  # omp_pause_soft: threads are released, settings are kept


@contextmanager
def without_team() -> Iterator[None]:
    """Run a block in this thread alone, and release the threads that have worked for it. Does nothing without GNU OpenMP."""
    openmp = _gnu_openmp()
    if openmp is None:
        yield
        return
    before = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)  # of this thread; torch.set_num_threads would change the worker's products too
    try:
        yield
    finally:
        openmp.omp_pause_resource_all(_SOFT)
        openmp.omp_set_num_threads(before)


@cache
def _gnu_openmp() -> ctypes.CDLL | None:
    """The library that PyTorch has loaded."""
    package = Path(torch.__file__).parent
    for file in (*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")):
        library = ctypes.CDLL(str(file))
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None
