"""Small copies between host and device.

Reading from a GPU waits for all work queued before it, and so does writing to it from ordinary memory. A call of the model
therefore reads once, and writes from pinned memory, which does not wait.
"""

from collections.abc import Sequence

import torch
from granite_kernels.launch import has_memory
from torch import Tensor

__all__ = ["Reading", "on_device", "on_host"]


def on_host(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same tensors on the CPU. Those that are on a device are read together, with one wait."""
    away = [one for one in tensors if one is not None and one.device.type != "cpu"]
    if not away:
        return list(tensors)
    # As bytes, so that every dtype arrives unchanged.
    raw = torch.cat([one.detach().contiguous().flatten().view(torch.uint8) for one in away]).to("cpu")
    parts = iter(raw.split([one.numel() * one.element_size() for one in away]))
    # Cloned: a part may begin at an address that is not aligned for its dtype.
    read = {id(one): next(parts).clone().view(one.dtype).view(one.shape) for one in away}
    return [read.get(id(one), one) for one in tensors]


def on_device(values: Tensor | Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers on the host as a tensor on `device`, without a wait."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda" or host.device.type != "cpu":
        return host.to(device)
    pinned = host.pin_memory() if has_memory(host) else host  # a fake tensor has no memory to pin
    return pinned.to(device, non_blocking=True)


class Reading:
    """A copy of a device tensor on its way to the host. The device goes on with later work meanwhile.

    Args:
        tensor: may be overwritten by work that is queued later.
    """

    def __init__(self, tensor: Tensor):
        self._arrived = None
        if tensor.device.type == "cuda":
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
            self._copy.copy_(tensor, non_blocking=True)
            self._arrived = record_event()
        else:
            self._copy = tensor.clone()

    def wait(self) -> Tensor:
        """The copy, once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


def record_event() -> torch.cuda.Event:
    """An event after all work that is queued on the current stream."""
    event = torch.cuda.Event()
    event.record()
    return event
