"""A double of a GPU for models of any size: its tensors have shapes but no memory, and it counts what the host sends to the device.

    with CountingGPU() as gpu, torch.device("cuda"):
        model = Model()
    with gpu, gpu.counting() as counts:
        model(...)
    print(counts.launches, counts.waits, counts.bytes)

Host tensors are real, so that Python code runs as it does with a GPU. Small integer tensors on the device keep their values too, as
long as they depend on such tensors alone: the host may read a prompt's token ids back. Everything else that it reads is zero.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.nn.functional as F
from granite_kernels.launch import LAUNCHERS, recorded_launches
from granite_kernels.op import nbytes
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from bench.device_rules import DeviceRules, target_device
from bench.launches import launches_of
from bench.traffic import flops, moved

__all__ = ["ARCHITECTURE", "CountingGPU", "Counts"]

# Our kernels are launched as on an H100.
ARCHITECTURE = 90
# Device tensors of at most this many elements keep their values.
KNOWN_ELEMENTS = 1 << 20
_HOST_ATTENTION = F.scaled_dot_product_attention
aten = torch.ops.aten


@dataclass
class Counts:
    """What some calls sent to the device.

    Attributes:
        launches: by operation: kernels, copies and fills, as a profiler counts them.
        waits: one entry per wait: the operation, and the line of this project that called it.
        late_reads: how often the host waited for a copy that was queued before later work.
        bytes: of all new device memory, freed again or not.
        moved: bytes that the launches read and write (`bench/traffic.py`).
        work: bytes, and FLOPs of matrix products, of each operation that launched something.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)
    late_reads: int = 0
    bytes: int = 0
    moved: int = 0
    work: list[tuple[int, int]] = field(default_factory=list)

    def add(self, size: int, flops: int) -> None:
        """One operation's bytes and FLOPs."""
        self.moved += size
        self.work.append((size, flops))


