"""`finish_step` on a CPU, where the host may read: what is one number for each row is computed in Python, for which an operation of
PyTorch takes twenty times as long."""

import torch
from torch import Tensor

from granite_kernels.finish_step import FinishStepInputs, finish_step_reference
from granite_kernels.op import accumulator, called_with

_MOST = 64  # rows; for more, operations are faster


@called_with(FinishStepInputs)
def finish_step_cpu(inputs: FinishStepInputs) -> Tensor:
    """`finish_step` for CPU tensors."""
    scores, ids, logits, tokens, history, logprobs, active, kv_lens, limits, ends, divisor = inputs
    if scores.shape[0] > _MOST:
        return finish_step_reference(*inputs)
    best, logits = scores.argmax(-1, keepdim=True), scores if logits is None else logits
    logits = logits.to(accumulator(logits.dtype)) / divisor
    if ids is None:
        chosen, logprob = best, logits.log_softmax(-1).gather(1, best)
    else:
        chosen, logit = ids.gather(1, best).long(), scores.gather(1, best).to(logits.dtype) / divisor
        logprob = logit - logits.logsumexp(-1, keepdim=True)
    chosen = chosen[:, 0]
    logprobs.copy_(logprob[:, 0])
    tokens.copy_(chosen)
    values, going = chosen.tolist(), active.tolist()
    history.copy_(torch.tensor([value if one > 0 else -1 for value, one in zip(values, going, strict=True)], dtype=torch.int64))
    rows = zip(going, values, ends.tolist(), kv_lens.tolist(), limits.tolist(), strict=True)
    stays = [one if value not in its_ends and length < limit else 0 for one, value, its_ends, length, limit in rows]
    active.copy_(torch.tensor(stays, dtype=torch.int32))
    return chosen
