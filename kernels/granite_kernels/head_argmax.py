"""The language model's head for greedy decoding: the best logit of each tile of the vocabulary and the sum of all, without writing them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.matvec import HEAD_TILE as TILE
from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, called_with, nbytes, triton_backend


class HeadArgmaxInputs(NamedTuple):
    """The arguments of `head_argmax` except `impl`."""

    x: torch.Tensor
    weight: torch.Tensor
    norm_weight: torch.Tensor | None
    eps: float
    divisor: float


def head_argmax(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *,
    eps: float,
    divisor: float,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest logit of each tile of TILE columns, its column, and the tile's log-sum-exp. Inference only.

    The largest score of a row gives greedy decoding's token, and the score less the log-sum-exp of the row's log_sums is the token's
    log-probability.

    ::

        h = norm_weight · x / sqrt(mean(x²) + eps)          h = x without norm_weight
        logits = (h·Wᵀ) / divisor                           each step rounded to x's dtype
        scores[r, t] = max(logits[r, c])                    over TILE · t ≤ c < TILE · (t + 1) and c < vocab
        ids[r, t] = the lowest such c with that logit
        log_sums[r, t] = log Σ_c exp(logits[r, c])          over the same c, from the rounded logits

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x | (rows, in) | last 1, first free | any float |
    | weight | (vocab, in) | last 1, first free | as x |
    | norm_weight | (in,) or None | 1 | as x |
    | returns scores | (rows, ⌈vocab / TILE⌉) | contiguous | as x |
    | returns ids | (rows, ⌈vocab / TILE⌉) | contiguous | int32 |
    | returns log_sums | (rows, ⌈vocab / TILE⌉) | contiguous | float32 (float64 for float64) |

    The logits are rounded before they are compared, because in bfloat16 ties are common, and `torch.argmax` takes the first of
    equal ones. Sums are float32 (float64 for float64). In Triton, a row gets the same bits whatever the other rows are.

    Args:
        eps: added to the mean square, if there is a norm_weight.
        divisor: of the logits; the checkpoint's `logits_scaling`.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, or a gradient would be needed. In Triton also `in` of 0 or above 4096.
    """
    inputs = HeadArgmaxInputs(x, weight, norm_weight, eps, divisor)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: HeadArgmaxInputs) -> None:
    arguments = Arguments("head_argmax")
    arguments.tensor("x", inputs.x, "rows in")
    arguments.tensor("weight", inputs.weight, "vocab in")
    if inputs.norm_weight is not None:
        arguments.tensor("norm_weight", inputs.norm_weight, "in")
    arguments.refuse_gradients(x=inputs.x, weight=inputs.weight, norm_weight=inputs.norm_weight)


@called_with(HeadArgmaxInputs)
def head_argmax_reference(inputs: HeadArgmaxInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`head_argmax` in PyTorch, which writes the logits."""
    h, vocab = inputs.x, inputs.weight.shape[0]
    if inputs.norm_weight is not None:
        h = inputs.norm_weight * F.rms_norm(h, inputs.norm_weight.shape, eps=inputs.eps)
    logits = F.linear(h, inputs.weight) / inputs.divisor
    tiles = F.pad(logits, (0, -vocab % TILE), value=-torch.inf).unflatten(1, (-1, TILE))
    place = tiles.argmax(dim=-1)
    scores = tiles.gather(-1, place[..., None])[..., 0]
    first = torch.arange(0, vocab, TILE, device=h.device)
    return scores, (first + place).to(torch.int32), tiles.to(accumulator(tiles.dtype)).logsumexp(-1)


@called_with(HeadArgmaxInputs)
def head_argmax_cost(inputs: HeadArgmaxInputs) -> Cost:
    """FLOPs: the product. Bytes: every argument and every result, once."""
    (rows, in_features), vocab = inputs.x.shape, inputs.weight.shape[0]
    results = rows * -(-vocab // TILE) * (inputs.x.element_size() + 4 + accumulator(inputs.x.dtype).itemsize)
    return Cost(flops=2 * rows * in_features * vocab, bytes=nbytes(inputs.x, inputs.weight, inputs.norm_weight) + results)


@called_with(HeadArgmaxInputs)
def head_argmax_library(inputs: HeadArgmaxInputs) -> Callable[[], torch.Tensor]:
    """The product alone, which writes the logits."""
    return partial(F.linear, inputs.x, inputs.weight)


def _make(draw: Draw, *, rows: int, inputs: int, vocab: int, norm: bool = True, divisor: float = 8.0) -> dict[str, Any]:
    """In every row, the logits of a tile are 0.5 / divisor apart or more, so that their order survives the roundings."""
    x, weight = draw.normal(rows, inputs), draw.normal(vocab, inputs, std=inputs**-0.5)
    norm_weight = draw.normal(inputs) if norm else None
    if not weight.is_meta:
        h = x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-5) * norm_weight.double() if norm else x.double()
        random = torch.rand(rows, -(-vocab // TILE), TILE, generator=draw.rng).to(x.device)
        levels = (random.argsort(dim=-1) * 0.5 + random[..., :1]).flatten(1)[:, :vocab].double()
        # The smallest change of the weight that gives these products with every row: rows must be at most `inputs`.
        weight += ((levels - h @ weight.double().T).T @ torch.linalg.pinv(h).T).to(weight.dtype)
    return {"x": x, "weight": weight, "norm_weight": norm_weight, "eps": 1e-5, "divisor": divisor}


def _case(name: str, rows: int, inputs: int, vocab: int, *, released: bool = False, **options: Any) -> Case:
    return Case(name, _make, {"rows": rows, "inputs": inputs, "vocab": vocab, **options}, released)


CASES = (
    _case("4.1-2b, 1 row", 1, 2048, 100353, released=True),
    _case("4.1-2b, 8 rows", 8, 2048, 100353, released=True),
    _case("4.1-2b, 128 rows", 128, 2048, 100353, released=True),
    _case("3.3-2b, 1 row", 1, 2048, 49160, released=True),
    _case("3.3-8b, 1 row", 1, 4096, 49160, released=True, divisor=16.0),
    _case("3.3-8b, 8 rows", 8, 4096, 49160, released=True, divisor=16.0),
    _case("odd sizes", 3, 37, 53),
    _case("one row", 1, 64, 40),
    _case("no norm", 2, 64, 41, norm=False, divisor=1.0),
    _case("fewer columns than a tile", 8, 64, 5),
    _case("no rows", 0, 64, 24),
    _case("wide rows", 2, 2085, 17),
    _case("eleven rows", 11, 37, 19),
)

OPERATION = Operation(
    name="head_argmax",
    call=head_argmax,
    reference=head_argmax_reference,
    cost=head_argmax_cost,
    cases=CASES,
    library=head_argmax_library,
    triton=triton_backend("head_argmax"),
)
