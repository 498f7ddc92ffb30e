"""Which tokens to draw from, by their probabilities: the rules for sampling that are less used than top k and top p.

Each takes and returns `(rows, vocabulary)` scores, with −inf for tokens that are not drawn. Arithmetic is that of transformers
5.17's logits processors. `at_least` tokens of each row are kept in any case.
"""

import torch
from torch import Tensor

__all__ = ["keep_above_epsilon", "keep_above_eta", "keep_min_p", "keep_top_h", "keep_typical"]

_NEVER = float("-inf")
_MOST_FOR_TOP_H = 100


def _best(scores: Tensor, count: int) -> Tensor:
    """`(rows, vocabulary)` bool: the best tokens of each row, ties with the last of them included."""
    return scores >= scores.topk(min(count, scores.shape[1])).values[:, -1:]


def keep_min_p(scores: Tensor, min_p: float, at_least: int = 1) -> Tensor:
    """Keep the tokens with at least this share of the best one's probability (Nguyen et al., arXiv 2407.01082)."""
    probabilities = scores.softmax(-1)
    unlikely = probabilities < min_p * probabilities.amax(-1, keepdim=True)
    best = probabilities.topk(min(at_least, scores.shape[1])).indices
    return scores.masked_fill(unlikely.scatter(1, best, False), _NEVER)


def keep_typical(scores: Tensor, mass: float, at_least: int = 1) -> Tensor:
    """Keep the tokens whose information is nearest to the entropy, up to this probability (Meister et al., arXiv 2202.00666)."""
    logarithms = scores.log_softmax(-1)
    entropy = -(logarithms * logarithms.exp()).nansum(-1, keepdim=True)
    distance, order = (-logarithms - entropy).abs().sort()
    reached = scores.gather(1, order).softmax(-1).cumsum(-1)
    last = (reached < mass).sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
    untypical = distance > distance.gather(1, last)
    untypical[:, :at_least] = False
    return scores.masked_fill(untypical.scatter(1, order, untypical), _NEVER)


def keep_above_epsilon(scores: Tensor, epsilon: float, at_least: int = 1) -> Tensor:
    """Keep the tokens with at least this probability (Hewitt et al., arXiv 2210.15191)."""
    return scores.masked_fill((scores.softmax(-1) < epsilon) & ~_best(scores, at_least), _NEVER)


def keep_above_eta(scores: Tensor, epsilon: float, at_least: int = 1) -> Tensor:
    """The same with a lower bound where the entropy is high (Hewitt et al., arXiv 2210.15191)."""
    probabilities, logarithms = scores.softmax(-1), scores.log_softmax(-1)
    entropy = -(logarithms.clamp(min=torch.finfo(scores.dtype).min) * probabilities).sum(-1, keepdim=True)
    root = scores.new_tensor(epsilon).sqrt()
    eta = (root * torch.exp(-entropy)).clamp(max=epsilon)
    return scores.masked_fill((probabilities < eta) & ~_best(scores, at_least), _NEVER)


def keep_top_h(scores: Tensor, share: float) -> Tensor:
    """Keep the best tokens that have this share of the entropy of the best 100 (Potraghloo et al., arXiv 2509.02510)."""
    best, order = scores.topk(min(_MOST_FOR_TOP_H, scores.shape[1]))
    probabilities, logarithms = best.softmax(-1), best.log_softmax(-1)
    terms = -probabilities * logarithms.clamp(min=torch.finfo(scores.dtype).min)
    kept = terms.cumsum(-1) <= share * terms.sum(-1, keepdim=True)
    kept[:, 0] = True
    return scores.masked_fill(~torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, kept), _NEVER)
