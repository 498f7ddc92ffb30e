"""Block attention with relative positions: the self-attention of the Granite Speech conformer encoder."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, bounds, called_with, join, nbytes, triton_backend


class BlockAttentionInputs(NamedTuple):
    """The arguments of `block_attention` except `impl`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rel_pos_emb: torch.Tensor
    cu_seqlens: torch.Tensor
    context_size: int
    scale: float | None = None
    blocks: torch.Tensor | None = None


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_pos_emb: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    context_size: int,
    scale: float | None = None,
    blocks: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Attention inside blocks of `context_size` frames. Each clip is cut into blocks from its own first frame.

    ::

        out_i = Σ_j softmax_j( scale · (q_i·k_j + q_i·rel_pos_emb[i − j + max_pos_emb]) ) v_j

    over the frames j of i's block. A clip's last block may be shorter than the others.

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | q, k, v | (total_frames, num_heads, dim_head) | last 1, others free | any float, the same for all |
    | rel_pos_emb | (2 · max_pos_emb + 1, dim_head) | last 1 | as q |
    | cu_seqlens | (clips + 1,) | 1 | int32 |
    | blocks | (total_frames // context_size + clips + 1, 3) | contiguous | int32 |
    | returns | (total_frames, num_heads, dim_head) | contiguous | as q |

    Rows from `cu_seqlens[-1]` on are padding: never read, zero in the result. Clips may be empty, and there may be none.
    Scores, softmax and sums are float32 (float64 for float64), and the result is rounded once.

    Args:
        context_size: frames per block, 1 to max_pos_emb.
        scale: factor on both terms of the score; dim_head ** -0.5 by default.
        blocks: what `attention_blocks` returns for these clips, total_frames and context_size. The kernels read it instead of
            cu_seqlens, and make it first if it is omitted, so pass one table to all layers. Its values are not checked: with a wrong
            table they read and write the wrong rows, even outside the tensors. The reference does not read it.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, or context_size out of range.

    The relative positions are those of Shaw et al. (arXiv 1803.02155), as in `GraniteSpeechConformerAttention` of transformers,
    which, unlike this function, also attends to the frames that pad a batch.
    """
    inputs = BlockAttentionInputs(q, k, v, rel_pos_emb, cu_seqlens, context_size, scale, blocks)
    _check(inputs)
    return OPERATION.select(impl, q)(*inputs)


def _check(inputs: BlockAttentionInputs) -> None:
    arguments = Arguments("block_attention")
    arguments.tensor("q", inputs.q, "total_frames num_heads dim_head")
    arguments.tensor("k", inputs.k, "total_frames num_heads dim_head")
    arguments.tensor("v", inputs.v, "total_frames num_heads dim_head")
    arguments.tensor("rel_pos_emb", inputs.rel_pos_emb, "2·max_pos_emb+1 dim_head")
    arguments.index("cu_seqlens", inputs.cu_seqlens, "clips+1")
    positions = inputs.rel_pos_emb.shape[0]
    if positions % 2 == 0:
        arguments.refuse(f"rel_pos_emb has {positions} rows", "an odd number, 2 · max_pos_emb + 1", "Pass the whole embedding table")
    if not 1 <= inputs.context_size <= positions // 2:
        arguments.refuse(
            f"context_size={inputs.context_size}",
            f"1 to max_pos_emb = {positions // 2}, from the rows of rel_pos_emb",
            "Use the context_size of the checkpoint's encoder_config",
        )
    if inputs.cu_seqlens.shape[0] == 0:
        arguments.refuse("cu_seqlens is empty", "clips + 1 offsets", "Pass [0] for a batch without clips")
    if inputs.blocks is not None:
        _check_blocks(arguments, inputs)


def _check_blocks(arguments: Arguments, inputs: BlockAttentionInputs) -> None:
    arguments.index("blocks", inputs.blocks, "slots 3")
    needed = (inputs.q.shape[0] // inputs.context_size + inputs.cu_seqlens.shape[0], 3)
    if inputs.blocks.shape != needed or not inputs.blocks.is_contiguous():
        arguments.refuse(
            f"blocks has shape {tuple(inputs.blocks.shape)} and strides {tuple(inputs.blocks.stride())}",
            f"{needed}, total_frames // context_size + clips + 1 slots, contiguous",
            "Make it with attention_blocks from the same cu_seqlens, total_frames and context_size",
        )


@called_with(BlockAttentionInputs)
def block_attention_reference(inputs: BlockAttentionInputs) -> torch.Tensor:
    """`block_attention` in PyTorch, clip by clip: a clip's bits do not depend on its neighbours.

    With gradients, blocks of similar length from all clips are computed together: training sees many short clips at a time.
    """
    dtype, frames = inputs.q.dtype, inputs.q.shape[0]
    scale = inputs.q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
    q, k, v, rel_pos_emb = (tensor.to(accumulator(dtype)) for tensor in (inputs.q, inputs.k, inputs.v, inputs.rel_pos_emb))
    clips = bounds(inputs.cu_seqlens, frames)
    total = clips[-1][1] if clips else 0
    together = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, rel_pos_emb))
    groups = chain.from_iterable(_groups(some, inputs.context_size) for some in ([clips] if together else zip(clips)))
    pieces, order = [], []
    for firsts, lengths in groups:
        longest, end = lengths[0], firsts[-1] + lengths[-1]
        if lengths[-1] == longest and end - firsts[0] == len(firsts) * longest:
            # (blocks, num_heads, length, dim_head): views, because these blocks are adjacent.
            blocks = (tensor[firsts[0] : end].unflatten(0, (-1, longest)).transpose(1, 2) for tensor in (q, k, v))
            pieces.append(_attend(*blocks, rel_pos_emb, scale, None).transpose(1, 2).flatten(0, 1))
            order.append(torch.arange(firsts[0], end))
            continue
        first, length = torch.tensor(firsts)[:, None], torch.tensor(lengths)[:, None]
        place = torch.arange(longest)
        exists = place < length
        # Past a block's end, repeat its last frame: it is masked, but must not be another block's NaN.
        rows = (first + torch.minimum(place, length - 1)).to(q.device)
        blocks = (tensor[rows].transpose(1, 2) for tensor in (q, k, v))
        attended = _attend(*blocks, rel_pos_emb, scale, exists.to(q.device)).transpose(1, 2)
        pieces.append(attended.flatten(0, 1)[exists.flatten().nonzero().squeeze(1).to(q.device)])
        order.append((first + place)[exists])
    out = join(pieces, q[total:])
    places = torch.cat([*order, torch.arange(total, frames)])
    if len(order) > 1 and (places[1:] < places[:-1]).any():
        out = out[torch.argsort(places).to(q.device)]
    return out.to(dtype)


def _groups(clips: Iterable[tuple[int, int]], context_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """First frames and lengths of the blocks to compute together, longest first. None is shorter than 3/4 of the longest."""
    blocks = [(min(context_size, end - first), first) for begin, end in clips for first in range(begin, end, context_size)]
    blocks.sort(key=lambda block: (-block[0], block[1]))
    group: list[tuple[int, int]] = []
    for block in blocks:
        if group and (4 * block[0] < 3 * group[0][0] or block[0] < group[0][0] == context_size):
            yield [first for _, first in group], [length for length, _ in group]
            group = []
        group.append(block)
    if group:
        yield [first for _, first in group], [length for length, _ in group]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_pos_emb: torch.Tensor, scale: float, exists: torch.Tensor | None
) -> torch.Tensor:
    """Attention over blocks (blocks, num_heads, length, dim_head). `exists` (blocks, length) masks frames; None keeps all."""
    length, max_pos_emb = q.shape[2], rel_pos_emb.shape[0] // 2
    # Frame i needs the rows for the distances i - j. With the keys in reverse order, these rows are a window of rel_pos_emb that
    # starts at i, so no (length, length, dim_head) table has to be gathered. Softmax does not depend on the order of keys.
    k, v = k.flip(2), v.flip(2)
    band = rel_pos_emb[max_pos_emb - length + 1 : max_pos_emb + length]
    windows = band.unfold(0, length, 1)  # (length, dim_head, length): frame i, feature, key from last to first
    q = q * scale
    scores = q @ k.transpose(2, 3) + torch.einsum("bhid,idj->bhij", q, windows)
    if exists is not None:
        scores = scores.masked_fill(~exists.flip(1)[:, None, None], -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


@called_with(BlockAttentionInputs)
def block_attention_cost(inputs: BlockAttentionInputs) -> Cost:
    """FLOPs: three products (q·k, q·rel_pos_emb, weights·v) for each pair of frames in a block, without the softmax. Bytes: q, k
    and v of the clips' frames, the result, cu_seqlens, and the rows of rel_pos_emb whose distances occur."""
    frames, num_heads, dim_head = inputs.q.shape
    lengths = [length for _, lengths in _groups(bounds(inputs.cu_seqlens, frames), inputs.context_size) for length in lengths]
    pairs, read = sum(length * length for length in lengths), sum(lengths)
    band = 2 * max(lengths) - 1 if lengths else 0
    moved = (3 * read + frames) * num_heads * dim_head + band * dim_head
    return Cost(flops=6 * pairs * num_heads * dim_head, bytes=moved * inputs.q.element_size() + nbytes(inputs.cu_seqlens))


@called_with(BlockAttentionInputs)
def block_attention_library(inputs: BlockAttentionInputs) -> Callable[[], torch.Tensor]:
    """SDPA over blocks that are already cut and padded, with the position bias already in the mask."""
    q, context_size = inputs.q, inputs.context_size
    blocks = sum(-(-(end - first) // context_size) for first, end in bounds(inputs.cu_seqlens, q.shape[0]))
    padded = [one.new_empty(blocks, context_size, *one.shape[1:]).normal_().transpose(1, 2).contiguous() for one in (q, inputs.k, inputs.v)]
    bias = q.new_empty(blocks, q.shape[1], context_size, context_size).normal_()
    return partial(F.scaled_dot_product_attention, *padded, attn_mask=bias, scale=inputs.scale)


def _make(
    draw: Draw, *, clips: tuple[int, ...], num_heads: int, dim_head: int, context_size: int, max_pos_emb: int, padding: int = 0
) -> dict[str, Any]:
    total = sum(clips)
    # Three parts of one projection, as the model passes them.
    projected = draw.normal(total + padding, 3 * num_heads * dim_head)
    projected[total:] = torch.nan
    q, k, v = (part.unflatten(1, (num_heads, dim_head)) for part in projected.chunk(3, dim=1))
    rel_pos_emb = draw.normal(2 * max_pos_emb + 1, dim_head, std=0.5)
    # NaN for distances that do not occur, to catch offsets that are wrong by one.
    rel_pos_emb[: max_pos_emb - context_size + 1] = torch.nan
    rel_pos_emb[max_pos_emb + context_size :] = torch.nan
    return {"q": q, "k": k, "v": v, "rel_pos_emb": rel_pos_emb, "cu_seqlens": draw.cu_seqlens(clips), "context_size": context_size}


def _case(name: str, clips: tuple[int, ...], heads: int, dim: int, context: int, max_pos: int, padding: int = 0, released=False) -> Case:
    shape = {"clips": clips, "num_heads": heads, "dim_head": dim, "context_size": context, "max_pos_emb": max_pos, "padding": padding}
    return Case(name, _make, shape, released)


CASES = (
    _case("encoder, 10 s", (500,), 8, 128, 200, 512, released=True),
    _case("encoder, 30 s", (1500,), 8, 128, 200, 512, released=True),
    _case("encoder, 8 clips to 30 s", (150, 330, 500, 720, 900, 1111, 1400, 1500), 8, 128, 200, 512, released=True),
    _case("encoder, 128 clips of 10 s", (500,) * 128, 8, 128, 200, 512, released=True),
    _case("turboctc encoder, 128 clips of 10 s", (500,) * 128, 8, 128, 128, 512, released=True),
    _case("whole blocks", (16, 32), 2, 16, 16, 16),
    _case("context does not divide", (37, 5, 16, 50), 2, 32, 16, 24),
    _case("odd head dim 40", (23, 41), 3, 40, 20, 33),
    _case("odd head dim 80", (19, 8), 2, 80, 7, 7),
    _case("one frame", (1,), 2, 16, 8, 8),
    _case("blocks of one frame", (3, 4), 2, 16, 1, 4),
    _case("released head dim, short clips", (51, 3), 1, 128, 50, 512),
    _case("empty clips", (0, 9, 0, 0, 20, 0), 2, 16, 8, 12),
    _case("equal lengths and one close to them", (8, 7, 4, 7, 6), 2, 16, 16, 16),
    _case("padding rows", (11, 21), 2, 32, 16, 16, padding=5),
    _case("only empty clips", (0, 0), 2, 16, 8, 8),
    _case("no clips, padding rows", (), 2, 16, 8, 8, padding=3),
    _case("no clips", (), 2, 16, 8, 8),
)

OPERATION = Operation(
    name="block_attention",
    call=block_attention,
    reference=block_attention_reference,
    cost=block_attention_cost,
    cases=CASES,
    library=block_attention_library,
    differentiable=("q", "k", "v", "rel_pos_emb"),
    packed=("q", "k", "v"),
    triton=triton_backend("block_attention"),
    has_cpu=True,
)
