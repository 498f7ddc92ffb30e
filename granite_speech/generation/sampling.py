"""From logits to the next token: the rules that a captured step has, and drawing.

Order and arithmetic are those of transformers 5.17's logits processors: repetition penalty, minimum length, and for sampling
temperature, top k, top p. Nothing here reads from the device. The other rules are in cutoffs.py and constraints.py.
"""

import torch
from torch import Tensor

__all__ = ["draw", "keep_top_k", "keep_top_p", "penalize", "seen_tokens"]


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
