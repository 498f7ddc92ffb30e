"""How many launches PyTorch's CUDA implementation makes for each ATen operation that the model uses.

A launch is what a profiler lists: a kernel, a copy or a fill. Checked against profiles of an H200 with torch 2.11 (the counts are in
bench/results/whole-model-*.json). Not counted, because they depend on the shape and on the library's version: the reduction after a
product that cuBLAS splits along K (40 in a decode step of 4.1-2b for one row), its fill before most large products (157 in the encoder
on 128 clips), and the second launch of very long reductions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["UnknownOperationError", "launches_of"]

# Allocations and views. Nothing runs on the device.
NONE = {"empty.memory_format", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
NONE |= {"set_.source_Storage_storage_offset"}

# One kernel, one copy or one fill.
ONE = {
    *("abs", "add.Tensor", "add.Scalar", "add_.Tensor", "add_.Scalar", "sub.Tensor", "sub.Scalar", "sub_.Tensor", "rsub.Scalar"),
    *("mul.Tensor", "mul.Scalar", "mul.out", "mul_.Tensor", "mul_.Scalar", "div.Tensor", "div.Scalar", "div.Tensor_mode", "div_.Tensor"),
    *("floor_divide", "remainder.Scalar", "remainder.Tensor", "fmod.Scalar", "neg", "reciprocal", "pow.Tensor_Scalar", "square"),
    *("rsqrt", "sqrt", "exp", "log", "sin", "cos", "tanh", "sigmoid", "clamp", "clamp_min", "maximum", "minimum"),
    *("silu", "silu_", "gelu", "relu", "erf"),
    *("eq.Tensor", "eq.Scalar", "ne.Tensor", "ne.Scalar", "lt.Tensor", "lt.Scalar", "le.Tensor", "le.Scalar"),
    *("gt.Tensor", "gt.Scalar", "ge.Tensor", "ge.Scalar", "logical_not", "logical_and", "logical_or", "isnan"),
    *("bitwise_and.Tensor", "bitwise_and.Scalar", "bitwise_or.Tensor", "bitwise_not", "where.self", "masked_fill_.Scalar"),
    *("_to_copy", "clone", "copy_", "fill_.Scalar", "fill_.Tensor", "zero_"),
    *("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "scalar_tensor"),
    *("arange", "arange.start", "arange.start_step"),
    *("sum", "sum.dim_IntList", "mean", "mean.dim", "amax", "amin", "max", "min", "argmax", "any", "any.dim", "all", "all.dim"),
    *("_softmax", "_log_softmax", "native_layer_norm", "_fused_rms_norm", "roll", "cumsum"),
    *("gather", "index.Tensor", "index_select", "embedding", "searchsorted.Tensor"),
    *("index_copy_", "scatter_.src", "scatter_.value", "scatter_add_", "index_add_"),
    # cuBLAS adds a bias in the product's epilogue.
    *("mm", "addmm", "bmm", "baddbmm"),
}

# Several.
MANY: dict[str, tuple[int, str]] = {
    "index_copy": (2, "a copy of the input, then index_copy_"),
    "constant_pad_nd": (2, "a fill of the result, then a copy of the input"),
    "index_add": (2, "a copy of the input, then index_add_"),
    "scatter.src": (2, "a copy of the input, then scatter_"),
    "scatter.value": (2, "a copy of the input, then scatter_"),
    "masked_fill.Scalar": (2, "a copy of the input, then masked_fill_"),
    "pow.Scalar": (2, "the base becomes a tensor of no dimensions on the device"),
    "_scaled_dot_product_cudnn_attention": (2, "a fill of its semaphores, then the kernel"),
    "_scaled_dot_product_flash_attention": (1, "one kernel; two if it splits the keys"),
    "_scaled_dot_product_efficient_attention": (1, "one kernel"),
}

# Inputs of one launch of cat.
CAT_INPUTS = 128


class UnknownOperationError(LookupError):
    """An operation that is not in the map."""


def _cat(args: tuple) -> int:
    return -(-sum(one.numel() > 0 for one in args[0]) // CAT_INPUTS)


COMPUTED: dict[str, Callable[[tuple], int]] = {"cat": _cat, "stack": _cat}


def launches_of(func: Any, args: tuple, out: Any) -> int:
    """Launches of one call on device tensors.

    Args:
        func: the ATen operation.
        args: its positional arguments.
        out: its result.

    Raises:
        UnknownOperationError: the operation is not in the map.
    """
    name = func._schema.name.removeprefix("aten::") + (f".{func._overloadname}" if func._overloadname != "default" else "")
    if name in NONE or _is_view(func):
        return 0
    if name not in ONE and name not in MANY and name not in COMPUTED:
        raise UnknownOperationError(f"bench/launches.py does not say how many launches aten::{name} makes")
    tensors = [one for one in pytree.tree_leaves(out) if isinstance(one, torch.Tensor)]
    if tensors and not any(one.numel() for one in tensors):
        return 0  # PyTorch launches nothing for an empty result
    if name in COMPUTED:
        return COMPUTED[name](args)
    return MANY[name][0] if name in MANY else 1


def _is_view(func: Any) -> bool:
    """Whether all results are views of an argument, which is not written to."""
    aliases = [one.alias_info for one in func._schema.returns]
    return bool(aliases) and all(one is not None and not one.is_write for one in aliases)
