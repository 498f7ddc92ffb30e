"""Greedy CTC decoding: each frame's best token, its log-probability and entropy, and each clip's tokens with their frames."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, bounds, called_with, nbytes, triton_backend

# The reference widens this many logits at a time, at most: 2 MB, which stay in a cache.
_WIDENED = 2**19


class CtcGreedyInputs(NamedTuple):
    """The arguments of `ctc_greedy` except `impl`."""

    logits: torch.Tensor
    cu_seqlens: torch.Tensor
    blank: int = 0


class CtcGreedy(NamedTuple):
    """What `ctc_greedy` returns, on the device of the logits. The first three are of frames, the others of tokens.

    A token is a run of frames with one id, which is not the blank. Row n of a clip has its n-th token; rows after its last have none.

    Attributes:
        ids: `(rows,)` int32, the id with the largest logit, and of several the lowest. −1 for padding.
        logprobs: `(rows,)` float32, its natural log-probability. 0 for padding.
        entropy: `(rows,)` float32, of the frame's distribution, in nats. 0 for padding.
        tokens: `(rows,)` int32, the tokens' ids. −1 for a row without a token.
        token_logprobs: `(rows,)` float32, the largest of the token's frames. 0 without a token.
        first_frames, last_frames: `(rows,)` int32, the token's first and last frame, counted from its clip's first. −1 without a token.
        counts: `(clips,)` int32, tokens of each clip.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor
    token_logprobs: torch.Tensor
    first_frames: torch.Tensor
    last_frames: torch.Tensor
    counts: torch.Tensor


def ctc_greedy(logits: torch.Tensor, cu_seqlens: torch.Tensor, *, blank: int = 0, impl: str | None = None) -> CtcGreedy:
    """The best path of each clip: argmax, repeats merged, blanks dropped. Nothing waits for the device. Inference only.

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | logits | (rows, vocab) | last 1, first free | any float |
    | cu_seqlens | (clips + 1,) | 1 | int32 |
    | returns | `CtcGreedy` | contiguous | int32 and float32 (float64 for float64) |

    Repeats are merged only within a clip. Rows from `cu_seqlens[-1]` on are padding and never read. A row is read once, and widened to
    float32 only in registers. In Triton a row and a clip get the same bits whatever the other rows are.

    As in `torch.argmax`, NaN is larger than any number: a row with NaN has the column of the first as its id, and its log-probability and
    entropy are NaN; so is the log-probability of the token. They are NaN, too, if the largest logit is infinite. A logit of −∞ is a
    probability of 0.

    Args:
        blank: the id that separates tokens.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, no columns, a blank that is no column, or a gradient would be needed.

    The path is that of Graves et al., Connectionist Temporal Classification (ICML 2006), section 3.2.
    """
    inputs = CtcGreedyInputs(logits, cu_seqlens, blank)
    _check(inputs)
    return CtcGreedy(*OPERATION.select(impl, logits)(*inputs))


def _check(inputs: CtcGreedyInputs) -> None:
    logits, cu_seqlens, blank = inputs
    arguments = Arguments("ctc_greedy")
    arguments.tensor("logits", logits, "rows vocab")
    arguments.index("cu_seqlens", cu_seqlens, "clips+1")
    if cu_seqlens.shape[0] == 0:
        arguments.refuse("cu_seqlens is empty", "clips + 1 offsets", "Pass [0] for a batch without clips")
    if logits.shape[1] == 0:
        arguments.refuse("logits has no columns", "one for each token", "Pass the output of the CTC head")
    if isinstance(blank, bool) or not isinstance(blank, int) or not 0 <= blank < logits.shape[1]:
        last = logits.shape[1] - 1
        arguments.refuse(f"blank {blank!r}", f"an integer from 0 to {last}, a column of logits", "Pass the model's pad_token_id")
    arguments.refuse_gradients(logits=logits)


