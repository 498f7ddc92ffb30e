"""`finish_step` on a CPU, where the host may read: what is one number for each row is computed in Python, for which an operation of
PyTorch takes twenty times as long."""

import torch
from torch import Tensor

from granite_kernels.finish_step import FinishStepInputs, chosen_tokens, finish_step_reference
from granite_kernels.op import called_with

_MOST = 64  # rows; for more, operations are faster


@called_with(FinishStepInputs)
def finish_step_cpu(inputs: FinishStepInputs) -> Tensor:
    """`finish_step` for CPU tensors."""
    _, _, _, tokens, history, logprobs, active, kv_lens, limits, ends, _ = inputs
    if inputs.scores.shape[0] > _MOST:
        return finish_step_reference(*inputs)
    chosen, logprob = chosen_tokens(inputs)
    logprobs.copy_(logprob)
    tokens.copy_(chosen)
    values, going = chosen.tolist(), active.tolist()
    history.copy_(torch.tensor([value if one > 0 else -1 for value, one in zip(values, going, strict=True)], dtype=torch.int64))
    rows = zip(going, values, ends.tolist(), kv_lens.tolist(), limits.tolist(), strict=True)
    stays = [one if value not in its_ends and length < limit else 0 for one, value, its_ends, length, limit in rows]
    active.copy_(torch.tensor(stays, dtype=torch.int32))
    return chosen
