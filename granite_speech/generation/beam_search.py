"""Beam search: which hypotheses are continued and which have ended. Independent of the model.

Semantics and float32 arithmetic are those of transformers 5.17's `_beam_search`, so that ids are equal. Each step considers the
best `(end tokens + 1) * num_beams` continuations of a row. Those that end are candidates for the answer if they are among the
best num_beams; the best num_beams of the others are continued.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.sampling import draw
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.modules.transfers import on_device

__all__ = ["BeamSearch"]

_EXCLUDED = -1e9  # added to a score to exclude it; finite, as in transformers, so that ties resolve in the same way


@dataclass
class Hypotheses:
    """Some hypotheses of each row.

    Attributes:
        tokens: `(batch, hypotheses, max_new_tokens)` int64, new tokens, then padding.
        origins: like tokens, int32: the beam, counted over the batch, that each token was added to; −1 for padding.
        scores: `(batch, hypotheses)` float32.
    """

    tokens: Tensor
    origins: Tensor
    scores: Tensor

    def choose(self, index: Tensor) -> "Hypotheses":
        """The hypotheses at `index`, `(batch, hypotheses)`."""
        wide = index[:, :, None]
        return Hypotheses(self.tokens.take_along_dim(wide, 1), self.origins.take_along_dim(wide, 1), self.scores.take_along_dim(index, 1))

    def concatenate(self, other: "Hypotheses", scores: Tensor) -> "Hypotheses":
        """These, then the other's with `scores` in place of their own."""
        return Hypotheses(
            torch.cat((self.tokens, other.tokens), 1), torch.cat((self.origins, other.origins), 1), torch.cat((self.scores, scores), 1)
        )


