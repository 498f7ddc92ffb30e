"""Where a model's weights go, and in which dtype: the options of `from_pretrained`."""

from collections.abc import Mapping
from typing import Any

import torch
from granite_kernels.cpu import has_bfloat16

from granite_speech.errors import InputError, UnsupportedError

__all__ = ["choose_device", "choose_dtype"]


def choose_device(device: torch.device | str | int | None, device_map: Any) -> torch.device:
    """The device that `device` or transformers' `device_map` names.

    Args:
        device: a device, its name or its number.
        device_map: the same, "auto" (CUDA if available), or a dictionary from modules to one device.

    Raises:
        InputError: a device that this machine does not have, several devices, or both arguments.
    """
    if isinstance(device_map, dict):
        places = {str(place): place for place in device_map.values()}
        if len(places) != 1:
            raise InputError(
                got=f"device_map={device_map!r:.200}",
                expected="one device for all modules",
                remedy="Pass device='cuda', or device_map='auto'",
            )
        device_map = next(iter(places.values()))
    if device is not None and device_map is not None:
        raise InputError(got="device and device_map", expected="one of them", remedy="Pass device")
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "sequential"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = device_map if device is None else device
    try:
        target = torch.device("cpu" if chosen is None else chosen)
        torch.empty(0, device=target)  # a valid name of a device that this machine may not have
    except (AssertionError, RuntimeError, TypeError, NotImplementedError) as error:
        raise InputError(
            got=f"device {chosen!r:.100}, which gives: {str(error).splitlines()[0]:.200}",
            expected="a device of this machine, such as 'cpu', 'cuda' or 'cuda:1'",
            remedy="Pass device='cpu', or install a PyTorch build with that device",
        ) from error
    return target


def choose_dtype(
    dtype: torch.dtype | str | dict[str, Any] | None, values: Mapping[str, Any], device: torch.device | None = None
) -> torch.dtype | None:
    """The dtype of floating-point weights: the requested one or the configuration's; None keeps the file's.

    Args:
        dtype: the requested one; "auto" and None take the configuration's. "fastest" is bfloat16 on a CPU that multiplies it faster than
            float32, and float32 on others; on a GPU, the configuration's if that has 16 bits, otherwise bfloat16. A dictionary has one
            for each part, all the same here.
        values: of the configuration.
        device: of the weights, which "fastest" depends on; the CPU if omitted.

    Raises:
        InputError: not a dtype of weights.
        UnsupportedError: different dtypes for the parts.
    """
    if isinstance(dtype, dict):
        chosen = {choose_dtype(one, values, device) for one in dtype.values()}
        if len(chosen) > 1:
            raise UnsupportedError(
                got=f"dtype={dtype!r:.200}", expected="one dtype for all parts of the model", remedy="Pass for example dtype=torch.bfloat16"
            )
        return chosen.pop() if chosen else choose_dtype(None, values)
    if isinstance(dtype, str) and dtype == "fastest":
        return _fastest(choose_dtype(None, values), device)
    requested = (values.get("dtype") or values.get("torch_dtype")) if dtype in (None, "auto") else dtype
    if requested is None:
        return None
    chosen = requested if isinstance(requested, torch.dtype) else getattr(torch, str(requested).removeprefix("torch."), None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point or chosen.itemsize < 2:
        raise InputError(
            got=f"dtype {requested!r:.100}",
            expected="torch.float32, torch.bfloat16, torch.float16 or torch.float64, or their names, or 'auto' or 'fastest'",
            remedy="Pass dtype='fastest', or one of the others",
        )
    return chosen


def _fastest(configured: torch.dtype | None, device: torch.device | None) -> torch.dtype:
    if device is None or device.type == "cpu":
        return torch.bfloat16 if has_bfloat16() else torch.float32
    return configured if configured is not None and configured.itemsize == 2 else torch.bfloat16
