"""A stand-in for `torch.cuda.CUDAGraph` on the CPU, stricter than the real one: what a capture must not do raises.

    graph = capture(step, persistent=lambda: tensors_of(model, state))
    graph.replay()

A capture runs the function once under a mode that records every operation with its tensors, and puts back what the function wrote
to outside memory: on a GPU a capture executes nothing. A replay runs the recorded operations again, in order and on the same memory.
Before that, all memory that the capture allocated is filled with garbage. So a function that depends on something computed by the
host, or left by an earlier run, gives a wrong result.

An operation of `granite_kernels` is recorded as one call if it is the registered one: set GRANITE_SPEECH_KERNELS=triton. The
references read lengths on the host, which raises.
"""

import linecache
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bench.device_rules import INDEXING, READS, ROOT
from granite_speech.modules.side_by_side import padded_rows, side_by_side

__all__ = ["CaptureError", "FakeCapture", "FakeGraph", "capture", "tensors_of"]

Held = Callable[[], Iterable[Tensor]]
aten = torch.ops.aten

# Allocations of memory that nothing has written to: a replay leaves the garbage there.
_EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# These read CPU memory without an operation that a dispatch mode sees.
_READ_BY_PYTHON = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class CaptureError(AssertionError):
    """A graph cannot do this. Not a RuntimeError, after which the engine would go on without graphs and hide the fault."""


@dataclass(frozen=True)
class _Operation:
    """One recorded call: `results` are its outputs that are new memory, by their place among the flattened outputs."""

    func: Any
    args: tuple
    kwargs: Mapping[str, Any]
    results: Mapping[int, Tensor]
    line: str

    def run(self) -> None:
        outputs = pytree.tree_leaves(self.func(*self.args, **self.kwargs))
        for place, recorded in self.results.items():
            if outputs[place].shape != recorded.shape:
                raise CaptureError(f"{self}: shape {tuple(outputs[place].shape)} at replay, {tuple(recorded.shape)} at capture")
            recorded.copy_(outputs[place])

    def __str__(self) -> str:
        return f"{self.func} in {self.line}"


class FakeGraph:
    """What `capture` recorded.

    Attributes:
        operations: the recorded calls, in order.
        replays: how often it was replayed.
    """

    def __init__(self, recorder: "_Recorder", held: Held | None):
        self.operations, self.replays = recorder.operations, 0
        self._allocated, self._outside, self._held = recorder.allocated, recorder.outside, held

    @torch.inference_mode()  # which allows in-place writes to tensors made with or without it
    def replay(self) -> None:
        """Run the recorded operations again.

        Raises:
            CaptureError: outside memory that the graph uses is no longer among the persistent tensors, or a shape has changed.
        """
        if self._held is not None:
            held = _storages(self._held())
            for storage, operation in self._outside.items():
                if storage not in held:
                    raise CaptureError(f"{operation}: uses memory that was persistent at capture and is not any more")
        for one in self._allocated:
            _fill_with_garbage(one)
        for operation in self.operations:
            if operation.func not in _EMPTY:
                operation.run()
        self.replays += 1


