"""int8 weights: one scale for each row, so `weight ≈ int8 · scale[:, None]`. `int8_layers.py` says which layers have them.

`from_pretrained(quantize="int8")` rounds each matrix as it is read. A row's largest value becomes ±127, so the error of a weight is at
most half a scale.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.errors import InputError, UnsupportedError

__all__ = ["check_quantize", "dequantized", "int8_rows", "projections", "refuse_quantized"]

_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ELEMENTS_AT_ONCE = 1 << 22  # of a matrix in float32, so that its copies need 16 MiB each


def check_quantize(value: Any) -> None:
    """Raise InputError for a value of `quantize` other than None and "int8"."""
    if value is not None and not (isinstance(value, str) and value == "int8"):
        raise InputError(got=f"quantize={value!r:.100}", expected="'int8' or None", remedy="Pass quantize='int8', or omit it")


def projections(decoder: nn.Module) -> Iterator[nn.Module]:
    """The layers that get int8 weights: all linear layers of the language model without its head."""
    for layer in decoder.layers:
        yield from (module for path, module in layer.named_modules() if path.rpartition(".")[2] in _NAMES)


@torch.no_grad()
def int8_rows(values: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a matrix to int8.

    Args:
        values: `(out_features, in_features)`, floating-point.
        out: int8 of the same shape, to write to; allocated if omitted.

    Returns:
        The int8 values, from −127 to 127, and the scales `(out_features,)` float32: the largest absolute value of each row / 127, and 1
        for a row of zeros.
    """
    weight = torch.empty_like(values, dtype=torch.int8) if out is None else out
    scales = torch.empty(values.shape[0], dtype=torch.float32, device=values.device)
    count = max(1, _ELEMENTS_AT_ONCE // max(values.shape[1], 1))
    for rows, rounded, scale in zip(values.split(count), weight.split(count), scales.split(count), strict=True):
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        scale.copy_(wide.abs().amax(1) / 127)
        scale.masked_fill_(scale == 0, 1)
        rounded.copy_((wide / scale[:, None]).round_().clamp_(-127, 127))
    return weight, scales


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`(out_features, in_features)` of this dtype; multiplied in float32 and rounded once."""
    return torch.mul(weight, scale[:, None], out=torch.empty_like(weight, dtype=dtype))


def refuse_quantized(model: nn.Module, call: str) -> None:
    """Raise UnsupportedError if a model has int8 weights.

    Args:
        model: any module.
        call: what needs the original weights.
    """
    if any(getattr(module, "weight_scale", None) is not None for module in model.modules()):
        raise UnsupportedError(
            got=f"{call} of a model that was loaded with quantize='int8'",
            expected="a model with its original weights, which were rounded as it was loaded",
            remedy="Load it without quantize",
        )
