"""The end of a greedy decode step: each row's best token and its log-probability are recorded, and complete rows stop."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from granite_kernels.op import FLOAT_DTYPES, Arguments, Case, Cost, Draw, Operation, accumulator, called_with, nbytes, triton_backend


class FinishStepInputs(NamedTuple):
    """The arguments of `finish_step` except `impl`."""

    scores: torch.Tensor
    ids: torch.Tensor | None
    logits: torch.Tensor | None
    tokens: torch.Tensor
    history: torch.Tensor
    logprobs: torch.Tensor
    active: torch.Tensor
    kv_lens: torch.Tensor
    limits: torch.Tensor
    ends: torch.Tensor
    divisor: float


def finish_step(
    scores: torch.Tensor,
    ids: torch.Tensor | None,
    logits: torch.Tensor | None,
    tokens: torch.Tensor,
    history: torch.Tensor,
    logprobs: torch.Tensor,
    active: torch.Tensor,
    kv_lens: torch.Tensor,
    limits: torch.Tensor,
    ends: torch.Tensor,
    *,
    divisor: float = 1.0,
    impl: str | None = None,
) -> torch.Tensor:
    """Choose the token with the largest score of each row, and write it to the state of the answers.

    ::

        best = the first column with the largest score
        chosen = ids[best], or best without ids
        history = chosen if active, else −1
        logprobs = (logits[best] / divisor) − log Σ_c exp(logits[c] / divisor)              scores[best] for logits[best] with ids
        tokens = chosen
        active = 0 if chosen is one of the row's ends, or kv_lens ≥ limits

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | scores | (rows, candidates), at least one candidate | last 1, first free | any float |
    | ids | (rows, candidates) tokens, or None if a candidate's column is its token | last 1, first free | int32 |
    | logits | (rows, candidates) logits, or with ids log-sum-exps of them all; None: scores | last 1, first free | any float |
    | tokens, changed | (rows,) | 1 | int64 |
    | history, changed | (rows,) | 1 | int64 |
    | logprobs, changed | (rows,) | 1 | float32 |
    | active, changed | (rows,) | 1 | int32, 0 or 1 |
    | kv_lens, limits | (rows,) | 1 | int32 |
    | ends | (rows, n) tokens, −1 for none | last 1, first free | int64 |
    | returns | (rows,) chosen tokens, also of rows that are not active | contiguous | int64 |

    `head_argmax`'s scores and ids go with its log_sums as `logits`. Scores that a rule or random numbers changed go with the model's
    logits, so that the log-probability is the model's own. If a score is NaN, which token is chosen is not defined, but it is one of the
    candidates.

    Args:
        divisor: of the logits, for the log-probability; the checkpoint's `logits_scaling` if they are not divided yet.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, no candidates, or scores or logits that need a gradient.
    """
    inputs = FinishStepInputs(scores, ids, logits, tokens, history, logprobs, active, kv_lens, limits, ends, divisor)
    _check(inputs)
    return OPERATION.select(impl, scores)(*inputs)


def _check(inputs: FinishStepInputs) -> None:
    arguments = Arguments("finish_step")
    arguments.tensor("scores", inputs.scores, "rows candidates")
    if not inputs.scores.shape[1]:
        arguments.refuse("scores has no candidates", "at least one", "Pass the scores of the vocabulary")
    if inputs.ids is not None:
        arguments.index("ids", inputs.ids, "rows candidates")
    if inputs.logits is not None:
        arguments.tensor("logits", inputs.logits, "rows candidates", FLOAT_DTYPES)
    arguments.tensor("tokens", inputs.tokens, "rows", (torch.int64,))
    arguments.tensor("history", inputs.history, "rows", (torch.int64,))
    arguments.tensor("logprobs", inputs.logprobs, "rows", (torch.float32,))
    arguments.index("active", inputs.active, "rows")
    arguments.index("kv_lens", inputs.kv_lens, "rows")
    arguments.index("limits", inputs.limits, "rows")
    arguments.tensor("ends", inputs.ends, "rows ends", (torch.int64,))
    arguments.refuse_gradients(scores=inputs.scores, logits=inputs.logits)


@called_with(FinishStepInputs)
def finish_step_reference(inputs: FinishStepInputs) -> torch.Tensor:
    """`finish_step` in PyTorch. Of equal scores, argmax returns the first."""
    _, _, _, tokens, history, logprobs, active, kv_lens, limits, ends, _ = inputs
    chosen, logprob = chosen_tokens(inputs)
    logprobs.copy_(logprob)
    history.copy_(torch.where(active > 0, chosen, -1))
    tokens.copy_(chosen)
    active.mul_(~((chosen[:, None] == ends).any(1) | (kv_lens >= limits)))
    return chosen


def chosen_tokens(inputs: FinishStepInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's best token and its log-probability, `(rows,)` int64 and float32."""
    scores, ids, logits, divisor = inputs.scores, inputs.ids, inputs.logits, inputs.divisor
    best, logits = scores.argmax(-1, keepdim=True), scores if logits is None else logits
    logits = logits.to(accumulator(logits.dtype)) / divisor
    if ids is None:
        return best[:, 0], logits.log_softmax(-1).gather(1, best)[:, 0]
    logit = scores.gather(1, best).to(logits.dtype) / divisor
    return ids.gather(1, best)[:, 0].long(), (logit - logits.logsumexp(-1, keepdim=True))[:, 0]


