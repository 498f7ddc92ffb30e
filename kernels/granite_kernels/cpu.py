"""What this machine's processor multiplies fast. Needs no Triton."""

from functools import cache

import torch

__all__ = ["few_sizes", "has_amx", "has_bfloat16", "has_int8"]


@cache
def has_amx() -> bool:
    """Whether there are units for products of small matrices in bfloat16 and int8."""
    return _has("amx_tile")


@cache
def has_bfloat16() -> bool:
    """Whether products in bfloat16 are several times as fast as in float32: with avx512_bf16, or AMX."""
    return _has("avx512_bf16") or has_amx()


@cache
def has_int8() -> bool:
    """Whether products of 8-bit integers are several times as fast as in float32: with VNNI, or AMX."""
    return _has("vnni") or has_amx()


def few_sizes(rows: int) -> int:
    """The next of eight numbers between two powers of 2, for what is prepared and kept for each number of rows."""
    multiple = max(8, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // multiple) * multiple


def _has(ability: str) -> bool:
    """Whether the processor has an ability, and PyTorch the library that uses it."""
    asked = getattr(torch.cpu, f"_is_{ability}_supported", None)  # not a public function
    return asked is not None and torch.backends.mkldnn.is_available() and bool(asked())
