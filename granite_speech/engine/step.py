"""One decode step as a fixed sequence of launches: embed, layers, head, choose a token, write it back.

Nothing here depends on a value on the host, so the step can be captured. Run eagerly it is the same step. The layers run fused
(`FusedLayers`) unless something needs to see each module: hooks, records of hidden states, or modules put in the place of ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from granite_kernels import OPERATIONS
from granite_kernels.launch import early_launches
from torch import Tensor

from granite_speech.engine.fixed_shapes import power_of_2
from granite_speech.engine.state import DecodeState
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.sampling import keep_top_k, keep_top_p, penalize
from granite_speech.modules.autocast import autocast_dtype
from granite_speech.modules.cache import CacheStep
from granite_speech.modules.fused_layers import States
from granite_speech.modules.language_model import GraniteModel
from granite_speech.modules.layers_in_use import LayersInUse
from granite_speech.modules.packing import Bucket
from granite_speech.modules.rows import Rows
from granite_speech.modules.snapshot import Snapshot
from granite_speech.modules.tokens import Tokens

__all__ = ["DecodeStep", "Selection"]


@dataclass(frozen=True)
class Selection:
    """Which rules choose a token; their values are in the state. With the number of rows, this says which launches a step has.

    Attributes:
        penalty: a repetition penalty.
        minimum: answers with a minimum length.
        sample: draw from the scores; otherwise take the best.
        temperature, top_p: whether sampling uses them.
        top_k: the largest top_k of any row; 0: none.
        seeded: each row draws its own random numbers, from its seed and its number of keys.
        partly: some rows are not sampled, although others are.
    """

    penalty: bool = False
    minimum: bool = False
    sample: bool = False
    temperature: bool = False
    top_k: int = 0
    top_p: bool = False
    seeded: bool = False
    partly: bool = False

    @classmethod
    def of(cls, options: GenerationOptions, vocab_size: int) -> "Selection":
        has_end = any(0 <= one < vocab_size for one in options.eos_token_id)
        return cls(
            penalty=options.repetition_penalty != 1,
            minimum=options.min_new_tokens > 0 and has_end,
            sample=options.do_sample,
            temperature=options.do_sample and options.temperature != 1,
            top_k=min(options.top_k, vocab_size) if options.do_sample else 0,
            top_p=options.do_sample and options.top_p < 1,
        )

    @classmethod
    def covering(cls, selections: Iterable["Selection"], vocab_size: int) -> "Selection":
        """The rules of rows of different requests, each with a seed of its own."""
        every = set(selections)
        sampled = [one for one in every if one.sample]
        top_k = 0
        if any(one.top_k for one in sampled):
            # Rounded up, so that few different steps are captured. A row without top_k keeps the whole vocabulary.
            top_k = min(vocab_size, power_of_2(max(one.top_k or vocab_size for one in sampled)))
        return cls(
            penalty=any(one.penalty for one in every),
            minimum=any(one.minimum for one in every),
            sample=bool(sampled),
            temperature=any(one.temperature for one in sampled),
            top_k=top_k,
            top_p=any(one.top_p for one in sampled),
            seeded=bool(sampled),
            partly=0 < len(sampled) < len(every),
        )


class _Model(Protocol):
    decoder: GraniteModel
    language_model: Any
    placeholder: int

    def embed_tokens(self, ids: Tensor) -> Tensor: ...

    def language_states(self, embeddings: Tensor, tokens: Tokens) -> Tensor: ...


class DecodeStep:
    """Steps of the first `rows` rows of a state.

    Args:
        model: the model.
        state: the answers in progress.
        selection: how tokens are chosen.
        rows: rows to compute.
        mixed: whether some of the rows have no audio, and therefore no adapter.
        steps: made by one `run`; more than one only without sampling, whose random numbers are drawn before each step.
        with_vectors: whether the newest token of some row is audio, and its embedding is in the state.
        layers: of the model, which may be those of other steps too.
        may_change: whether the model may change between two runs: somebody else's code runs there, or there are other requests.
    """

    def __init__(
        self,
        model: _Model,
        state: DecodeState,
        selection: Selection,
        rows: int,
        *,
        mixed: bool = True,
        steps: int = 1,
        with_vectors: bool = False,
        layers: LayersInUse | None = None,
        may_change: bool = True,
    ):
        self._model, self._state, self._selection, self._steps, self._with_vectors = model, state, selection, steps, with_vectors
        self._page_size = state.pool.page_size
        self._tokens, self._positions, self._kv_lens = state.tokens[:rows], state.positions[:rows], state.kv_lens[:rows]
        self._active, self._limits, self._ends = state.active[:rows], state.limits[:rows], state.ends[:rows]
        self._block_table = state.block_table[:rows]
        self._history, self._logprobs = state.history[:, :rows], state.logprobs[:, :rows]
        self._adapter_index = state.adapter_index[:rows] if mixed else None
        self._segments = Bucket(state.cu_seqlens[: rows + 1], rows, 1)
        self._rows = rows
        self._layers = LayersInUse(model) if layers is None else layers
        self._followed: Snapshot | None = None
        self._may_change = may_change

    def _follow(self) -> None:
        """Run the layers as the model is now."""
        if self._followed is not None and not self._may_change:
            return
        layers = self._layers
        self._followed, before = layers.follow(), self._followed
        self._fused = None if autocast_dtype(self._state.device) is not None else layers.with_head
        if self._followed is not before:
            # Hooks see `(rows, 1, hidden)`.
            self._padded = Rows.single_tokens(self._rows, self._state.device) if layers.has_hooks else None

    def run(self) -> None:
        """`steps` times: store the newest token of each answer, and choose the next."""
        self._follow()
        selection = self._selection
        needs_logits = self._fused is None or selection.sample or selection.penalty or selection.minimum
        for step in range(self._steps):
            if needs_logits:
                self.choose(self.logits(), step)
            else:
                states = self._fused_states()
                with early_launches():
                    self._finish(*self._fused.candidates(states), step)

    def reset(self) -> None:
        self._state.reset()

    def logits(self, collected: list[Tensor] | None = None) -> Tensor:
        """Store the newest token of each active row; `(rows, vocabulary)` logits of the next.

        Args:
            collected: a list that takes every layer's states, `(rows, hidden)`.
        """
        self._follow()
        if self._fused is not None and collected is None:
            return self._fused.logits(self._fused_states())
        self._kv_lens.add_(self._active)
        self._positions.add_(self._active)
        # A row that is not active has no keys, and writes to the first slot of page 0, which belongs to no sequence.
        kv_lens, model = self._kv_lens * self._active, self._model
        layout = self._layout(kv_lens, self._slots(kv_lens))
        embeddings = self._with_audio(model.embed_tokens(self._tokens.unsqueeze(1)).squeeze(1), 1.0)
        return model.language_model.next_logits(model.language_states(embeddings, layout, collected))

    def _fused_states(self) -> States:
        """As `logits`, up to the last layer."""
        decoder, fused = self._model.decoder, self._fused
        multiplier, frequencies = decoder.embedding_multiplier, decoder.rotary_emb.frequencies(self._state.device)
        state = self._tokens, self._positions, self._kv_lens, self._active
        options = {"multiplier": multiplier, "placeholder": self._model.placeholder}
        x, cos, sin, kv_lens = OPERATIONS["begin_step"].run(decoder.embed_tokens.weight, *state, frequencies, **options)
        return fused.step(self._with_audio(x, multiplier), (cos, sin), self._layout(kv_lens), self._state.counters)

    def _slots(self, kv_lens: Tensor) -> Tensor:
        """Where keys and values go. A row that is not active writes to the first slot of page 0, which belongs to no sequence."""
        place = (kv_lens - self._active).long()
        page = self._block_table.gather(1, (place // self._page_size).unsqueeze(1)).squeeze(1)
        return (page * self._page_size + place % self._page_size) * self._active

    def _layout(self, kv_lens: Tensor, slots: Tensor | None = None) -> Tokens:
        """Of the newest tokens. A row that is not active has 0 in `kv_lens`, `(rows,)` int32."""
        step = CacheStep(self._state.pool, slots, self._block_table, kv_lens, has_past=True)
        return Tokens(self._segments, self._positions, self._adapter_index, step, rows=self._padded)

    def _with_audio(self, embeddings: Tensor, multiplier: float) -> Tensor:
        """Embeddings of the newest tokens, times `multiplier`, with those of audio in place."""
        if not self._with_vectors:
            return embeddings
        rows, state = self._rows, self._state
        return torch.where(state.is_vector[:rows].unsqueeze(1), state.vectors[:rows] * multiplier, embeddings)

    def choose(self, logits: Tensor, step: int, scores: Tensor | None = None) -> Tensor:
        """Choose a token of each row from its logits, write it to the state and to `history[step]`, and its log-probability to
        `logprobs[step]`.

        Args:
            scores: `(rows, vocabulary)` to choose from; None: those that the selection's rules make of the logits.

        Returns:
            `(rows, vocabulary)` scores that the tokens were chosen from.
        """
        scores = self._scores(logits) if scores is None else scores
        best = scores
        if self._selection.sample:
            # Of independent waiting times with the probabilities as rates, the first: the draw of torch.multinomial.
            best = scores.softmax(-1) / self._noise()
            if self._selection.partly:
                best = torch.where(self._state.sampled[: self._rows].unsqueeze(1) > 0, best, scores)
        chosen = self._finish(best, None, None if best is logits else logits, 1.0, step)
        if self._selection.penalty:
            self._state.seen[: self._rows].scatter_(1, chosen.unsqueeze(1), True)
        return scores

    def _finish(self, scores: Tensor, ids: Tensor | None, logits: Tensor | None, divisor: float, step: int) -> Tensor:
        """Take each row's best of the candidates (see `finish_step`), and end the answers that it ends. Returns the tokens."""
        state = self._tokens, self._history[step], self._logprobs[step], self._active, self._kv_lens, self._limits, self._ends
        return OPERATIONS["finish_step"].run(scores, ids, logits, *state, divisor=divisor)

    def _noise(self) -> Tensor:
        """`(rows, vocabulary)` exponentially distributed random numbers of this step."""
        state = self._state
        if not self._selection.seeded:
            return state.noise.index_select(0, state.origin[: self._rows])
        return OPERATIONS["exponential_noise"].run(state.seeds[: self._rows], self._kv_lens, state.vocab_size)

    def _scores(self, logits: Tensor) -> Tensor:
        """Order and arithmetic are those of transformers 5.17's logits processors; see generation/sampling.py."""
        state, selection, rows, scores = self._state, self._selection, self._rows, logits
        if selection.penalty:
            scores = penalize(scores.float(), state.seen[:rows, :-1], state.penalty[:rows])
        if selection.minimum:
            scores = scores.float()
            # A row without end tokens has −1 alone: it keeps its first score.
            ends, early = self._ends.clamp(min=0), (self._kv_lens < state.earliest_ends[:rows]).unsqueeze(1) & (self._ends >= 0)
            scores = scores.scatter(1, ends, scores.gather(1, ends).masked_fill(early, float("-inf")))
        if not selection.sample:
            return scores
        scores = scores.float()
        if selection.temperature:
            scores = scores / state.temperature[:rows]
        if selection.top_k:
            scores = keep_top_k(scores, selection.top_k, state.top_k[:rows])
        if selection.top_p:
            scores = keep_top_p(scores, state.top_p[:rows])
        return scores
