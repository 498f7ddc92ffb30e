"""The start of a decode step: each row moves on by one position, and its newest token is embedded."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, called_with, nbytes, triton_backend

Started = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class BeginStepInputs(NamedTuple):
    """The arguments of `begin_step` except `impl`."""

    embedding: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    kv_lens: torch.Tensor
    active: torch.Tensor
    frequencies: torch.Tensor
    multiplier: float
    placeholder: int = -1


def begin_step(
    embedding: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    kv_lens: torch.Tensor,
    active: torch.Tensor,
    frequencies: torch.Tensor,
    *,
    multiplier: float,
    placeholder: int = -1,
    impl: str | None = None,
) -> Started:
    """Advance the rows that are active, and make what the first layer of a decode step needs.

    ::

        positions += active,  kv_lens += active
        x = embedding[0 where tokens = placeholder, else tokens] · multiplier
        cos, sin = cos(positions · frequencies), sin(positions · frequencies)
        lens = kv_lens · active

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | embedding | (vocab, hidden) | last 1, first free | any float |
    | tokens | (rows,) | 1 | int64 |
    | positions, changed | (rows,) | 1 | int64 |
    | kv_lens, changed | (rows,) | 1 | int32 |
    | active | (rows,) | 1 | int32, 0 or 1 |
    | frequencies | (head_dim,): angle per position, signed | 1 | float32, or float64 with an embedding in float64 |
    | returns | x (rows, hidden), cos (rows, head_dim), sin (rows, head_dim), lens (rows,) | contiguous | as embedding; lens: int32 |

    Angles, cosines and sines are float32 (float64 for float64) and rounded to the embedding's dtype. Tokens are not checked, because
    that would wait for the device: each must be in the vocabulary, that of a row that is not active too.

    Args:
        multiplier: embedding_multiplier in Granite.
        placeholder: a token that counts as token 0, and may lie outside the vocabulary.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, or a tensor that needs a gradient.

    The angles are those of rotary positions (Su et al., RoFormer, arXiv 2104.09864).
    """
    inputs = BeginStepInputs(embedding, tokens, positions, kv_lens, active, frequencies, multiplier, placeholder)
    _check(inputs)
    return OPERATION.select(impl, embedding)(*inputs)


def _check(inputs: BeginStepInputs) -> None:
    arguments = Arguments("begin_step")
    arguments.tensor("embedding", inputs.embedding, "vocab hidden")
    arguments.tensor("tokens", inputs.tokens, "rows", (torch.int64,))
    arguments.tensor("positions", inputs.positions, "rows", (torch.int64,))
    arguments.index("kv_lens", inputs.kv_lens, "rows")
    arguments.index("active", inputs.active, "rows")
    arguments.tensor("frequencies", inputs.frequencies, "head_dim", (accumulator(inputs.embedding.dtype),))
    arguments.refuse_gradients(embedding=inputs.embedding, frequencies=inputs.frequencies)


@called_with(BeginStepInputs)
def begin_step_reference(inputs: BeginStepInputs) -> Started:
    """`begin_step` in PyTorch, with the calls and roundings of eager code."""
    embedding, tokens, positions, kv_lens, active, frequencies, multiplier, placeholder = inputs
    positions.add_(active)
    kv_lens.add_(active)
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    cos, sin = angles.cos().to(embedding.dtype), angles.sin().to(embedding.dtype)
    tokens = torch.where(tokens == placeholder, 0, tokens)
    return F.embedding(tokens, embedding) * multiplier, cos, sin, kv_lens * active


@called_with(BeginStepInputs)
def begin_step_cost(inputs: BeginStepInputs) -> Cost:
    """FLOPs: the products, without the cosines and sines. Bytes: one row of the embedding per token, the results, and the other
    tensors once, the changed ones twice."""
    embedding, tokens, positions, kv_lens, active, frequencies, *_ = inputs
    rows, hidden, head_dim = tokens.shape[0], embedding.shape[1], frequencies.shape[0]
    moved = 2 * rows * (hidden + head_dim) * embedding.element_size() + nbytes(kv_lens)
    index = nbytes(tokens, active) + 2 * nbytes(positions, kv_lens)
    return Cost(flops=rows * (hidden + head_dim), bytes=moved + index + nbytes(frequencies))


@called_with(BeginStepInputs)
def begin_step_library(inputs: BeginStepInputs) -> Callable[[], torch.Tensor]:
    """The embedding alone."""
    return partial(F.embedding, inputs.tokens, inputs.embedding)


def _make(
    draw: Draw, *, rows: int, vocab: int, hidden: int, head_dim: int, positions: tuple[int, ...] = (7, 0, 1023, 300), idle: bool = True
) -> dict[str, Any]:
    """Random tokens, all different; the rows of the other tokens hold NaN. `positions` repeat over the rows.

    Frequencies have 8 bits, so that the angles of positions of up to 16 bits are exact in float32 and the truth has the same ones.
    """
    tokens = torch.tensor(draw.permutation(vocab)[:rows], dtype=torch.int64, device=draw.device)
    wide = accumulator(draw.dtype)
    frequencies = draw.normal(head_dim, std=0.5, dtype=torch.float32).to(torch.bfloat16).to(wide)
    values = draw.normal(rows, hidden)
    embedding = values.new_full((vocab, hidden), torch.nan)
    if not values.is_meta:
        embedding[tokens] = values
    return {
        "embedding": embedding,
        "tokens": tokens,
        "positions": torch.tensor([positions[row % len(positions)] for row in range(rows)], dtype=torch.int64, device=draw.device),
        "kv_lens": draw.int32([3 + 5 * row for row in range(rows)]),
        "active": draw.int32([0 if idle and row % 3 == 1 else 1 for row in range(rows)]),
        "frequencies": frequencies,
        "multiplier": 12.0,
    }


def _case(name: str, rows: int, vocab: int, hidden: int, head_dim: int, *, released: bool = False, **options: Any) -> Case:
    return Case(name, _make, {"rows": rows, "vocab": vocab, "hidden": hidden, "head_dim": head_dim, **options}, released)


CASES = (
    _case("4.1-2b, 1 row", 1, 100353, 2048, 128, released=True, idle=False),
    _case("4.1-2b, 8 rows", 8, 100353, 2048, 128, released=True, idle=False),
    _case("4.1-2b, 128 rows", 128, 100353, 2048, 128, released=True),
    _case("3.3-2b, 8 rows", 8, 49160, 2048, 64, released=True),
    _case("several rows, some not active", 7, 40, 64, 16),
    _case("one row", 1, 5, 48, 32),
    _case("odd sizes", 3, 9, 37, 10),
    _case("more columns than a tile", 2, 4, 1100, 8),
    _case("late positions", 4, 12, 16, 64, positions=(65534, 131071, 40000, 8191), idle=False),
    _case("no rows", 0, 6, 16, 8),
)

OPERATION = Operation(
    name="begin_step",
    call=begin_step,
    reference=begin_step_reference,
    cost=begin_step_cost,
    cases=CASES,
    library=begin_step_library,
    triton=triton_backend("begin_step"),
    mutates=("positions", "kv_lens"),
    wide=("frequencies",),
)
