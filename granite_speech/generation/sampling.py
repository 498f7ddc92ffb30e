"""From logits to the next token: penalties, the choice of tokens to draw from, and drawing.

Order and arithmetic are those of transformers 5.17's logits processors: repetition penalty, minimum length, and for sampling
temperature, top k, top p. Nothing here reads from the device.
"""

import torch
from torch import Tensor

from granite_speech.generation.options import GenerationOptions
from granite_speech.modules.transfers import on_device

__all__ = ["LogitsProcessor", "draw", "keep_top_k", "keep_top_p", "penalize", "seen_tokens"]


class LogitsProcessor:
    """Turns a beam search's log-probabilities into the scores that tokens are chosen from, for beams that grow by one token a step.

    Args:
        options: of the call.
        ids: `(rows, width)`, the prompts.
        kept: `(rows, width)` bool, False for padding.
        vocab_size: columns of the logits.
    """

    def __init__(self, options: GenerationOptions, ids: Tensor, kept: Tensor, vocab_size: int):
        self._options = options
        self._new_tokens = 0
        inside = [one for one in options.eos_token_id if 0 <= one < vocab_size]
        self._ends = on_device(inside, ids.device, torch.int64)
        # Some beam must go on, so one token more is kept than there are end tokens.
        self._at_least = len(options.eos_token_id) + 1
        self._seen = seen_tokens(ids, kept, vocab_size) if options.repetition_penalty != 1 else None

    def __call__(self, logits: Tensor) -> Tensor:
        """`(rows, vocabulary)` scores of the next token: float32, or `logits` unchanged if no option applies."""
        options, scores = self._options, logits
        if self._seen is not None:
            scores = penalize(scores.float(), self._seen[:, :-1], options.repetition_penalty)
        if self._new_tokens < options.min_new_tokens and len(self._ends):
            scores = scores.float().index_fill(1, self._ends, float("-inf"))
        if not options.do_sample:
            return scores
        scores = scores.float()
        if options.temperature != 1:
            scores = scores / options.temperature
        if options.top_k:
            scores = keep_top_k(scores, max(options.top_k, self._at_least))
        if options.top_p < 1:
            scores = keep_top_p(scores, 1 - options.top_p, self._at_least)
        return scores

    def extend(self, tokens: Tensor, rows: Tensor) -> None:
        """Make row i the old row `rows[i]` followed by `tokens[i]`."""
        self._new_tokens += 1
        if self._seen is not None:
            self._seen = self._seen.index_select(0, rows).scatter(1, tokens[:, None], True)


def seen_tokens(ids: Tensor, kept: Tensor, vocab_size: int) -> Tensor:
    """`(rows, vocab_size + 1)` bool: the tokens of each row's prompt, for `penalize`.

    The last column takes tokens without a logit: padding, and audio tokens outside the vocabulary.

    Args:
        ids: `(rows, width)`.
        kept: `(rows, width)` bool, False for padding.
        vocab_size: columns of the logits.
    """
    places = torch.where(kept & (ids < vocab_size), ids.long(), vocab_size)
    return torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device).scatter_(1, places, True)


def penalize(scores: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Scores with tokens seen before made less likely (Keskar et al., arXiv 1909.05858).

    Args:
        scores: `(rows, vocabulary)`.
        seen: `(rows, vocabulary)` bool.
        penalty: one number, or `(rows, 1)`.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, most: int, k: Tensor | None = None) -> Tensor:
    """−inf for all but the k best of each row (Fan et al., arXiv 1805.04833); ties with the k-th are kept.

    Args:
        scores: `(rows, vocabulary)`.
        most: the largest k.
        k: `(rows, 1)` int64; numbers outside 1 to `most` count as the nearest. None: `most` for every row.
    """
    best = scores.topk(min(most, scores.shape[1])).values
    least = best[:, -1:] if k is None else best.gather(1, k.clamp(1, best.shape[1]) - 1)
    return scores.masked_fill(scores < least, float("-inf"))


def keep_top_p(scores: Tensor, dropped: Tensor | float, at_least: int = 1) -> Tensor:
    """−inf for all but the fewest best tokens whose probabilities add up to p (Holtzman et al., arXiv 1904.09751).

    Args:
        scores: `(rows, vocabulary)`.
        dropped: 1 − p, `(rows, 1)` or one number.
        at_least: tokens of each row to keep in any case.
    """
    ascending, order = scores.sort(dim=-1)
    unlikely = ascending.softmax(-1).cumsum(-1) <= dropped
    unlikely[:, -at_least:] = False
    return scores.masked_fill(unlikely.scatter(1, order, unlikely), float("-inf"))


def draw(scores: Tensor, count: int, rng: torch.Generator | None) -> Tensor:
    """Draw tokens without replacement from the softmax of each row: `(rows, count)` int64.

    An exponential race: of independent waiting times with the probabilities as rates, the first `count` to arrive. Gives the
    same numbers as `torch.multinomial`, without its check of the probabilities, which waits for the device.
    """
    probabilities = scores.softmax(-1)
    arrivals = probabilities / torch.empty_like(probabilities).exponential_(1.0, generator=rng)
    return arrivals.topk(count).indices
