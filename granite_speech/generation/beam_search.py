"""Beam search: which hypotheses go on and which have ended. The model is not known here.

Semantics are those of transformers 5.17's `_beam_search`, float32 arithmetic included, so that ids are the same: of each
row's continuations the best `(end tokens + 1) * num_beams` are looked at, those that end there are candidates for the answer
if they are among the best num_beams, and the best num_beams of the others go on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.sampling import draw
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.modules.transfers import on_device

__all__ = ["BeamSearch"]

_OUT = -1e9  # added to a score, takes it out of every choice; a finite number, as there, so that equal cases stay equal


@dataclass
class Hypotheses:
    """Some hypotheses of each row.

    Attributes:
        tokens: `(batch, hypotheses, max_new_tokens)` int64, new tokens, filled up.
        origins: as tokens, int32: the beam, counted over the batch, that each token was added to; −1 where there is none yet.
        scores: `(batch, hypotheses)` float32.
    """

    tokens: Tensor
    origins: Tensor
    scores: Tensor

    def choose(self, index: Tensor) -> "Hypotheses":
        """Those at `index` `(batch, hypotheses)`."""
        wide = index[:, :, None]
        return Hypotheses(self.tokens.take_along_dim(wide, 1), self.origins.take_along_dim(wide, 1), self.scores.take_along_dim(index, 1))

    def beside(self, other: "Hypotheses", scores: Tensor) -> "Hypotheses":
        """These and the other's, whose scores are replaced."""
        return Hypotheses(
            torch.cat((self.tokens, other.tokens), 1), torch.cat((self.origins, other.origins), 1), torch.cat((self.scores, scores), 1)
        )


class BeamSearch:
    """Beams of a batch, one token a step.

    Args:
        options: num_beams, length_penalty, early_stopping, eos_token_id and the others.
        batch: rows.
        device: of the logits.
        stops: the text of all `batch * num_beams` beams, where strings may end one.
        generator: for beams that are drawn.

    Attributes:
        is_over: no step can change the answer any more.
    """

    def __init__(
        self,
        options: GenerationOptions,
        batch: int,
        device: torch.device,
        stops: StopStrings | None = None,
        generator: torch.Generator | None = None,
    ):
        self.options, self.stops, self.generator = options, stops, generator
        self.is_over = False
        self._step = 0
        ends, beams, steps = options.eos_token_id, options.num_beams, options.max_new_tokens
        self._ends = on_device(ends, device, torch.int64)
        self._looked_at = max(2, 1 + len(ends)) * beams
        # A pad id of 0 counts as none in transformers' beam search, and only there.
        fill = options.pad_token_id or (ends[0] if ends else 0)
        tokens = torch.full((batch, beams, steps), fill, dtype=torch.int64, device=device)
        origins = torch.full(tokens.shape, -1, dtype=torch.int32, device=device)
        # All beams begin alike: only the first may be continued, or all would stay alike.
        scores = torch.full((batch, beams), _OUT, dtype=torch.float32, device=device)
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
        going_on = (continued.scores + ended.float() * _OUT).topk(self.options.num_beams)
        self._open = continued.choose(going_on.indices)
        self._open.scores = going_on.values
        parents = self._open.origins[:, :, self._step].long().flatten()
        tokens = tokens.take_along_dim(going_on.indices, 1).flatten()
        self._step += 1
        self.is_over = self._must_end(ended)
        if self.stops is not None and not self.is_over:
            self.stops.extend(parents.tolist(), tokens.tolist())
        return parents, tokens

    def _continue(self, log_probabilities: Tensor) -> tuple[Hypotheses, Tensor, Tensor]:
        """The continuations to look at, best first or as drawn, their tokens and whether they end: each `(batch, looked at)`."""
        vocab_size = log_probabilities.shape[1]
        scores = (log_probabilities.unflatten(0, self._open.scores.shape) + self._open.scores[:, :, None]).flatten(1)
        count = min(self._looked_at, scores.shape[1])
        if self.options.do_sample:
            index = draw(scores, count, self.generator)
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
            found = self.stops.ends(parents.flatten().tolist(), tokens.flatten().tolist())
            ended = ended | on_device(found, ended.device).view_as(ended)
        return continued, tokens, ended

    def _collect(self, continued: Hypotheses, ended: Tensor) -> None:
        """Keep the best num_beams of all that have ended so far."""
        beams, options = self.options.num_beams, self.options
        candidates = ended.clone()
        candidates[:, beams:] = False
        scores = continued.scores / ((self._step + 1) ** options.length_penalty)
        if options.early_stopping is True:
            scores = scores + self._has_ended.all(1, keepdim=True) * _OUT
        scores = scores + ~self._can_improve * _OUT + ~candidates * _OUT
        together = self._ended.beside(continued, scores)
        best = together.scores.topk(beams).indices
        self._ended = together.choose(best)
        self._has_ended = torch.cat((self._has_ended, candidates), 1).take_along_dim(best, 1)

    def _must_end(self, ended: Tensor) -> bool:
        options = self.options
        length = options.max_new_tokens if options.early_stopping == "never" and options.length_penalty > 0 else self._step
        hoped_for = self._open.scores[:, :1] / (length**options.length_penalty)
        to_beat = torch.where(self._has_ended, self._ended.scores.amin(1, keepdim=True), _OUT)
        self._can_improve = self._can_improve & (hoped_for > to_beat).any(1, keepdim=True)
        goes_on = self._can_improve.any() & ~ended.all()
        if options.early_stopping is True:
            goes_on = goes_on & ~self._has_ended.all()
        return not bool(goes_on)

    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """The best num_return_sequences of each row, best first.

        Returns:
            tokens `(batch * num_return_sequences, longest answer)` int64, their scores float32, and the beams they came from,
            int32, −1 behind an answer's end.
        """
        several = self.options.num_return_sequences
        tokens, origins = self._ended.tokens[:, :several].flatten(0, 1), self._ended.origins[:, :several].flatten(0, 1)
        longest = int((origins >= 0).sum(1).max()) if len(origins) else 0
        return tokens[:, :longest], self._ended.scores[:, :several].flatten(), origins[:, :longest]