class BeamSearch:
    """Beams of a batch, one token per step.

    Args:
        options: num_beams, length_penalty, early_stopping, eos_token_id and others.
        batch: number of rows.
        device: of the logits.
        stops: the text of all `batch * num_beams` beams, if there are stop strings.
        criteria: whether beams end that continue the old beams of the first argument with the tokens of the second, `(n,)` each;
            None: only those that end by their tokens or length.
        rng: for do_sample; None: torch's default generator.

    Attributes:
        is_over: whether no further step can change the answer.
    """

    def __init__(
        self,
        options: GenerationOptions,
        batch: int,
        device: torch.device,
        stops: StopStrings | None,
        criteria: Callable[[Tensor, Tensor], Tensor] | None,
        rng: torch.Generator | None,
    ):
        self.options, self.stops, self.criteria, self.rng = options, stops, criteria, rng
        self.is_over = False
        self._step = 0
        ends, beams, steps = options.eos_token_id, options.num_beams, options.max_new_tokens
        self._ends = on_device(ends, device, torch.int64)
        self._considered = max(2, 1 + len(ends)) * beams
        # Beam search in transformers, unlike its other methods, treats a pad id of 0 as not set.
        fill = options.pad_token_id or (ends[0] if ends else 0)
        tokens = torch.full((batch, beams, steps), fill, dtype=torch.int64, device=device)
        origins = torch.full(tokens.shape, -1, dtype=torch.int32, device=device)
        # All beams start equal. Only the first may be continued, or they would stay equal.
        scores = torch.full((batch, beams), _EXCLUDED, dtype=torch.float32, device=device)
        self._ended = Hypotheses(tokens, origins, scores)
        self._open = Hypotheses(tokens, origins, scores.index_fill(1, torch.zeros(1, dtype=torch.int64, device=device), 0.0))
        self._has_ended = torch.zeros(batch, beams, dtype=torch.bool, device=device)
        self._can_improve = torch.ones(batch, 1, dtype=torch.bool, device=device)
        self._first_beam = torch.arange(batch, device=device)[:, None] * beams

    def advance(self, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Continue the open beams by one token.

        Args:
            log_probabilities: `(batch * num_beams, vocabulary)` float32 of every open beam's next token.

        Returns:
            Two of `(batch * num_beams,)` int64: the old beam that each new one continues, and its new token.
        """
        continued, tokens, ended = self._continue(log_probabilities)
        self._collect(continued, ended)
        best_open = (continued.scores + ended.float() * _EXCLUDED).topk(self.options.num_beams)
        self._open = continued.choose(best_open.indices)
        self._open.scores = best_open.values
        parents = self._open.origins[:, :, self._step].long().flatten()
        tokens = tokens.take_along_dim(best_open.indices, 1).flatten()
        self._step += 1
        self.is_over = self._must_end(ended)
        if self.stops is not None and not self.is_over:
            self.stops.extend(parents.tolist(), tokens.tolist())
        return parents, tokens

    def _continue(self, log_probabilities: Tensor) -> tuple[Hypotheses, Tensor, Tensor]:
        """The continuations to consider, best first or as drawn, their tokens and whether they end: each `(batch, considered)`."""
        vocab_size = log_probabilities.shape[1]
        scores = (log_probabilities.unflatten(0, self._open.scores.shape) + self._open.scores[:, :, None]).flatten(1)
        count = min(self._considered, scores.shape[1])
        if self.options.do_sample:
            index = draw(scores, count, self.rng)
            best = scores.gather(1, index)
        else:
            best, index = scores.topk(count)
        beam, tokens = index // vocab_size, index % vocab_size
        continued = self._open.choose(beam)
        continued.scores = best
        parents = beam + self._first_beam
        continued.tokens[:, :, self._step] = tokens
        continued.origins[:, :, self._step] = parents.int()
        ended = torch.isin(tokens, self._ends)
        if self._step + 1 == self.options.max_new_tokens:
            ended = torch.ones_like(ended)
        elif self.stops is not None:
            stopped = self.stops.ends(parents.flatten().tolist(), tokens.flatten().tolist())
            ended = ended | on_device(stopped, ended.device).view_as(ended)
        if self.criteria is not None:
            ended = ended | self.criteria(parents.flatten(), tokens.flatten()).view_as(ended)
        return continued, tokens, ended

    def _collect(self, continued: Hypotheses, ended: Tensor) -> None:
        """Keep the best num_beams of all hypotheses that have ended so far."""
        beams, options = self.options.num_beams, self.options
        candidates = ended.clone()
        candidates[:, beams:] = False
        scores = continued.scores / ((self._step + 1) ** options.length_penalty)
        if options.early_stopping is True:
            scores = scores + self._has_ended.all(1, keepdim=True) * _EXCLUDED
        scores = scores + ~self._can_improve * _EXCLUDED + ~candidates * _EXCLUDED
        all_ended = self._ended.concatenate(continued, scores)
        best = all_ended.scores.topk(beams).indices
        self._ended = all_ended.choose(best)
        self._has_ended = torch.cat((self._has_ended, candidates), 1).take_along_dim(best, 1)

    def _must_end(self, ended: Tensor) -> bool:
        options = self.options
        length = options.max_new_tokens if options.early_stopping == "never" and options.length_penalty > 0 else self._step
        best_possible = self._open.scores[:, :1] / (length**options.length_penalty)
        to_beat = torch.where(self._has_ended, self._ended.scores.amin(1, keepdim=True), _EXCLUDED)
        self._can_improve = self._can_improve & (best_possible > to_beat).any(1, keepdim=True)
        must_continue = self._can_improve.any() & ~ended.all()
        if options.early_stopping is True:
            must_continue = must_continue & ~self._has_ended.all()
        return not bool(must_continue)

    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """The best num_return_sequences of each row, best first.

        Returns:
            Tokens `(batch * num_return_sequences, longest answer)` int64, scores float32, and for each token the beam it was added
            to, int32, −1 after an answer's end.
        """
        count = self.options.num_return_sequences
        tokens, origins = self._ended.tokens[:, :count].flatten(0, 1), self._ended.origins[:, :count].flatten(0, 1)
        longest = int((origins >= 0).sum(1).max()) if len(origins) else 0
        return tokens[:, :longest], self._ended.scores[:, :count].flatten(), origins[:, :longest]
