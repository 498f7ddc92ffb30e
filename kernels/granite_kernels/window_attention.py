"""Attention of a few queries to the few keys of a window: the attention of the projector's Q-Former."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, called_with, nbytes, triton_backend


class WindowAttentionInputs(NamedTuple):
    """The arguments of `window_attention` except `impl`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float | None = None


def window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, impl: str | None = None
) -> torch.Tensor:
    """Attention within windows: every query of a window attends to all keys of the same window.

    ::

        out_i = Σ_j softmax_j( scale · q_i·k_j ) v_j        for each window and head

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | q | (windows, queries, heads, dim), or (1, queries, heads, dim) for all windows | last 1, others free | any float |
    | k, v | (windows, keys, heads, dim) | last 1, others free | as q |
    | returns | (windows, queries, heads, dim) | contiguous | as q |

    The stride of q's windows may be 0, and k and v may be views of one projection. In Triton scores, softmax and sums are float32, and
    the result is rounded once; a window gets the same bits whatever the others are.

    Args:
        scale: factor on the scores; dim ** -0.5 if omitted.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, no queries or keys, or a dim of 0; with "triton", more than 16 queries or
            64 keys, or a dim above 128.

    It replaces the attention in `Blip2QFormerMultiHeadAttention` of transformers (Li et al., "BLIP-2", arXiv 2301.12597), which is a
    call of scaled_dot_product_attention. Its kernels compute tiles of 64 or more queries; the Q-Former has 3.
    """
    inputs = WindowAttentionInputs(q, k, v, scale)
    _check(inputs)
    return OPERATION.select(impl, q)(*inputs)


def _check(inputs: WindowAttentionInputs) -> None:
    arguments, q = Arguments("window_attention"), inputs.q
    shared = isinstance(q, torch.Tensor) and q.ndim == 4 and q.shape[0] == 1
    arguments.tensor("q", q, f"{'1' if shared else 'windows'} queries heads dim")
    arguments.tensor("k", inputs.k, "windows keys heads dim")
    arguments.tensor("v", inputs.v, "windows keys heads dim")
    for name, tensor, axis in (("q", q, 1), ("k", inputs.k, 1), ("k", inputs.k, 3)):
        if not tensor.shape[axis]:
            what = ("windows", "queries" if name == "q" else "keys", "heads", "dim")[axis]
            arguments.refuse(f"{name} has shape {tuple(tensor.shape)}", f"{what} of at least 1", f"Check how {name} was made")


@called_with(WindowAttentionInputs)
def window_attention_reference(inputs: WindowAttentionInputs) -> torch.Tensor:
    """`window_attention` in PyTorch, by the call that eager code makes."""
    q, k, v = (one.transpose(1, 2) for one in (inputs.q, inputs.k, inputs.v))
    out = F.scaled_dot_product_attention(q.expand(k.shape[0], -1, -1, -1), k, v, scale=inputs.scale)
    return out.transpose(1, 2).contiguous()


@called_with(WindowAttentionInputs)
def window_attention_cost(inputs: WindowAttentionInputs) -> Cost:
    """FLOPs: two products for each pair of a query and a key, without the softmax. Bytes: k, v and the result, and q, only once if all
    windows share it."""
    q, k, v, _ = inputs
    windows, keys, heads, dim = k.shape
    pairs, shared = windows * q.shape[1] * keys, windows and q.stride(0) == 0
    results = windows * q.shape[1] * heads * dim * q.element_size()
    return Cost(flops=4 * pairs * heads * dim, bytes=nbytes(q[:1] if shared else q, k, v) + results)


@called_with(WindowAttentionInputs)
def window_attention_library(inputs: WindowAttentionInputs) -> Callable[[], torch.Tensor]:
    """SDPA on copies with the heads before the rows."""
    windows = inputs.k.shape[0]
    q, k, v = (one.expand(windows, -1, -1, -1).transpose(1, 2).contiguous() for one in (inputs.q, inputs.k, inputs.v))
    return partial(F.scaled_dot_product_attention, q, k, v, scale=inputs.scale)


def _make(
    draw: Draw, *, windows: int, queries: int, keys: int, heads: int, dim: int, rows: int | None = None, scale: float | None = None
) -> dict[str, Any]:
    """rows: of q: windows, or 1 if all windows share it. k and v are parts of one projection."""
    k, v = draw.normal(windows, keys, 2 * heads * dim).chunk(2, dim=2)
    q = draw.normal(windows if rows is None else rows, queries, heads, dim)
    return {"q": q, "k": k.unflatten(2, (heads, dim)), "v": v.unflatten(2, (heads, dim)), "scale": scale}


def _case(name: str, windows: int, queries: int, keys: int, heads: int, dim: int, *, released: bool = False, **options: Any) -> Case:
    shape = {"windows": windows, "queries": queries, "keys": keys, "heads": heads, "dim": dim, **options}
    return Case(name, _make, shape, released)


CASES = (
    _case("projector, 10 s", 34, 3, 15, 16, 64, released=True),
    _case("projector, 128 clips of 10 s", 128 * 34, 3, 15, 16, 64, released=True),
    _case("projector, 128 clips of 10 s, shared queries", 128 * 34, 3, 15, 16, 64, rows=1, released=True),
    _case("projector, 128 clips of 10 s, to themselves", 128 * 34, 3, 3, 16, 64, released=True),
    _case("several windows", 3, 2, 5, 4, 16),
    _case("shared queries", 3, 3, 3, 2, 16, rows=1, scale=0.3),
    _case("odd dim and number of heads", 2, 2, 3, 3, 70),
    _case("more queries and keys than are unrolled", 1, 5, 9, 1, 8),
    _case("more keys than are unrolled", 1, 1, 18, 1, 24),
    _case("one of each", 2, 1, 1, 1, 1),
    _case("no windows", 0, 3, 4, 2, 16, rows=1),
)

OPERATION = Operation(
    name="window_attention",
    call=window_attention,
    reference=window_attention_reference,
    cost=window_attention_cost,
    cases=CASES,
    library=window_attention_library,
    differentiable=("q", "k", "v"),
    triton=triton_backend("window_attention"),
)
