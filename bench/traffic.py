"""How many bytes one operation of the model reads and writes in the device's memory, if nothing stays in its caches, and its FLOPs.

Every tensor that goes in or comes out counts once, whatever its strides. Exceptions are operations that read a part of a tensor:
a table counts only the rows that are looked up, and pages of keys not at all, since how many keys a row has is a value on the device.
Their bytes are added by the caller, who knows the number.
"""

from collections.abc import Mapping
from typing import Any

import torch
from granite_kernels.op import nbytes
from torch.utils import _pytree as pytree

__all__ = ["flops", "moved"]

# Operations that write as much as they read of their first tensor.
_LOOKUPS = {"embedding", "index_select", "gather", "index.Tensor"}
_WRITES = {"index_copy_", "scatter_.src", "scatter_.value", "copy_", "fill_.Scalar", "zero_"}
# Our operations that are a product of rows with a weight.
_PRODUCTS = {"fused_linear", "lora_linear", "silu_linear", "split_linear"}
# Arguments of our operations of which only a part is read.
_PARTS = {"k_cache", "v_cache", "embedding"}


def moved(func: Any, args: tuple, kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes of one call.

    Args:
        func: the operation, of ATen or of granite_kernels.
        args, kwargs: its arguments.
        out: its result.
    """
    results = [one for one in pytree.tree_leaves(out) if isinstance(one, torch.Tensor)]
    if func.namespace == "granite_kernels":
        named = {one.name: value for one, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
        return nbytes(*results, *(one for name, one in named.items() if isinstance(one, torch.Tensor) and name not in _PARTS))
    inputs = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    name = func._schema.name.removeprefix("aten::") + (f".{func._overloadname}" if func._overloadname != "default" else "")
    if name in _LOOKUPS:
        return 2 * nbytes(*results) + nbytes(*inputs[1:])
    if name in _WRITES:
        return 2 * nbytes(*inputs[1:]) or nbytes(*inputs)
    return nbytes(*inputs, *results)


def flops(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """FLOPs of the matrix products that are the library's, or in its place: 2 per multiply-add. 0 for every other operation.

    Args:
        func, args, kwargs: as for `moved`.
    """
    if func.namespace == "granite_kernels":
        named = {one.name: value for one, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
        x, weight = named.get("x"), named.get("weight")
        is_product = func._schema.name.removeprefix("granite_kernels::") in _PRODUCTS
        return 2 * x.shape[0] * weight.numel() if is_product else 0
    name = func._schema.name.removeprefix("aten::")
    if name not in ("mm", "bmm", "addmm", "baddbmm"):
        return 0
    left, right = args[-2:] if name in ("mm", "bmm") else args[1:3]
    return 2 * left.numel() * right.shape[-1]
