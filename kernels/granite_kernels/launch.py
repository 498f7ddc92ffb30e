"""Host code that the Triton backends share: tiles, launches that can be recorded, registration with torch.library.

A launcher allocates its results and, if `launching` is true, launches its kernels. It is also the operation's fake: given
tensors without memory it only allocates. Under `recorded_launches` it records what it would launch, which is all that the
compile audit needs.
"""

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

# The architectures that have their own tiles. Every other chip gets the tiles of 80, which therefore fit in 99 KiB of shared
# memory, the least that a block can have from compute capability 8.0 on.
ARCHITECTURES = (80, 90, 100)
# Multiprocessors of an A100, of an H100 or H200, and of a B200.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class Tile:
    """A kernel's upper-case constants, the warps of a program, and the stages of its software pipeline."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Launch:
    """A recorded launch: everything that its compilation depends on. `early`: it may begin before the launch before it has ended."""

    kernel: Any
    grid: tuple[int, ...]
    tile: Tile
    arguments: Mapping[str, Any]
    early: bool = False


# The launchers of all registered operations, by name.
LAUNCHERS: dict[str, Callable[..., Any]] = {}

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Recording(threading.local):
    """This thread's recording. Another thread may be running the model at the same time."""

    launches: list[Launch] | None = None
    architecture: int | None = None


class _Chain(threading.local):
    """Whether this thread's launches may begin before the launch before them has ended."""

    early: bool = False


_recording, _chain = _Recording(), _Chain()


@contextmanager
def recorded_launches(architecture: int) -> Iterator[list[Launch]]:
    """In this block and thread, calls on meta or fake tensors record their launches, using the tiles of `architecture`."""
    before = _recording.launches, _recording.architecture
    _recording.launches, _recording.architecture = [], architecture
    try:
        yield _recording.launches
    finally:
        _recording.launches, _recording.architecture = before


@contextmanager
def early_launches() -> Iterator[None]:
    """In this block and thread, kernels with the constant PDL begin while the launch before them runs, on chips that can do so.

    They load their weights, and wait for that launch before they read or write anything else (`primitives.await_inputs`). So nothing
    that such a kernel reads before it waits may be written by a launch of the same block. This is programmatic dependent launch.
    """
    before, _chain.early = _chain.early, True
    try:
        yield
    finally:
        _chain.early = before


def recording() -> bool:
    """Whether this thread records launches. Tensors without memory are then treated as a GPU's."""
    return _recording.launches is not None


def launching(tensor: torch.Tensor) -> bool:
    """Whether a launcher given `tensor` should call `launch` after allocating its results."""
    return has_memory(tensor) or recording()


def has_memory(tensor: torch.Tensor) -> bool:
    """False for meta tensors, and for the fake tensors of torch.compile and FakeTensorMode."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def precompile(launches: Iterable[Launch], device: torch.device) -> None:
    """Compile the kernels of recorded launches for `device` in parallel, so that later calls find them compiled.

    Otherwise each kernel is compiled at its first launch, one after another.
    """
    by_kernel = defaultdict(list)
    for one in launches:
        by_kernel[one.kernel].append(one)

    def compile_kernel(launches: list[Launch]) -> None:
        with _current(device):
            for one in launches:  # Triton caches each specialisation
                # CPython 3.11.7 may fail to parse in two threads at once. Then the kernel is compiled at its first launch.
                with suppress(SystemError):
                    compiled(one)

    with ThreadPoolExecutor(thread_name_prefix="precompile") as pool:
        list(pool.map(compile_kernel, by_kernel.values()))


def compiled(one: Launch) -> Any:
    """Triton's compiled kernel of a recorded launch, for the current device. Triton keeps it in memory and on disk."""
    return one.kernel.warmup(grid=one.grid, **one.arguments, **one.tile.blocks, **_options(one.tile, one.early))


def architecture(device: torch.device) -> int:
    """The entry of ARCHITECTURES whose tiles a device uses; 80 for a CPU, whose interpreter runs any tile."""
    if _recording.architecture is not None:
        return _recording.architecture
    if device.type != "cuda":
        return 80
    return _architecture_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture_of(index: int) -> int:
    major, _ = torch.cuda.get_device_capability(index)
    return major * 10 if major * 10 in ARCHITECTURES else 80


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a device. While launches are recorded, that of the largest chip of the architecture; 4 for a CPU,
    so that each of few interpreted programs computes several tiles."""
    if _recording.architecture is not None:
        return MULTIPROCESSORS[_recording.architecture]
    if device.type != "cuda":
        return 4
    return _multiprocessors_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """Run `kernel` over `grid` on the device of its first tensor. `arguments` are all but the constants in `tile` and PDL."""
    first = next(tensor for tensor in map(_tensor_of, arguments.values()) if tensor is not None)
    early = False
    if "PDL" in kernel.arg_names:
        can_wait = architecture(first.device) >= 90
        tile = replace(tile, blocks={**tile.blocks, "PDL": int(can_wait)})
        early = can_wait and _chain.early
    if not has_memory(first):
        _recording.launches.append(Launch(kernel, grid, tile, arguments, early))
    elif 0 not in grid:
        with _current(first.device):
            kernel[grid](**arguments, **tile.blocks, **_options(tile, early))


def _tensor_of(argument: Any) -> torch.Tensor | None:
    """The tensor that an argument is or, if it is a tensor descriptor, describes."""
    return argument if isinstance(argument, torch.Tensor) else getattr(argument, "base", None)


def _options(tile: Tile, early: bool) -> dict[str, Any]:
    """Triton's options of a launch."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | ({"launch_pdl": True} if early else {})


def _current(device: torch.device) -> AbstractContextManager:
    """Makes `device` this thread's current device, for which Triton compiles and launches."""
    other = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if other else nullcontext()


def register(launcher: Callable[..., Any], mutates: tuple[str, ...] = ()) -> torch.library.CustomOpDef:
    """Registers `launcher` and its fake as the torch.library operation `granite_kernels::<its name>`, opaque to torch.compile.

    The schema comes from the launcher's annotations and the names of the arguments that it writes to. The caller adds gradients
    with `register_autograd`. The launcher itself is the operation's attribute `launcher`, for `Operation.run`.
    """
    name = f"granite_kernels::{launcher.__name__.strip('_')}"
    operation = torch.library.custom_op(name, launcher, mutates_args=mutates)
    operation.register_fake(launcher)
    operation.launcher = LAUNCHERS[name] = launcher
    return operation


def is_plain(tensors: Iterable[Any]) -> bool:
    """Whether a launcher may be called directly with these arguments: nothing would see the registered operation.

    False under a TorchDispatchMode or a transform of torch.func, and for subclasses of tensors, such as fake tensors.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(one) in _PLAIN or not isinstance(one, torch.Tensor) for one in tensors)
