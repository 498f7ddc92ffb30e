"""Layers whose weight may be int8, and their packing for a CPU that multiplies 8-bit integers (`granite_kernels.int8_cpu`).

A packed weight lies in memory once, in the library's layout. What its module has as `weight` then only tells shape, dtype and device;
`state_dict` gives the values. Projections of the same states are packed as one matrix, which is one product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from granite_kernels import OPERATIONS
from granite_kernels.int8_cpu import PackedInt8, can_pack
from torch import Tensor, nn

from granite_speech.modules.autocast import autocast_dtype
from granite_speech.modules.few_sizes import linear
from granite_speech.modules.quantized import dequantized, int8_rows, refuse_quantized

__all__ = ["Int8Weight", "PackedRows", "PointwiseConv1d", "is_packable", "stand_in", "whole_of"]

# Elements of the smallest weight that is packed. For fewer, rounding the activations takes longer than it saves.
_FEWEST = 1 << 17


@dataclass(frozen=True)
class PackedRows:
    """Rows of a packed matrix: those of one projection."""

    whole: PackedInt8
    rows: slice

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`(..., in)` to `(..., rows)`. The other rows are computed too, so whoever needs all calls `whole`."""
        if self.rows.stop - self.rows.start == self.whole.shape[0]:
            return self.whole.linear(x, bias)
        y = self.whole.linear(x)[..., self.rows]
        return y if bias is None else y + bias


class Int8Weight(nn.Module):
    """What a linear layer or a pointwise convolution needs for an int8 weight. Mixed in before its class of PyTorch.

    Attributes:
        weight_scale: `(out,)` float32 of an int8 weight, which both keep their dtypes if the layer's is changed; else None.
        packed: where the values of a packed weight are; else None.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register_buffer("weight_scale", None)
        self.packed: PackedRows | None = None
        self._dtype: torch.dtype | None = None  # that an int8 weight stands for

    @property
    def activation_dtype(self) -> torch.dtype:
        """Of the rows that the layer takes, and of new adapters."""
        return self.weight.dtype if self._dtype is None else self._dtype

    def product(self, x: Tensor) -> Tensor:
        """`x Wᵀ + bias`, channels last: `(..., in)` to `(..., out)`."""
        if self.packed is None:
            return linear(x, self.matrix(x.dtype), self.bias)
        dtype = autocast_dtype(x.device)
        return self.packed.linear(x if dtype is None else x.to(dtype), self.bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight `(out, in)`; int8 is made wider, to this dtype."""
        weight = self.weight if self.packed is None else self._unpacked()
        weight = weight if weight.dim() == 2 else weight.flatten(1)
        return weight if self._dtype is None else dequantized(weight, self.weight_scale, dtype)

    def store_int8(self, values: Tensor, out: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        """Make the weight int8 (`int8_rows`).

        Args:
            values: of the weight's shape, to be rounded.
            out: int8 of the same shape, the memory to use; allocated if omitted.
            dtype: of the activations; that of `values` if omitted.
        """
        weight, self.weight_scale = int8_rows(values.flatten(1), None if out is None else out.flatten(1))
        self.weight, self._dtype = nn.Parameter(weight.view(values.shape), requires_grad=False), dtype or values.dtype

    def _unpacked(self) -> Tensor:
        return self.packed.whole.unpack()[0][self.packed.rows].view(self.weight.shape)

    def _unpack(self) -> None:
        if self.packed is not None:
            self.weight, self.packed = nn.Parameter(self._unpacked(), requires_grad=False), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        scale = self.weight_scale
        if scale is None:
            return super()._apply(fn, recurse)
        like = fn(torch.empty(0, dtype=self._dtype, device=scale.device))
        if like.device != scale.device:
            self._unpack()
        kept = None if self.packed is None else self._parameters["weight"]
        if kept is not None:
            self._parameters["weight"] = None
        super()._apply(fn, recurse)
        self._dtype = like.dtype
        self.weight_scale = self.weight_scale if self.weight_scale.dtype == scale.dtype else scale.to(self.weight_scale.device)
        if kept is not None:
            self._parameters["weight"] = kept
        else:
            self.weight.data = self.weight.data.to(torch.int8)
        return self

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None and not keep_vars:
            destination[f"{prefix}weight"] = self._unpacked()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if self.weight_scale is not None and given is not None and given.is_floating_point():
            refuse_quantized(self, "load_state_dict with floating-point weights")  # they would become integers
        self._unpack()
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.packed is not None:  # the copy of a tensor has memory for every element
            self.weight = stand_in(self.weight)


class PointwiseConv1d(Int8Weight, nn.Conv1d):
    """A convolution of kernel size 1, whose weight may be int8. Channels last, it is a matrix product."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int] = 1, *arguments: Any, **options: Any):
        super().__init__(in_channels, out_channels, kernel_size, *arguments, **options)  # as nn.Conv1d: peft makes others of this class

    def forward(self, x: Tensor) -> Tensor:
        """`(clips, in_channels, frames)` to `(clips, out_channels, frames)`."""
        return super().forward(x) if self.weight_scale is None else self.product(x.transpose(1, 2)).transpose(1, 2)


def is_packable(weights: Sequence[Tensor], device: torch.device) -> bool:
    """Whether 8-bit products with weights `(out, in, …)` as one matrix are faster on a device than those of more bits."""
    inputs, outputs = weights[0][0].numel(), sum(map(len, weights))
    is_used = device.type == "cpu" and OPERATIONS["fused_linear"].resolve(None, device, torch.float32) == "torch"
    return is_used and inputs * outputs >= _FEWEST and can_pack(inputs, outputs)


def whole_of(packed: Sequence[PackedRows | None]) -> PackedInt8 | None:
    """The matrix that consists of these rows, one after another; None unless it does."""
    first = 0
    for one in packed:
        if one is None or one.whole is not packed[0].whole or one.rows.start != first:
            return None
        first = one.rows.stop
    return packed[0].whole if packed and first == packed[0].whole.shape[0] else None


def stand_in(weight: Tensor) -> nn.Parameter:
    """Shape, dtype and device of an int8 weight, without memory for its values."""
    return nn.Parameter(torch.zeros(1, dtype=torch.int8).expand(weight.shape), requires_grad=False)
