"""Some tensors are much wider than the states they come from and go back to, and soon freed: they are computed for some rows at a time."""

from torch import Tensor

__all__ = ["in_parts"]

# Of a wide tensor, at most. On a CPU, the C library takes memory for one of 32 MiB or more from the system, and gives it back, at each
# call: the system then clears every page of it.
_CPU_BYTES, _GPU_BYTES = 2**24, 2**29


def in_parts(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """Rows `(rows, ...)`, in parts so short that a tensor `(rows, width)` of their dtype stays small."""
    limit = _CPU_BYTES if x.device.type == "cpu" else _GPU_BYTES
    parts = -(-len(x) * width * x.element_size() // limit)
    return x.tensor_split(parts) if parts > 1 else (x,)