class CountingGPU(TorchDispatchMode):
    """Device "cuda" exists inside its `with` block, which may be entered again."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counts | None = None
        self._rules = DeviceRules(_on_device)
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # device tensor → its values on the host
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._modes: list[ExitStack] = []

    def __enter__(self) -> Self:
        modes = ExitStack()
        modes.enter_context(self._fake)
        modes.enter_context(patch("granite_speech.modules.transfers.record_event", self._event))
        modes.enter_context(patch.object(F, "scaled_dot_product_attention", _attention))
        self._modes.append(modes)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modes.pop().close()

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count what happens in this block."""
        self._counts = Counts(waits=self._rules.waits)
        self._rules.waits.clear()
        try:
            yield self._counts
        finally:
            self._counts.waits = list(self._rules.waits)
            self._counts = None

    def _event(self) -> "_Event":
        return _Event(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func.namespace == "prim":  # asks for a tensor's device
            return func(*args, **kwargs)
        if func is aten.is_pinned.default:
            return self._rules.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self._rules.pin(_on_host(aten.clone.default, args[:1], {}))
        self._rules.apply(func, args, kwargs, tensors)
        if target_device(kwargs) != "cuda" and not any(map(_on_device, tensors)):
            return _on_host(func, args, kwargs)
        if _reads(func, args, kwargs):
            return self._read(func, args, kwargs)
        return self._run(func, args, kwargs, tensors)

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        """An operation whose result is on the device."""
        if func.namespace == "granite_kernels":
            out = self._run_launcher(func, args, kwargs)
            self._keep_values(func, args, kwargs, tensors, [])
            return out
        before = {_storage(one) for one in tensors if _on_device(one)}
        out = func(*args, **kwargs)
        results = [one for one in pytree.tree_leaves(out) if _on_device(one)]
        if self._counts is not None:
            new = {_storage(one): one.untyped_storage().nbytes() for one in results}
            if func is not aten.set_.source_Storage_storage_offset:  # which makes a view
                self._counts.bytes += sum(size for storage, size in new.items() if storage not in before)
            launches = launches_of(func, args, out)
            self._count(func._schema.name.removeprefix("aten::"), launches)
            if launches:
                self._counts.add(moved(func, args, kwargs, out), flops(func, args, kwargs))
        self._keep_values(func, args, kwargs, tensors, results)
        return out

    def _run_launcher(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One of our operations, by its launcher: it allocates memory, launches kernels, and may call PyTorch's operations."""
        before = self._counts.launches.total() if self._counts is not None else 0
        with recorded_launches(ARCHITECTURE) as recorded, _Inside(self):
            out = LAUNCHERS[func._schema.name](*args, **kwargs)
        if self._counts is not None:
            alone = self._counts.launches.total() == before
            self._counts.launches.update(launch.kernel.__name__ for launch in recorded)
            if alone and recorded:
                self._counts.add(moved(func, args, kwargs, out), flops(func, args, kwargs))
            else:
                self._counts.add(nbytes(*(one for launch in recorded for one in launch.arguments.values() if _on_device(one))), 0)
        return out

    def _count(self, name: str, launches: int) -> None:
        if launches and self._counts is not None:
            self._counts.launches[name] += launches

    def _read(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A copy from the device to the host, or a value: what is known, else zeros."""
        self._count("copy to the host", 1)
        source = args[1] if func is aten.copy_.default else args[0]
        values = self._known.get(source)
        if values is None:
            values = _on_host(aten.zeros.default, (list(source.shape),), {"dtype": source.dtype})
        return _on_host(func, (args[0], values) if func is aten.copy_.default else (values,), kwargs)

    def _keep_values(self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: list, results: list[torch.Tensor]) -> None:
        """Note the values of results that depend on known values alone, and forget those of tensors that get others."""
        inputs = [self._known.get(one) if _on_device(one) else one for one in tensors]
        small = all(not one.is_floating_point() and one.numel() <= KNOWN_ELEMENTS for one in results)
        # A storage on the host would be another one than the argument.
        computes = func.namespace == "aten" and func is not aten.set_.source_Storage_storage_offset
        if small and all(one is not None for one in inputs) and computes:
            known = pytree.tree_map_only(FakeTensor, self._known.get, (args, kwargs))
            real = _on_host(func, known[0], known[1] | ({"device": "cpu"} if "device" in kwargs else {}))
            self._known.update(zip(results, (one for one in pytree.tree_leaves(real) if isinstance(one, torch.Tensor)), strict=True))
            return
        for one in (value for value, argument in zip(args, func._schema.arguments, strict=False) if _is_written(argument)):
            for other in [other for other in self._known if _storage(other) == _storage(one)]:
                del self._known[other]


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """SDPA. Without a GPU, PyTorch would choose plain matrix products; with an H100 and half precision it chooses cuDNN's kernel."""
    if not _on_device(q):
        return _HOST_ATTENTION(q, k, v, **options)
    flags = (options.get("dropout_p", 0.0), options.get("is_causal", False))
    return aten._scaled_dot_product_cudnn_attention(q, k, v, options.get("attn_mask"), False, *flags, scale=options.get("scale"))[0]


class _Inside(TorchDispatchMode):
    """Counts the operations of PyTorch inside of one of ours, where the counting mode itself is not active."""

    def __init__(self, gpu: CountingGPU):
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.namespace == "aten":
            with self:  # inside of another operation, those that are made of others, such as linear, arrive undivided
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        return self._gpu.__torch_dispatch__(func, types, args, kwargs)


class _Event:
    """A CUDA event: waiting for it waits for the work before it alone."""

    def __init__(self, gpu: CountingGPU):
        self._gpu = gpu

    def synchronize(self) -> None:
        if self._gpu._counts is not None:
            self._gpu._counts.late_reads += 1

    def wait(self) -> None:
        """Later work of the device waits, not the host."""


def _on_device(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.device.type == "cuda"


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _reads(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation brings values from the device to the host."""
    if func is aten.copy_.default:
        return _on_device(args[1]) and not _on_device(args[0])
    return _on_device(args[0]) and (func is aten._local_scalar_dense.default or target_device(kwargs) == "cpu") if args else False


def _on_host(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    with _disable_current_modes():
        return func(*args, **kwargs)
