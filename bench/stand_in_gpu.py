"""A stand-in for a GPU: tensors that say they are on "cuda", compute on the CPU, and report every time the host would wait.

    with StandInGPU() as gpu:
        model = gpu.move(model)
        model(**gpu.move(inputs))
    print(gpu.waits)

Values are real, so code that branches on them takes the path that it takes on a GPU, and Triton kernels run in the interpreter.
The host waits for the device when a value or a tensor is read back, when a shape depends on values, and when data is copied
to the device from memory that is not pinned. Mixing a CPU tensor with device tensors is an error, as it is on a GPU.
"""

import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing

__all__ = ["StandInGPU"]

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

# Operations that read values, or need them to know the shape of their result.
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


class _DeviceTensor(torch.Tensor):
    """Says that it is on the GPU; `values` is the CPU tensor that it stands for."""

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
        return self.cpu().tolist()  # PyTorch's own refuses subclasses

    def __repr__(self) -> str:
        return f"_DeviceTensor({self.values!r})"


class StandInGPU(TorchDispatchMode):
    """In its `with` block, device "cuda" exists.

    Attributes:
        waits: each time the host waited: the operation, and the line of the project that called it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: dict[int, torch.Tensor] = {}  # by address; held here, so that no address is used twice
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        # Inside a fake mode PyTorch creates tensors on "cuda" without looking for a driver. No operation gets through to it.
        self._modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modes.close()

    @torch.no_grad()
    def move(self, what: Any) -> Any:
        """A model (in place), or the tensors in dictionaries and lists, moved to the stand-in. Counts no wait."""
        if not isinstance(what, nn.Module):
            return pytree.tree_map_only(torch.Tensor, _DeviceTensor, what)
        moved: dict[int, nn.Parameter] = {}  # tied parameters stay tied
        for module in what.modules():
            for name, one in module._parameters.items():
                if one is not None:
                    module._parameters[name] = moved.setdefault(id(one), nn.Parameter(_DeviceTensor(one.data), one.requires_grad))
            module._buffers.update({name: _DeviceTensor(one) for name, one in module._buffers.items() if one is not None})
        return what

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        takes_device = any(isinstance(one, _DeviceTensor) for one in tensors)
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        if func is aten.is_pinned.default:
            return args[0].data_ptr() in self._pinned
        if func is aten._pin_memory.default:
            copy = self._on_cpu(aten.clone.default, args[:1], {})
            return self._pinned.setdefault(copy.data_ptr(), copy)
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        if takes_device and not is_copy:
            self._check_devices(func, tensors)
        if self._waits(func, args, kwargs, target):
            self._note(func)
        out = self._on_cpu(func, args, kwargs)
        if func is aten._to_copy.default:
            stays = target == "cuda" or (target is None and takes_device)
        else:
            stays = target == "cuda" or (isinstance(args[0], _DeviceTensor) if func is aten.copy_.default else takes_device)
        if not stays:
            return args[0] if func is aten.copy_.default else out
        out = pytree.tree_map_only(torch.Tensor, _DeviceTensor, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if takes_device and func is not aten._to_copy.default else out

    @staticmethod
    def _on_cpu(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        args, kwargs = pytree.tree_map_only(_DeviceTensor, lambda one: one.values, (args, dict(kwargs)))
        with _disable_current_modes():
            return func(*args, **kwargs)

    @staticmethod
    def _check_devices(func: Any, tensors: list[torch.Tensor]) -> None:
        # A tensor without dimensions is passed as a number.
        if stray := [one for one in tensors if not isinstance(one, _DeviceTensor) and one.dim()]:
            raise RuntimeError(f"{func} on tensors on {DEVICE} and a CPU tensor of shape {tuple(stray[0].shape)}")

    def _waits(self, func: Any, args: tuple, kwargs: Mapping[str, Any], target: str | None) -> bool:
        if func in READS:
            return isinstance(args[0], _DeviceTensor)
        if func in INDEXING:
            chosen = [one for one in args[1] if isinstance(one, _DeviceTensor)]
            return any(one.dtype in (torch.bool, torch.uint8) for one in chosen)
        if func is aten.repeat_interleave.Tensor:
            return isinstance(args[0], _DeviceTensor) and kwargs.get("output_size") is None
        if func is aten._to_copy.default:
            source, to_device, non_blocking = args[0], target == "cuda", kwargs.get("non_blocking", False)
            crosses = target is not None and to_device != isinstance(source, _DeviceTensor)
        elif func is aten.copy_.default:
            source, to_device, non_blocking = args[1], isinstance(args[0], _DeviceTensor), len(args) > 2 and args[2]
            crosses = to_device != isinstance(source, _DeviceTensor)
        else:
            return False
        host = source if to_device else args[0] if func is aten.copy_.default else None
        is_pinned = host is not None and not isinstance(host, _DeviceTensor) and host.data_ptr() in self._pinned
        return crosses and not (is_pinned and non_blocking)

    def _note(self, func: Any) -> None:
        frames = [one for one in traceback.extract_stack() if Path(one.filename).is_relative_to(ROOT) and one.filename != __file__]
        here = next((one for one in reversed(frames) if "/.venv/" not in one.filename), None)
        where = f"{Path(here.filename).name}:{here.lineno} {here.line}" if here else "outside the project"
        self.waits.append(f"{func} in {where}")