@called_with(FinishStepInputs)
def finish_step_cost(inputs: FinishStepInputs) -> Cost:
    """FLOPs: a comparison per score, an exponential and a sum per logit. Bytes: all tensors once, but one id per row, and active twice."""
    scores, ids, logits, tokens, history, logprobs, active, kv_lens, limits, ends, _ = inputs
    one_id = 0 if ids is None else scores.shape[0] * ids.element_size()
    state = nbytes(tokens, history, logprobs, kv_lens, limits, ends) + 2 * nbytes(active)
    flops = scores.numel() + 2 * (scores if logits is None else logits).numel()
    return Cost(flops=flops, bytes=nbytes(scores, logits) + one_id + state + nbytes(tokens))


@called_with(FinishStepInputs)
def finish_step_library(inputs: FinishStepInputs) -> Callable[[], torch.Tensor]:
    """The best columns alone."""
    return partial(torch.argmax, inputs.scores, -1)


def _make(
    draw: Draw, *, rows: int, candidates: int, with_ids: bool = False, drawn: bool = False, ends: int = 2, divisor: float = 1.0
) -> dict[str, Any]:
    """Scores with one best, which stays the only one in bfloat16, as views of a wider tensor. Of four rows one ends by its token,
    one by its limit, and one is not active. If `drawn`, the scores are random numbers for sampling, beside the logits."""
    best = torch.randint(0, candidates, (rows, 1), generator=draw.rng)
    place = torch.arange(candidates)
    logits = _padded(draw, rows, candidates, torch.float32 if with_ids else None)
    scores = _padded(draw, rows, candidates, torch.float32 if drawn else None) if with_ids or drawn else logits
    scores.copy_(torch.where((place == best).to(scores.device), 6 + scores / 8, scores))
    # Any tokens do for ids, if they differ from the columns.
    names = (3 * place + 5).expand(rows, -1)
    chosen = names.gather(1, best) if with_ids else best
    every_end = torch.full((rows, ends), -1)
    every_end[::4, -1:] = chosen[::4] if ends else 0
    every_end[1::4, :1] = chosen[1::4] + 1 if ends else 0
    return {
        "scores": scores,
        "ids": names.to(draw.device, torch.int32) if with_ids else None,
        "logits": logits if with_ids or drawn else None,
        "tokens": torch.full((rows,), -7, device=draw.device),
        "history": torch.full((rows,), -9, device=draw.device),
        "logprobs": draw.normal(rows, dtype=torch.float32),
        "active": draw.int32([int(row % 4 != 3) for row in range(rows)]),
        "kv_lens": draw.int32([10 + row for row in range(rows)]),
        "limits": draw.int32([10 + row + (row % 4 != 2) for row in range(rows)]),
        "ends": every_end.to(draw.device),
        "divisor": divisor,
    }


def _padded(draw: Draw, rows: int, candidates: int, dtype: torch.dtype | None) -> torch.Tensor:
    """As the head's logits, whose rows are padded."""
    wide = draw.normal(rows, (candidates // 64 + 1) * 64, dtype=dtype)
    wide[:, candidates:] = torch.nan
    return wide[:, :candidates]


def _case(name: str, rows: int, candidates: int, *, released: bool = False, **options: Any) -> Case:
    return Case(name, _make, {"rows": rows, "candidates": candidates, **options}, released)


CASES = (
    _case("4.1-2b, 1 row, a best per tile", 1, 12545, released=True, with_ids=True),
    _case("4.1-2b, 8 rows, a best per tile", 8, 12545, released=True, with_ids=True),
    _case("4.1-2b, 1 row", 1, 100353, released=True),
    _case("4.1-2b, 128 rows", 128, 100353, released=True, divisor=8.0),
    _case("4.1-2b, 128 rows, drawn", 128, 100353, released=True, drawn=True),
    _case("3.3-2b, 128 rows", 128, 49160, released=True, divisor=8.0),
    _case("with ids", 9, 50, with_ids=True),
    _case("without ids", 6, 37, divisor=3.0),
    _case("drawn", 7, 41, drawn=True, divisor=2.0),
    _case("no ends", 4, 33, ends=0),
    _case("one end", 8, 20, with_ids=True, ends=1),
    _case("one candidate", 3, 1),
    _case("no rows", 0, 12),
)

OPERATION = Operation(
    name="finish_step",
    call=finish_step,
    reference=finish_step_reference,
    cost=finish_step_cost,
    cases=CASES,
    library=finish_step_library,
    has_cpu=True,
    triton=triton_backend("finish_step"),
    mutates=("tokens", "history", "logprobs", "active"),
    wide=("logits", "logprobs"),
)
