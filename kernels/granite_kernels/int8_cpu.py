"""Products of 8-bit integers on a CPU: int8 weights with a scale for each row, and activations rounded with a scale for each row of theirs.

::

    x ≈ s_x · q_x        s_x = max |x| of the row / 127, q_x from −127 to 127
    y = s_x · s_w · (q_x · q_wᵀ) + bias

The sums are exact. A row's result depends on that row alone, whatever else is in the batch: with one scale for all rows, as PyTorch's
`quantize_dynamic` has it, a loud clip would leave its neighbours few of the 256 levels.

The weights are packed once, in the layout of the library that is fastest on this processor:

| processor | library | why |
|---|---|---|
| AMX | oneDNN | of many rows, faster than `torch._int_mm`, which packs at every call, and several times as fast as FBGEMM |
| avx512_vnni | FBGEMM | for one row, it reads the weights at the speed of memory, and the other libraries do not |

Everywhere else `can_pack` is False, and a product of int8 weights first makes them wider.
"""

from typing import Any

import torch

from granite_kernels.cpu import few_sizes, has_amx, has_int8

__all__ = ["PackedInt8", "can_pack"]

_LEVELS = 127
_ZERO = 128  # of unsigned activations, which both libraries multiply fastest
_SMALLEST = 1e-30  # scale; that of a row of zeros
_ANY = 16  # so few rows may have any number
_ELEMENTS_AT_ONCE = 1 << 18  # rounded together: one MiB in float32, which stays in the cache of a core


def can_pack(inputs: int, outputs: int) -> bool:
    """Whether a weight `(outputs, inputs)` can be packed for this processor."""
    return has_int8() and inputs > 0 and outputs > 0


class PackedInt8:
    """An int8 matrix, packed for products on this processor. It cannot be changed, so copies share it.

    Args:
        weight: `(out, in)` int8 on the CPU.
        scale: `(out,)` float32.

    Attributes:
        shape: `(out, in)`.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor):
        self.shape = weight.shape
        self._scale = scale.float().contiguous()
        self._library = _OneDNN if has_amx() else _FBGEMM
        self._packed = self._library.pack(weight.contiguous(), self._scale)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`(..., in)` in any floating-point dtype to `(..., out)` in the same."""
        rows = x.reshape(-1, self.shape[1])
        if rows.shape[0] == 0:
            return x.new_zeros(*x.shape[:-1], self.shape[0])
        return self._library.linear(rows, self._packed, self._scale, bias).view(*x.shape[:-1], self.shape[0])

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and the scale that were packed."""
        return self._library.unpack(self._packed, self.shape), self._scale

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedInt8":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.unpack()


def round_rows(
    x: torch.Tensor, offset: float = 0.0, dtype: torch.dtype = torch.float32, rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x / scale + offset` and the scale, with which the largest value of a row is ±127.

    Args:
        x: `(rows, in)`.
        offset: added before the conversion to `dtype`, which for integers drops the fraction.
        rows: of the first result, with zeros after x; as many as x if omitted.

    Returns:
        `(rows, in)` of `dtype` and `(rows, 1)`, the scale: in x's dtype if that is bfloat16, so that multiplying by it is exact up to the
        rounding of the product; otherwise float32.
    """
    q = torch.empty(x.shape if rows is None else (rows, x.shape[1]), dtype=dtype)
    q[x.shape[0] :] = 0
    scale = torch.empty(x.shape[0], 1, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    count = max(1, _ELEMENTS_AT_ONCE // x.shape[1])
    for first in range(0, x.shape[0], count):
        some = slice(first, min(first + count, x.shape[0]))
        part = x[some]
        wide = part.float() if part.dtype != torch.float32 else part
        largest = torch.maximum(wide.amax(1, keepdim=True), wide.amin(1, keepdim=True).neg_())
        scale[some] = largest.div_(_LEVELS).clamp_(min=_SMALLEST)
        factor = scale[some].float().reciprocal()
        wide = wide * factor if wide is part else wide.mul_(factor)
        q[some] = wide.add_(offset) if offset else wide
    return q, scale


def _scaled(y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`y · scale + bias` in a dtype."""
    scaled = y.mul_(scale) if bias is None else torch.addcmul(bias.to(y.dtype), y, scale)
    return scaled.to(dtype)


class _OneDNN:
    """`onednn::qlinear_pointwise`, with which PyTorch's compiler multiplies."""

    @staticmethod
    def pack(weight: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.ops.onednn.qlinear_prepack(weight, None), torch.zeros(weight.shape[0], dtype=torch.int32)

    @staticmethod
    def linear(x: torch.Tensor, packed: Any, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, zeros = packed
        # oneDNN keeps what it prepares for each number of rows.
        count = x.shape[0]
        q, row_scale = round_rows(x, _ZERO + 0.5, torch.uint8, count if count <= _ANY else few_sizes(count))
        run = torch.ops.onednn.qlinear_pointwise.default
        y = run(q, 1.0, _ZERO, weight, scale, zeros, None, 1.0, 0, row_scale.dtype, "none", [], "")[:count]
        return _scaled(y, row_scale, bias, x.dtype)

    @classmethod
    def unpack(cls, packed: Any, shape: torch.Size) -> torch.Tensor:
        # There is no way back from the layout but a product: with one unit vector after another.
        weight, zeros = packed
        units, ones = torch.eye(shape[1], dtype=torch.uint8), torch.ones(shape[0])
        run = torch.ops.onednn.qlinear_pointwise.default
        columns = run(units, 1.0, 0, weight, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return columns.T.to(torch.int8).contiguous()


class _FBGEMM:
    """PyTorch's quantized product, of values that are integers already: it would have one scale for all rows."""

    @staticmethod
    def pack(weight: torch.Tensor, scale: torch.Tensor) -> Any:
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            return torch.ops.quantized.linear_prepack(quantized, None)
        finally:
            torch.backends.quantized.engine = before

    @staticmethod
    def linear(x: torch.Tensor, packed: Any, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        q, row_scale = round_rows(x)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(q, 1.0, _ZERO, packed)
        return _scaled(y, row_scale.float(), bias, x.dtype)

    @staticmethod
    def unpack(packed: Any, shape: torch.Size) -> torch.Tensor:
        return torch.ops.quantized.linear_unpack(packed)[0].int_repr()
