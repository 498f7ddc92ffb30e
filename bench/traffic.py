"""How many bytes one operation of the model reads and writes in the device's memory, if nothing stays in its caches.

Every tensor that goes in or comes out counts once, whatever its strides. Exceptions are operations that read a part of a tensor:
a table counts only the rows that are looked up, and pages of keys not at all, since how many keys a row has is a value on the device.
Their bytes are added by the caller, who knows the number.
"""

from collections.abc import Mapping
from typing import Any

import torch
from granite_kernels.op import nbytes
from torch.utils import _pytree as pytree

__all__ = ["moved"]

# Operations that write as much as they read of their first tensor.
_LOOKUPS = {"embedding", "index_select", "gather", "index.Tensor"}
_WRITES = {"index_copy_", "scatter_.src", "scatter_.value", "copy_", "fill_.Scalar", "zero_"}
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
