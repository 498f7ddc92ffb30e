"""From logits to the next token: penalties, what is kept to draw from, and the draw.

Order and arithmetic are those of transformers 5.17's logits processors: repetition penalty, no end before its time, and
where tokens are drawn temperature, top k, top p. Nothing here asks the device for a value.
"""

import torch
from torch import Tensor

from granite_speech.generation.options import GenerationOptions
from granite_speech.modules.transfers import on_device

__all__ = ["LogitsProcessor", "draw", "keep_top_k", "keep_top_p", "penalize"]


class LogitsProcessor:
    """The scores that tokens are chosen by, for rows that grow by one token a call.

    Args:
        options: of the whole call.
        ids: `(rows, width)` the prompts.
        kept: `(rows, width)` bool, false on padding.
        vocab_size: columns of the logits.
    """

    def __init__(self, options: GenerationOptions, ids: Tensor, kept: Tensor, vocab_size: int):
        self._options = options
        self._new_tokens = 0
        inside = [one for one in options.eos_token_id if 0 <= one < vocab_size]
        self._ends = on_device(inside, ids.device, torch.int64)
        # Of several beams one at least must be able to go on: one token more than could end them is always kept.
        self._at_least = 1 if options.num_beams == 1 else len(options.eos_token_id) + 1
        self._seen = None
        if options.repetition_penalty != 1:
            # One column more takes what has no logit: padding, and audio tokens outside the vocabulary.
            places = torch.where(kept & (ids < vocab_size), ids.long(), vocab_size)
            self._seen = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device).scatter_(1, places, True)

    def __call__(self, logits: Tensor) -> Tensor:
        """`(rows, vocabulary)` scores of the next token, float32; the logits as they are where there is nothing to do."""
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
            scores = keep_top_p(scores, options.top_p, self._at_least)
        return scores

    def extend(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """From now on row i is the old row `rows[i]` (None: row i) with `tokens[i]` behind it."""
        self._new_tokens += 1
        if self._seen is not None:
            seen = self._seen if rows is None else self._seen.index_select(0, rows)
            self._seen = seen.scatter(1, tokens[:, None], True)


def penalize(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely (Keskar et al., arXiv 1909.05858): `(rows, vocabulary)`, seen bool."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """−inf for all but the k best of each row (Fan et al., arXiv 1805.04833); those that equal the k-th are kept with it."""
    least = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < least, float("-inf"))


def keep_top_p(scores: Tensor, p: float, at_least: int = 1) -> Tensor:
    """−inf for all but the fewest best tokens whose probabilities reach p together (Holtzman et al., arXiv 1904.09751)."""
    rising, order = scores.sort(dim=-1)
    dropped = rising.softmax(-1).cumsum(-1) <= 1 - p
    dropped[:, -at_least:] = False
    return scores.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))


def draw(scores: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw without replacement from the softmax of each row: `(rows, count)` int64.

    An exponential race: of independent waiting times with the probabilities as rates, the first `count` to arrive. This is
    what `torch.multinomial` computes, number for number, without its look at whether the probabilities are valid.
    """
    probabilities = scores.softmax(-1)
    arrivals = probabilities / torch.empty_like(probabilities).exponential_(1.0, generator=generator)
    return arrivals.argmax(-1, keepdim=True) if count == 1 else arrivals.topk(count).indices
