"""What the Triton halves share on the host: tiles, launches that can be recorded, and the registration with torch.library.

A launcher allocates its results and, where `launching()` says so, launches. The same function is the operation's fake: with
tensors that hold no values it allocates and launches nothing. Under `recorded_launches` it notes what it would launch, which
is all that the compile audit needs to know of an operation.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

# The architectures that have tiles of their own. Every other chip gets those of 80, which therefore fit into 99 KiB of
# shared memory, the least that a block can have from compute capability 8.0 on.
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: its upper-case constants, the warps of a program, the depth of its software pipeline."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded instead of made: everything that its compilation depends on."""

    kernel: Any
    grid: tuple[int, ...]
    tile: Tile
    arguments: Mapping[str, Any]


class _Mode:
    """What `launch` does now. Not a context variable: fakes run in the thread that traces, one at a time."""

    recorded: list[Launch] | None = None
    architecture: int | None = None
    silent = False


@contextmanager
def recorded_launches(architecture: int) -> Iterator[list[Launch]]:
    """Within it, calls on meta tensors record their launches, with the tiles of `architecture`."""
    before = _Mode.recorded, _Mode.architecture
    _Mode.recorded, _Mode.architecture = [], architecture
    try:
        yield _Mode.recorded
    finally:
        _Mode.recorded, _Mode.architecture = before


def launching() -> bool:
    """Whether a launcher should go on from allocating its results to launching: not while it serves as a fake."""
    return not _Mode.silent


def architecture(device: torch.device) -> int:
    """The entry of ARCHITECTURES whose tiles a device gets; under the interpreter, which takes any tile, that of 80."""
    if _Mode.architecture is not None:
        return _Mode.architecture
    if device.type != "cuda":
        return 80
    return _architecture_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture_of(index: int) -> int:
    major, _ = torch.cuda.get_device_capability(index)
    return major * 10 if major * 10 in ARCHITECTURES else 80


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """Run `kernel` over `grid`, on the device of its first tensor. `arguments` are all the kernel's but those of the tile."""
    if _Mode.recorded is not None:
        _Mode.recorded.append(Launch(kernel, grid, tile, arguments))
    elif 0 not in grid:
        device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
        other = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if other else nullcontext():
            kernel[grid](**arguments, **tile.blocks, num_warps=tile.num_warps, num_stages=tile.num_stages)


def register(launcher: Callable[..., Any]) -> torch.library.CustomOpDef:
    """The torch.library operation `granite_kernels::<name of the launcher>`, opaque to torch.compile; the launcher is its own fake.

    The schema is read from the annotations. Gradients are the caller's to add, with `register_autograd`.
    """

    @functools.wraps(launcher)
    def fake(*args: Any, **kwargs: Any) -> Any:
        before, _Mode.silent = _Mode.silent, _Mode.recorded is None
        try:
            return launcher(*args, **kwargs)
        finally:
            _Mode.silent = before

    operation = torch.library.custom_op(f"granite_kernels::{launcher.__name__.strip('_')}", launcher, mutates_args=())
    operation.register_fake(fake)
    return operation