class FakeCapture:
    """In the place of `CudaCapture`, on the CPU: `model.runtime.make_capture = lambda device: FakeCapture(persistent)`.

    Args:
        persistent: as for `capture`.

    Attributes:
        graphs: those that it made, in order. Some may have been dropped since.
    """

    def __init__(self, persistent: Held | None = None):
        self.graphs: list[FakeGraph] = []
        self._persistent = persistent

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run `function` once, then capture it; the result replays it.

        Raises:
            CaptureError: as `capture` does.
        """
        with torch.no_grad():
            function()
            graph = capture(function, self._persistent)
        self.graphs.append(graph)
        return graph.replay

    @property
    def replays(self) -> int:
        """Of all graphs."""
        return sum(one.replays for one in self.graphs)


def capture(body: Callable[[], Any], persistent: Iterable[Tensor] | Held | None = None) -> FakeGraph:
    """Record what `body` does to tensors. Outside memory is afterwards as before, and memory that `body` allocated is garbage.

    Args:
        body: called once. Whatever it creates lazily and keeps must exist before, as after a warm-up.
        persistent: the tensors that stay where they are while the graph is in use: state, weights, buffers (see `tensors_of`). Any
            other outside memory may be used for something else by then, and using it raises. A function is asked again at each
            replay, which finds tensors that were replaced after the capture. None: all outside memory may be used.

    Raises:
        CaptureError: `body` reads a value on the host, takes values from it, draws random numbers, changes a tensor's shape in
            place or uses memory that is neither persistent nor allocated in the capture. Names the operation and the line.
    """
    held = persistent
    if persistent is not None and not callable(persistent):
        kept = list(persistent)
        held = lambda: kept  # noqa: E731
    recorder = _Recorder(None if held is None else _storages(held()))
    try:
        with _RefuseReadsByPython(), recorder:
            body()
    finally:
        recorder.undo()
    return FakeGraph(recorder, held)


def tensors_of(*owners: Any) -> list[Tensor]:
    """The tensors that the owners keep: parameters, buffers and attributes of modules and of this project's objects, and what is
    in lists, tuples and dictionaries, all recursively."""
    found: list[Tensor] = []
    seen: set[int] = set()

    def visit(owner: Any) -> None:
        if isinstance(owner, Tensor):
            found.append(owner)
        elif id(owner) not in seen:
            seen.add(id(owner))
            for part in _parts(owner):
                visit(part)

    for one in owners:
        visit(one)
    # Weights that lie side by side are used as one matrix, which is a view of the memory that they share.
    weights = [one for one in found if isinstance(one, nn.Parameter) and one.dim() in (1, 2)]
    common = [view for one in weights for view in (side_by_side(one), padded_rows(one)) if view is not None]
    return found + common


def _parts(owner: Any) -> Iterator[Any]:
    if isinstance(owner, Mapping):
        yield from owner.values()
    elif isinstance(owner, (list, tuple)):
        yield from owner
    elif isinstance(owner, nn.Module) or type(owner).__module__.partition(".")[0] == "granite_speech":
        yield from getattr(owner, "__dict__", {}).values()


class _RefuseReadsByPython(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in _READ_BY_PYTHON:
            raise CaptureError(f"{func.__name__} in {_line()}: reads a value on the host")
        if func is Tensor.__setitem__ and isinstance(args[2], (bool, int, float)):
            # On a GPU the number is an argument of a kernel. On a CPU it would arrive as a tensor made by the host.
            args = (*args[:2], args[0].new_full((), args[2]))
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Records operations, and refuses those that a graph cannot do.

    Attributes:
        operations: recorded calls; views are not among them.
        allocated: results in new memory.
        outside: the first operation that used each storage not allocated here.
    """

    def __init__(self, persistent: dict[int, Tensor] | None):
        super().__init__()
        self.operations: list[_Operation] = []
        self.allocated: list[Tensor] = []
        self.outside: dict[int, _Operation] = {}
        self._own: set[int] = set()
        self._persistent = persistent
        self._before: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}  # outside memory before it was written to

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.set_.source_Storage_storage_offset and not args[0].numel():
            return func(*args, **kwargs)  # how a view of other memory is made: nothing runs on a device
        if reason := _refusal(func, args, kwargs):
            raise CaptureError(f"{func} in {_line()}: {reason}")
        given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        inputs = _storages(given)
        self._keep_outside(_written(func, args, kwargs))
        with torch._C.DisableTorchFunction():  # the insides of an operation may read what they like
            out = func(*args, **kwargs)
        results = {
            place: one
            for place, one in enumerate(pytree.tree_leaves(out))
            if isinstance(one, Tensor) and _storage(one) not in inputs and one.numel()
        }
        if results or func._schema.is_mutable:
            self._record(_Operation(func, args, kwargs, results, _line()), inputs)
        return out

    def _record(self, operation: _Operation, inputs: dict[int, Tensor]) -> None:
        for storage in inputs.keys() - self._own:
            if self._persistent is not None and storage not in self._persistent:
                raise CaptureError(f"{operation}: uses memory that is neither persistent nor allocated in this capture")
            self.outside.setdefault(storage, operation)
        self.operations.append(operation)
        self.allocated += operation.results.values()
        self._own |= _storages(operation.results.values()).keys()
        if operation.func in _EMPTY:
            for one in operation.results.values():
                _fill_with_garbage(one)

    def _keep_outside(self, written: list[Tensor]) -> None:
        for storage, tensor in _storages(written).items():
            if storage not in self._own and storage not in self._before:
                self._before[storage] = tensor, tensor.untyped_storage().clone()

    @torch.inference_mode()
    def undo(self) -> None:
        """Put back what outside memory held, and fill the capture's own with garbage."""
        for tensor, before in self._before.values():
            tensor.untyped_storage().copy_(before)
        for one in self.allocated:
            _fill_with_garbage(one)


def _refusal(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Why a graph cannot do this, or None."""
    if func in INDEXING:
        has_mask = any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        return "a mask as an index, whose count is read on the host" if has_mask else None
    has_size = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None
    if func in READS or (torch.Tag.dynamic_output_shape in func.tags and not has_size):
        return "reads a value on the host"
    if func is aten.lift_fresh.default:
        return "a tensor of values of the host, which a replay would not follow"
    if torch.Tag.nondeterministic_seeded in func.tags and _argument(func, args, kwargs, "dropout_p") != 0:
        return "random numbers"
    if torch.Tag.inplace_view in func.tags:
        return "changes the shape or memory of a tensor in place"
    return None


def _argument(func: Any, args: tuple, kwargs: Mapping[str, Any], name: str) -> Any:
    """The value of an argument of the operation; None if it has no such argument."""
    for place, one in enumerate(func._schema.arguments):
        if one.name == name:
            return kwargs.get(name, args[place] if place < len(args) else one.default_value)
    return None


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that the operation writes to."""
    names = [one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    values = pytree.tree_leaves([_argument(func, args, kwargs, name) for name in names])
    return [one for one in values if isinstance(one, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _storages(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """One tensor of each storage. Tensors without elements have no memory."""
    return {_storage(one): one for one in tensors if one.numel()}


def _fill_with_garbage(tensor: Tensor) -> None:
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(torch.nan)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).min or torch.iinfo(tensor.dtype).max)


def _line() -> str:
    """The line of the project that called the present operation."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(f"{ROOT}/") and name != __file__ and "/.venv/" not in name:
            return f"{Path(name).name}:{frame.f_lineno} {linecache.getline(name, frame.f_lineno).strip()}"
        frame = frame.f_back
    return "outside the project"
