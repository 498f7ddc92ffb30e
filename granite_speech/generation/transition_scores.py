"""The scores of the tokens that `generate` chose, from its scores of all tokens."""

import torch
from torch import Tensor

from granite_speech.errors import InputError

__all__ = ["transition_scores"]


def transition_scores(sequences: Tensor, scores: tuple[Tensor, ...], beam_indices: Tensor | None, normalize_logits: bool) -> Tensor:
    """`(rows, new tokens)`; with beams, 0 after an answer's end.

    Args:
        sequences: `(rows, columns)`, whose last columns are the new tokens.
        scores: of each step, `(rows or beams, vocabulary)`.
        beam_indices: `(rows, new tokens)`, the beam that each token was added to and −1 after an end; None: token i of a row has
            the scores of that row.
        normalize_logits: return log-probabilities.

    Raises:
        InputError: no scores.
    """
    if not scores:
        raise InputError(
            got="no scores",
            expected="those of generate",
            remedy="Call generate with return_dict_in_generate=True and output_scores=True, then pass output.scores",
        )
    steps = torch.stack(tuple(scores))
    if normalize_logits:
        steps = steps.log_softmax(-1)
    if beam_indices is None:
        beam_indices = torch.arange(steps.shape[1], device=sequences.device)[:, None].expand(-1, len(steps))
    longest = int((beam_indices >= 0).sum(1).max())
    beams = beam_indices[:, :longest].long()
    tokens = sequences[:, sequences.shape[1] - longest :]
    step = torch.arange(longest, device=sequences.device)
    return steps[step, beams.clamp(min=0), tokens].masked_fill(beams < 0, 0.0)
