"""What a GPU lets the host do, and what makes the host wait for it: the rules that both doubles of a GPU apply.

The host waits when a value or a tensor is read back, when a shape depends on values, and when data is copied to the device from
memory that is not pinned. An operation on a device tensor takes no CPU tensor, unless it has no dimensions.
"""

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["DeviceRules", "target_device"]

ROOT = Path(__file__).parents[1]
DOUBLES = {str(Path(__file__).with_name(name)) for name in ("device_rules.py", "stand_in_gpu.py", "counting_gpu.py")}
aten = torch.ops.aten

# Operations that read values, or whose result's shape depends on them.
READS = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
COPIES = {aten._to_copy.default, aten.copy_.default}


class DeviceRules:
    """The rules, for a dispatch mode whose device tensors `on_device` recognises.

    Attributes:
        waits: one entry per wait: the operation, and the line of this project that called it.
    """

    def __init__(self, on_device: Callable[[Any], bool]):
        self.waits: list[str] = []
        self._on_device = on_device
        self._pinned: dict[int, torch.Tensor] = {}  # by storage; keeping the tensors prevents the reuse of a storage

    def pin(self, copy: torch.Tensor) -> torch.Tensor:
        """Count a host tensor, which nothing else uses, as pinned memory."""
        return self._pinned.setdefault(_storage(copy), copy)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._pinned

    def apply(self, func: Any, args: tuple, kwargs: Mapping[str, Any], tensors: list[torch.Tensor]) -> None:
        """Record a wait if the operation makes the host wait.

        Raises:
            RuntimeError: it mixes device tensors with a CPU tensor that has dimensions.
        """
        stray = [tensor for tensor in tensors if not self._on_device(tensor) and tensor.dim()]
        if func not in COPIES and stray and any(map(self._on_device, tensors)):
            raise RuntimeError(f"{func} called with tensors on the GPU and a CPU tensor of shape {tuple(stray[0].shape)}")
        if self._waits(func, args, kwargs):
            self.waits.append(f"{func} in {_calling_line()}")

    def _waits(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        if func in READS:
            return self._on_device(args[0])
        if func in INDEXING:
            return any(index.dtype in (torch.bool, torch.uint8) for index in args[1] if self._on_device(index))
        if func is aten.repeat_interleave.Tensor:
            return self._on_device(args[0]) and kwargs.get("output_size") is None
        return func in COPIES and self._copy_waits(func, args, kwargs)

    def _copy_waits(self, func: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        if func is aten._to_copy.default:
            source, target = args[0], target_device(kwargs)
            to_device = self._on_device(source) if target is None else target == "cuda"
            host, non_blocking = source, kwargs.get("non_blocking", False)
        else:
            target, source = args[:2]
            to_device = self._on_device(target)
            host, non_blocking = source if to_device else target, len(args) > 2 and args[2]
        if to_device == self._on_device(source):
            return False
        known_on_host = to_device or func is aten.copy_.default  # reading into a new tensor is never non-blocking
        return not (known_on_host and non_blocking and self.is_pinned(host))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def target_device(kwargs: Mapping[str, Any]) -> str | None:
    """The type of the device that an operation was asked to put its result on."""
    return None if kwargs.get("device") is None else torch.device(kwargs["device"]).type


def _calling_line() -> str:
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
    ours = (frame for frame in reversed(frames) if frame.filename not in DOUBLES and "/.venv/" not in frame.filename)
    frame = next(ours, None)
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" if frame else "outside the project"
