"""Rules that look at the tokens of a row so far, as small classes: `(ids, scores)` → scores.

`ids` are `(rows, columns)` int64, prompt and answer, −1 for padding; scores are `(rows, vocabulary)` float32. Behaviour and
arithmetic are those of transformers 5.17's logits processors, whose names the classes have: a processor that the caller passes
replaces the built-in one of the same name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.generation.sampling import penalize, seen_tokens
from granite_speech.modules.transfers import on_device

__all__ = [
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
]

_NEVER = float("-inf")


def _seen(ids: Tensor, vocab_size: int) -> Tensor:
    return seen_tokens(ids, ids >= 0, vocab_size)[:, :-1]


def _without(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Forbid these tokens; those that the vocabulary does not have are ignored."""
    inside = [one for one in tokens if 0 <= one < scores.shape[1]]
    return scores.index_fill(1, on_device(inside, scores.device, torch.int64), _NEVER) if inside else scores


def _alone(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Forbid all but these tokens."""
    return torch.full_like(scores, _NEVER).index_fill(1, on_device(list(tokens), scores.device, torch.int64), 0.0)


def _completing(ids: Tensor, context: Tensor, size: int, vocab_size: int) -> Tensor:
    """`(rows, vocabulary)` bool: tokens that, after the last `size − 1` of `ids`, give a sequence that `context` has."""
    found = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
    if context.shape[1] >= size and ids.shape[1] >= size - 1:
        windows, latest = context.unfold(1, size, 1), ids[:, ids.shape[1] + 1 - size :]
        last = windows[..., -1]
        matches = (windows[..., :-1] == latest.unsqueeze(1)).all(-1) & (last >= 0) & (last < vocab_size)
        found.scatter_(1, torch.where(matches, last, vocab_size), True)
    return found[:, :-1]


class SequenceBiasLogitsProcessor:
    """Adds a number to the score of a sequence's last token where the others are the newest tokens of the row."""

    def __init__(self, biases: Sequence[tuple[tuple[int, ...], float]]):
        self._biases = biases

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        bias = torch.zeros_like(scores)
        for (*before, last), value in self._biases:
            self._check(last, scores.shape[1])
            if len(before) < ids.shape[1] or not before:
                latest = ids[:, ids.shape[1] - len(before) :]
                matches = (latest == on_device(before, ids.device, torch.int64)).all(1)
                bias[:, last] += torch.where(matches, value, 0.0)
        return scores + bias

    def _check(self, token: int, vocab_size: int) -> None:
        if token >= vocab_size:
            raise InputError(got=f"a sequence with token {token}", expected=f"ids below {vocab_size}", remedy="Use the model's tokenizer")


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Forbids sequences. An end token alone is never forbidden."""

    def __init__(self, sequences: Sequence[tuple[int, ...]], ends: Sequence[int]):
        super().__init__([(one, _NEVER) for one in sequences if len(one) > 1 or one[0] not in ends])


class EncoderRepetitionPenaltyLogitsProcessor:
    """Makes the tokens of the prompt likelier, above 1."""

    def __init__(self, penalty: float, prompt: Tensor):
        self._penalty, self._prompt = 1 / penalty, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return penalize(scores, _seen(self._prompt, scores.shape[1]), self._penalty)


class RepetitionPenaltyLogitsProcessor:
    """Makes the tokens of prompt and answer less likely, above 1."""

    def __init__(self, penalty: float):
        self._penalty = penalty

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return penalize(scores, _seen(ids, scores.shape[1]), self._penalty)


class NoRepeatNGramLogitsProcessor:
    """Forbids the tokens that would repeat a sequence of this length."""

    def __init__(self, size: int):
        self._size = size

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(_completing(ids, ids, self._size, scores.shape[1]), _NEVER)


class EncoderNoRepeatNGramLogitsProcessor:
    """Forbids the tokens that would repeat a sequence of the prompt."""

    def __init__(self, size: int, prompt: Tensor):
        self._size, self._prompt = size, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(_completing(ids, self._prompt, self._size, scores.shape[1]), _NEVER)


class MinNewTokensLengthLogitsProcessor:
    """Forbids the end before an answer has this many tokens."""

    def __init__(self, columns: int, least: int, ends: Sequence[int]):
        self._from, self._ends = columns + least, ends

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return _without(scores, self._ends) if ids.shape[1] < self._from else scores


class PrefixConstrainedLogitsProcessor:
    """Allows the tokens that a function of the prompt's number and the row's tokens, padding included, returns.

    Constrained decoding of entity names (De Cao et al., arXiv 2010.00904).
    """

    def __init__(self, allowed: Callable[[int, Tensor], Any], num_beams: int):
        self._allowed, self._num_beams = allowed, num_beams

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        forbidden = torch.full_like(scores, _NEVER)
        for row, tokens in enumerate(ids):
            allowed = torch.as_tensor(self._allowed(row // self._num_beams, tokens), dtype=torch.int64)
            if allowed.numel() == 0:
                raise InputError(
                    got=f"no allowed token from prefix_allowed_tokens_fn for prompt {row // self._num_beams}",
                    expected="at least one",
                    remedy="Let it return the end token where nothing may follow",
                )
            forbidden[row, on_device(allowed.flatten(), scores.device)] = 0.0
        result = scores + forbidden
        # Where other rules forbid every allowed token of a prompt, this rule wins, as in transformers 5.23.
        is_stuck = result.amax(dim=1).isneginf().view(-1, self._num_beams).all(dim=1).repeat_interleave(self._num_beams)
        return torch.where(is_stuck[:, None], forbidden, result)


class ForcedBOSTokenLogitsProcessor:
    """Forces the second column of prompt and answer, which follows a prompt of one token."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens = tokens

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return _alone(scores, self._tokens) if ids.shape[1] == 1 else scores


class ForcedEOSTokenLogitsProcessor:
    """Forces the token in the last column that an answer may have."""

    def __init__(self, columns: int, tokens: Sequence[int]):
        self._columns, self._tokens = columns, tokens

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return _alone(scores, self._tokens) if ids.shape[1] == self._columns - 1 else scores


class InfNanRemoveLogitsProcessor:
    """Replaces scores that are not finite: NaN by 0, infinities by the largest and smallest number."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.nan_to_num(nan=0.0)


class ExponentialDecayLengthPenalty:
    """Makes end tokens likelier with each token after the first `start` of an answer, by a factor to their number."""

    def __init__(self, start: int, factor: float, columns: int, ends: Sequence[int]):
        self._start, self._factor, self._ends = columns + start, factor, ends

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        late = ids.shape[1] - self._start
        inside = [one for one in self._ends if 0 <= one < scores.shape[1]]
        if late <= 0 or not inside:
            return scores
        ends = on_device(inside, scores.device, torch.int64)
        raised = scores[:, ends].abs() * (self._factor**late - 1)
        raised = raised.masked_fill(~raised.isfinite(), 0.0)  # an end that another rule forbids stays forbidden
        return scores + torch.zeros_like(scores).index_copy(1, ends, raised)


class SuppressTokensLogitsProcessor:
    """Forbids tokens."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens = tokens

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return _without(scores, self._tokens)


class SuppressTokensAtBeginLogitsProcessor:
    """Forbids tokens as the first of an answer."""

    def __init__(self, tokens: Sequence[int], column: int):
        self._tokens, self._column = tokens, column

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return _without(scores, self._tokens) if ids.shape[1] == self._column else scores
