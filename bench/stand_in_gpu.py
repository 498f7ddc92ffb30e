"""A stand-in for a GPU: its tensors report device "cuda" and compute on the CPU, and it records each time the host would wait.

    with StandInGPU() as gpu:
        model = gpu.move(model)
        model(**gpu.move(inputs))
    print(gpu.waits)

Values are real, so code that branches on them takes the same path as on a GPU; Triton kernels run in the interpreter. What makes
the host wait, and which tensors may not be mixed, is in `bench/device_rules.py`.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing

from bench.device_rules import DeviceRules, target_device

__all__ = ["StandInGPU"]

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten


class _DeviceTensor(torch.Tensor):
    """A tensor that reports device "cuda"; `values` is the CPU tensor with its values."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "_DeviceTensor":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.size(), **layout, device=DEVICE)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of a StandInGPU outside its `with` block")

    def tolist(self) -> Any:
        return self.cpu().tolist()  # Tensor.tolist refuses subclasses

    def __repr__(self) -> str:
        return f"_DeviceTensor({self.values!r})"


class _Event:
    """A CUDA event: waiting for it waits for the work before it alone."""

    def __init__(self, gpu: "StandInGPU"):
        self._gpu = gpu

    def synchronize(self) -> None:
        self._gpu.late_reads += 1

    def wait(self) -> None:
        """Later work of the device waits, not the host."""


class StandInGPU(TorchDispatchMode):
    """Device "cuda" exists inside its `with` block.

    Attributes:
        waits: one entry per wait: the operation, and the line of this project that called it.
        late_reads: how often the host waited for a copy that was queued before later work.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rules = DeviceRules(lambda value: isinstance(value, _DeviceTensor))
        self.waits = self._rules.waits
        self.late_reads = 0
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        # In a fake mode PyTorch creates tensors on "cuda" without a driver. No operation reaches that mode.
        self._modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._modes.enter_context(patch("granite_speech.modules.transfers.record_event", self._event))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modes.close()

    @torch.no_grad()
    def move(self, what: Any) -> Any:
        """Move a model (in place), or the tensors in dictionaries and lists, to the stand-in. Records no wait."""
        if not isinstance(what, nn.Module):
            return pytree.tree_map_only(torch.Tensor, _DeviceTensor, what)
        moved: dict[int, nn.Parameter] = {}  # keeps tied parameters tied
        for module in what.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[name] = moved.setdefault(id(weight), nn.Parameter(_DeviceTensor(weight.data), weight.requires_grad))
            module._buffers.update({name: _DeviceTensor(buffer) for name, buffer in module._buffers.items() if buffer is not None})
        return what

    def _event(self) -> "_Event":
        return _Event(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        takes_device = any(isinstance(tensor, _DeviceTensor) for tensor in tensors)
        if func is aten.is_pinned.default:
            return self._rules.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self._rules.pin(self._on_cpu(aten.clone.default, args[:1], {}))
        self._rules.apply(func, args, kwargs, tensors)
        target = target_device(kwargs)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        out = self._on_cpu(func, args, kwargs)
        if not self._is_on_device(func, args, target, takes_device):
            return args[0] if func is aten.copy_.default else out
        out = pytree.tree_map_only(torch.Tensor, _DeviceTensor, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if takes_device and func is not aten._to_copy.default else out

    @staticmethod
    def _is_on_device(func: Any, args: tuple, target: str | None, takes_device: bool) -> bool:
        """Whether the result of an operation is on the device."""
        if func is aten._to_copy.default:
            return target == "cuda" or (target is None and takes_device)
        return target == "cuda" or (isinstance(args[0], _DeviceTensor) if func is aten.copy_.default else takes_device)

    @staticmethod
    def _on_cpu(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        args, kwargs = pytree.tree_map_only(_DeviceTensor, lambda tensor: tensor.values, (args, dict(kwargs)))
        with _disable_current_modes():
            return func(*args, **kwargs)