@called_with(CtcGreedyInputs)
def ctc_greedy_reference(inputs: CtcGreedyInputs) -> tuple[torch.Tensor, ...]:
    """The fields of `CtcGreedy`, in PyTorch."""
    logits, cu_seqlens, blank = inputs
    rows, clips = logits.shape[0], cu_seqlens.shape[0] - 1
    spans = bounds(cu_seqlens, rows)
    used = spans[-1][1] if spans else 0
    ids, logprobs, entropy = (_padded(one, rows, fill) for one, fill in zip(_best(logits[:used]), (-1, 0, 0), strict=True))

    # Runs of frames with one id, each within a clip.
    frame_ids, lengths, starts = ids[:used], cu_seqlens.diff().long(), cu_seqlens[:-1].long()
    clip_of = torch.arange(clips, device=ids.device).repeat_interleave(lengths)
    begins = torch.ones(used, dtype=torch.bool, device=ids.device)
    begins[1:] = (frame_ids[1:] != frame_ids[:-1]) | (clip_of[1:] != clip_of[:-1])
    first, run = begins.nonzero()[:, 0], begins.cumsum(0) - 1
    last = F.pad(first[1:] - 1, (0, 1), value=used - 1)[: first.shape[0]]
    highest = logprobs.new_empty(first.shape[0]).scatter_reduce(0, run, logprobs[:used], "amax", include_self=False)

    # The runs of tokens, and the row of each.
    kept = frame_ids[first] != blank
    first, last, highest = first[kept], last[kept], highest[kept]
    clip = clip_of[first]
    counts = clip.bincount(minlength=clips)
    places = starts[clip] + torch.arange(first.shape[0], device=ids.device) - (counts.cumsum(0) - counts)[clip]
    values = (ids[first], highest, (first - starts[clip]).to(torch.int32), (last - starts[clip]).to(torch.int32))
    tokens = (value.new_full((rows,), fill).index_copy(0, places, value) for value, fill in zip(values, (-1, 0, -1, -1), strict=True))
    return ids, logprobs, entropy, *tokens, counts.to(torch.int32)


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best id of each row, its log-probability, and the row's entropy."""
    pieces = []
    for part in logits.split(max(_WIDENED // logits.shape[1], 1)):
        ids = part.max(dim=1, keepdim=True).indices  # on a CPU faster than argmax
        logprobs = part.to(accumulator(part.dtype)).log_softmax(dim=1)
        least = torch.finfo(logprobs.dtype).min  # a probability of 0 times −∞ is NaN
        entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs.clamp(min=least), dim=1)
        pieces.append((ids[:, 0].to(torch.int32), logprobs.gather(1, ids)[:, 0], entropy))
    return tuple(map(torch.cat, zip(*pieces, strict=True)))


def _padded(values: torch.Tensor, rows: int, fill: int) -> torch.Tensor:
    return F.pad(values, (0, rows - values.shape[0]), value=fill)


@called_with(CtcGreedyInputs)
def ctc_greedy_cost(inputs: CtcGreedyInputs) -> Cost:
    """FLOPs: of each logit a difference, an exponential, a sum and a multiply-add. Bytes: the clips' logits and every result, once."""
    logits, cu_seqlens, _ = inputs
    used = sum(end - first for first, end in bounds(cu_seqlens, logits.shape[0]))
    width = accumulator(logits.dtype).itemsize
    results = logits.shape[0] * (4 * 4 + 3 * width) + 4 * (cu_seqlens.shape[0] - 1)
    read = used * logits.shape[1]
    return Cost(flops=5 * read, bytes=read * logits.element_size() + nbytes(cu_seqlens) + results)


@called_with(CtcGreedyInputs)
def ctc_greedy_library(inputs: CtcGreedyInputs) -> Callable[[], torch.Tensor]:
    """The argmax alone."""
    return partial(torch.argmax, inputs.logits, dim=1)


def _make(draw: Draw, *, clips: tuple[int, ...], vocab: int, blank: int = 0, padding: int = 0) -> dict[str, Any]:
    """A third of the frames is blank, and a third repeats the frame before it."""
    total = sum(clips)
    logits = draw.normal(total + padding, vocab)
    if not logits.is_meta:
        kind = torch.randint(3, (total,), generator=draw.rng)
        path = torch.randint(vocab, (total,), generator=draw.rng).masked_fill(kind == 0, blank)
        fresh = torch.where(kind == 1, 0, torch.arange(total)).cummax(0).values
        logits[torch.arange(total), path[fresh].to(logits.device)] += 6
        logits[total:] = torch.nan
    return {"logits": logits, "cu_seqlens": draw.cu_seqlens(clips), "blank": blank}


def _case(name: str, clips: tuple[int, ...], vocab: int, *, released: bool = False, **options: Any) -> Case:
    return Case(name, _make, {"clips": clips, "vocab": vocab, **options}, released)


CASES = (
    _case("turboctc, 30 s", (375,), 16384, released=True),
    _case("turboctc, 8 clips to 30 s", (37, 82, 125, 180, 225, 277, 350, 375), 16384, released=True),
    _case("turboctc, 128 clips of 10 s", (125,) * 128, 16384, released=True),
    _case("3.3 characters, 128 clips of 10 s", (500,) * 128, 256, released=True),
    _case("4.1 characters, 128 clips of 10 s", (500,) * 128, 348, released=True),
    _case("4.1 words, 10 s", (500,), 100353, released=True),
    _case("several clips", (9, 1, 14), 37),
    _case("two columns, the last is blank", (8, 5), 2, blank=1),
    _case("one column", (3,), 1),
    _case("padding rows", (5, 7), 20, padding=4),
    _case("empty clips", (0, 6, 0, 0, 3, 0), 11, blank=4),
    _case("longer than a block of frames", (300, 140), 5),
    _case("no clips, padding rows", (), 9, padding=3),
    _case("no rows", (), 9),
)

OPERATION = Operation(
    name="ctc_greedy",
    call=ctc_greedy,
    reference=ctc_greedy_reference,
    cost=ctc_greedy_cost,
    cases=CASES,
    library=ctc_greedy_library,
    triton=triton_backend("ctc_greedy"),
)
