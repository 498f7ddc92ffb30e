"""The blocks of a packed batch that block attention works on, as a table: made once per batch, read in every layer."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, called_with, nbytes, triton_backend


class AttentionBlocksInputs(NamedTuple):
    """The arguments of `attention_blocks` except `impl`."""

    cu_seqlens: torch.Tensor
    total_frames: int
    context_size: int


def attention_blocks(cu_seqlens: torch.Tensor, *, total_frames: int, context_size: int, impl: str | None = None) -> torch.Tensor:
    """Where each block of `context_size` frames begins and how long it is, for `block_attention`.

    Clip c is cut into blocks from its own first frame, and its blocks have the slots from `cu_seqlens[c] // context_size + c` on. The
    frames after the last clip are cut in the same way. So every block has a slot that follows from its clip alone, and a few slots
    remain idle.

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | cu_seqlens | (clips + 1,) | 1 | int32 |
    | returns | (total_frames // context_size + clips + 1, 3) | contiguous | int32 |

    A row of the result is the first frame of a block, its rows, and its frames that belong to a clip: as many as it has rows, or none
    if the block is padding. In an idle slot all three are 0.

    Args:
        total_frames: rows of the batch, padding included, known to the host.
        context_size: frames per block.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: cu_seqlens has another shape, dtype or stride or is empty, total_frames is below 0, or context_size below 1.
    """
    inputs = AttentionBlocksInputs(cu_seqlens, total_frames, context_size)
    _check(inputs)
    return OPERATION.select(impl, cu_seqlens)(*inputs)


def _check(inputs: AttentionBlocksInputs) -> None:
    arguments = Arguments("attention_blocks")
    arguments.tensor("cu_seqlens", inputs.cu_seqlens, "clips+1", (torch.int32,))
    if inputs.cu_seqlens.shape[0] == 0:
        arguments.refuse("cu_seqlens is empty", "clips + 1 offsets", "Pass [0] for a batch without clips")
    for name, least in (("total_frames", 0), ("context_size", 1)):
        value = getattr(inputs, name)
        if not isinstance(value, int | torch.SymInt):
            arguments.refuse(f"{name} is of type {type(value).__name__}", "an integer", f"Pass {name} as a number that the host knows")
        if value < least:
            arguments.refuse(f"{name}={value}", f"{least} or more", "Pass the rows of q and the encoder's context_size")


@called_with(AttentionBlocksInputs)
def attention_blocks_reference(inputs: AttentionBlocksInputs) -> torch.Tensor:
    """`attention_blocks` in PyTorch, without reading a value on the host."""
    cu_seqlens, context_size = inputs.cu_seqlens, inputs.context_size
    clips = cu_seqlens.shape[0] - 1
    starts = cu_seqlens // context_size + torch.arange(clips + 1, dtype=torch.int32, device=cu_seqlens.device)
    slot = torch.arange(inputs.total_frames // context_size + clips + 1, dtype=torch.int32, device=cu_seqlens.device)
    clip = torch.searchsorted(starts, slot, right=True) - 1
    end = torch.cat([cu_seqlens[1:], cu_seqlens.new_full((1,), inputs.total_frames)])[clip]
    first = cu_seqlens[clip] + (slot - starts[clip]) * context_size
    rows = (end - first).clamp(0, context_size)
    return torch.stack([torch.where(rows > 0, first, 0), rows, torch.where(clip < clips, rows, 0)], dim=1).to(torch.int32)


@called_with(AttentionBlocksInputs)
def attention_blocks_cost(inputs: AttentionBlocksInputs) -> Cost:
    """FLOPs: a product and two sums for each slot, on integers. Bytes: cu_seqlens and the result."""
    slots = inputs.total_frames // inputs.context_size + inputs.cu_seqlens.shape[0]
    return Cost(flops=3 * slots, bytes=12 * slots + nbytes(inputs.cu_seqlens))


@called_with(AttentionBlocksInputs)
def attention_blocks_library(inputs: AttentionBlocksInputs) -> Callable[[], torch.Tensor]:
    """The search for the clip of each slot's first frame alone."""
    frames = torch.arange(0, inputs.total_frames + 1, inputs.context_size, dtype=torch.int32, device=inputs.cu_seqlens.device)
    return partial(torch.searchsorted, inputs.cu_seqlens, frames, right=True)


def _make(draw: Draw, *, clips: tuple[int, ...], context_size: int, after: int = 0) -> dict[str, Any]:
    """`after`: padding frames after the last clip."""
    return {"cu_seqlens": draw.cu_seqlens(clips), "total_frames": sum(clips) + after, "context_size": context_size}


def _case(name: str, clips: tuple[int, ...], context_size: int, after: int = 0, released: bool = False) -> Case:
    return Case(name, _make, {"clips": clips, "context_size": context_size, "after": after}, released)


CASES = (
    _case("encoder, 10 s", (500,), 200, released=True),
    _case("encoder, 8 clips to 30 s", (150, 330, 500, 720, 900, 1111, 1400, 1500), 200, released=True),
    _case("encoder, 128 clips of 10 s", (500,) * 128, 200, released=True),
    _case("turboctc encoder, 128 clips of 10 s", (500,) * 128, 128, released=True),
    _case("one clip", (37,), 16),
    _case("whole blocks and padding", (32, 16), 16, after=16),
    _case("context does not divide", (37, 5, 16, 50), 16, after=21),
    _case("empty clips", (0, 9, 0, 0, 20, 0), 8),
    _case("more blocks than a tile", (700, 1, 300), 7, after=400),
    _case("blocks of one frame", (3, 4), 1, after=2),
    _case("no clips, padding", (), 8, after=19),
    _case("no frames", (0, 0), 8),
    _case("no clips", (), 8),
)

OPERATION = Operation(
    name="attention_blocks",
    call=attention_blocks,
    reference=attention_blocks_reference,
    cost=attention_blocks_cost,
    cases=CASES,
    library=attention_blocks_library,
    triton=triton_backend("attention_blocks"),
)
