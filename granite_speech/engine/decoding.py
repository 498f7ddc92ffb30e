"""Greedy decoding and sampling: steps on the device, tokens read one step late, rows that have ended dropped.

The host hands out pages, launches steps and reads tokens. While it waits for the tokens of one step, a GPU already runs the next,
so the last step of a request is wasted there. On a CPU tokens are read at once.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from granite_speech.engine.records import Records
from granite_speech.engine.rules import Rules
from granite_speech.engine.runtime import Runtime
from granite_speech.engine.state import STEPS, Row, StateSize, ladder, tokens_and_logprobs
from granite_speech.engine.step import DecodeStep, Selection
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.processors import History
from granite_speech.generation.stop_strings import StopStrings
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.outputs import GenerateOutput
from granite_speech.modules.transfers import Reading, on_device

__all__ = ["Decoding", "Prompts", "StepKey", "prepare"]

# An answer gets pages for this many tokens at once, or for max_new_tokens if that is less; if it goes on, for twice as many.
_RESERVED_TOKENS = 256


def prepare(runtime: Runtime, options: GenerationOptions, lengths: list[int], vocab_size: int) -> None:
    """Make room for a request before anything of it is stored, so that pages move at most once and nothing has to be copied.

    Args:
        runtime: of the request's session.
        options: of the request.
        lengths: tokens of each answer's prompt.
        vocab_size: columns of the logits.
    """
    runtime.pool.require(sum(runtime.pool.count(length + _reserved_tokens(options)) for length in lengths))
    runtime.follow_pages()
    if options.num_beams == 1:
        runtime.decode_state(_state_size(runtime, options, lengths), vocab_size)


def _reserved_tokens(options: GenerationOptions) -> int:
    """Tokens of an answer that get pages before its first step."""
    return min(options.max_new_tokens, _RESERVED_TOKENS)


def _state_size(runtime: Runtime, options: GenerationOptions, lengths: list[int]) -> StateSize:
    return StateSize.of(len(lengths), runtime.pool.count(max(lengths) + options.max_new_tokens), len(options.eos_token_id))


@dataclass(frozen=True)
class Prompts:
    """Prompts after their prefill, one for each answer.

    Attributes:
        cache: their keys and values.
        logits: `(rows, vocabulary)` of each answer's first token.
        ids: `(rows, width)` on the device; no columns if the prompts were given as embeddings alone.
        kept: `(rows, width)` bool on the device, False for padding.
        stops: the text of the rows, if there are stop strings.
        hidden_states: `(rows, width, hidden)` of every layer, if the request returns them.
    """

    cache: PagedCache
    logits: Tensor
    ids: Tensor
    kept: Tensor
    stops: StopStrings | None
    hidden_states: tuple[Tensor, ...] | None = None


class StepKey(NamedTuple):
    """What the launches of a step depend on, apart from the model and the state."""

    rows: int
    selection: Selection
    mixed: bool
    steps: int


class _Launched(NamedTuple):
    """Steps whose tokens are on their way to the host."""

    reading: Reading
    rows: list[int]  # the request's row in each row of the state
    draws_from: int | None  # offset of the random generator before the step


class Decoding:
    """Answers to the prompts of one request.

    Args:
        model: the model.
        runtime: its pages, state and graphs.
        rules: of the request, with its options.
        prompts: after their prefill.
        rng: for sampling; None: torch's default generator.
        streamer: takes tokens as they are read, or None.
    """

    def __init__(self, model: Any, runtime: Runtime, rules: Rules, prompts: Prompts, rng: torch.Generator | None, streamer: Any):
        cache, vocab_size, options = prompts.cache, prompts.logits.shape[1], rules.options
        self._model, self._runtime, self._options, self._prompts = model, runtime, options, prompts
        self._rng, self._streamer, self._stopping = rng, streamer, rules.stopping
        # Where something looks at all tokens after every step, no step runs ahead, and no row leaves its place.
        self._history = History(prompts.ids, prompts.kept) if rules.has_history else None
        self._processors = rules.processors(self._history) if self._history is not None and rules.has_processors else None
        self._selection = Selection.of(options, vocab_size) if self._processors is None else Selection(sample=options.do_sample)
        self._mixed = not all(cache.has_audio)
        self._ends = frozenset(options.eos_token_id)
        self._records = Records(rules.asked, len(cache))
        self._is_eager = bool(self._records) or self._history is not None
        self._stays = self._history is not None or self._records.hidden_states is not None
        self._on_gpu = model.device.type == "cuda"
        self._answers: list[list[int]] = [[] for _ in range(len(cache))]
        self._open = [True] * len(cache)  # by row of the request: whether the answer goes on, as far as the host has read
        self._rows = list(range(len(cache)))  # the request's row in each row of the state
        self._texts = list(range(len(cache)))  # the request's row of each text that the stop strings know
        self._chosen = 0  # tokens of each answer that steps were launched for
        self._launched: deque[_Launched] = deque()
        self._eager: tuple[StepKey, DecodeStep] | None = None

        self._reserved = _reserved_tokens(options)
        cache.reserve([length + self._reserved for length in cache.lengths])
        self._state = runtime.decode_state(_state_size(runtime, options, cache.lengths), vocab_size)
        self._state.reset()
        self._state.enter([self._row(number) for number in self._rows])
        self._write_block_table()
        if self._selection.penalty:
            self._state.see(prompts.ids, prompts.kept)

    def run(self) -> GenerateOutput:
        """Add tokens to every answer until it ends.

        Returns:
            `sequences`, the new tokens alone, and the records that the options ask for.
        """
        self._choose_first()
        ahead = 1 if self._on_gpu and self._history is None else 0
        while True:
            if self._chosen < self._options.max_new_tokens and len(self._launched) <= ahead and any(self._open):
                self._launch()
            elif self._launched and any(self._open):
                self._read(self._launched.popleft())
                self._drop_ended()
            else:
                break
        self._forget_wasted_draws()
        return self._output()

    def _row(self, number: int) -> Row:
        """How an answer enters the state."""
        cache = self._prompts.cache
        keys, position = cache.lengths[number], cache.next_positions[number] - 1
        return Row(self._options, prompt=keys, keys=keys, position=position, has_audio=cache.has_audio[number], origin=number)

    def _write_block_table(self) -> None:
        self._state.write_block_table(self._prompts.cache.block_table(self._state.size.pages)[self._rows])

    def rehearse(self) -> None:
        """Launch one step without reading its tokens, and have it captured for every smaller number of answers too."""
        self._launch()
        while len(self._rows) > 1:
            fewer = next(size for size in reversed(range(1, len(self._rows))) if ladder(size) == size)
            self._rows = self._rows[:fewer]
            for steps in {1, self._steps()}:
                self._want(self._key(steps))

    def _choose_first(self) -> None:
        """The first tokens, from the logits of the prompts."""
        key = StepKey(len(self._rows), self._selection, self._mixed, 1)
        offset = self._draw()
        self._choose(self._eager_step(key), self._prompts.logits, self._prompts.hidden_states)
        self._sent(key, offset)

    def _choose(self, step: DecodeStep, logits: Tensor, hidden_states: Sequence[Tensor] | None) -> None:
        """Choose a token of each row in an eager step, and keep what the request returns of it."""
        scores = None if self._processors is None else self._processors(self._history, logits)
        scores = step.choose(logits, 0, scores)
        self._records.add(scores, logits, hidden_states, self._rows)
        if self._history is not None:
            chosen = self._state.history[0, : len(self._rows)]
            self._history.extend(torch.where(chosen < 0, self._options.fill, chosen))

    def _launch(self) -> None:
        """One step, or as many as a graph makes."""
        steps = self._steps()
        self._add_pages(steps)
        offset = self._draw()
        for key in (self._key(steps), self._key(1)):
            if not self._is_eager and self._replayed(key):
                break
        else:
            step = self._eager_step(key)
            if self._is_eager:
                collected = self._records.collected()
                self._choose(step, step.logits(collected), collected)
            else:
                step.run()
        self._sent(key, offset)

    def _key(self, steps: int) -> StepKey:
        rows = len(self._rows)
        padded = self._runtime.decoder_graphs.can_capture and not self._stays
        return StepKey(ladder(rows) if padded else rows, self._selection, self._mixed, steps)

    def _replayed(self, key: StepKey) -> bool:
        """Replay this step if it is captured; else have it captured after the request."""
        graphs = self._runtime.decoder_graphs
        if graphs.captured(key) is None:
            self._want(key)
            return False
        graphs.replay(key)
        return True

    def _want(self, key: StepKey) -> None:
        self._runtime.decoder_graphs.want(key, partial(self._new_step, key, key.steps))

    def _new_step(self, key: StepKey, steps: int = 1) -> DecodeStep:
        is_watched = self._streamer is not None or self._history is not None
        options = {"mixed": key.mixed, "steps": steps, "layers": self._runtime.layers, "may_change": is_watched or bool(self._stopping)}
        return DecodeStep(self._model, self._state, key.selection, key.rows, **options)

    def _steps(self) -> int:
        """Steps to launch at once: many if none of their tokens can end an answer or must be looked at, else one."""
        options = self._options
        if self._selection.sample or self._is_eager or self._streamer is not None or self._prompts.stops is not None:
            return 1
        last = options.min_new_tokens if self._ends else options.max_new_tokens
        return STEPS if self._chosen + STEPS <= last else 1

    def _eager_step(self, key: StepKey) -> DecodeStep:
        if self._eager is None or self._eager[0] != key:
            self._eager = key, self._new_step(key)
        return self._eager[1]

    def _draw(self) -> int | None:
        """Draw the random numbers of a step. Returns the generator's offset before, where it has one."""
        if not self._selection.sample:
            return None
        offset = self._generator().get_offset() if self._on_gpu and torch.cuda.is_available() else None
        self._state.draw(len(self._answers), self._rng)
        return offset

    def _generator(self) -> torch.Generator:
        device = self._model.device
        return self._rng or torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]

    def _forget_wasted_draws(self) -> None:
        """Leave the generator as if no step had run after the last answer's end."""
        if self._launched and self._launched[0].draws_from is not None:
            self._generator().set_offset(self._launched[0].draws_from)

    def _sent(self, key: StepKey, offset: int | None) -> None:
        self._launched.append(_Launched(Reading(self._state.record[: key.steps]), self._rows, offset))
        self._chosen += key.steps

    def _add_pages(self, steps: int) -> None:
        """Pages for the keys of the next steps."""
        if self._chosen + steps <= self._reserved:
            return
        self._reserved = min(self._options.max_new_tokens, 2 * self._reserved)
        cache = self._prompts.cache
        cache.reserve([length + self._reserved if self._open[row] else 0 for row, length in enumerate(cache.lengths)])
        self._runtime.follow_pages()
        self._write_block_table()

    def _read(self, launched: _Launched) -> None:
        """Wait for the tokens of some steps, and append them to the answers that were going on."""
        history, _ = tokens_and_logprobs(launched.reading.wait())
        for tokens in history[:, : len(launched.rows)].tolist():
            new = [(row, token) for row, token in zip(launched.rows, tokens, strict=True) if self._open[row]]
            for row, token in new:
                self._answers[row].append(token)
                if token in self._ends or len(self._answers[row]) == self._options.max_new_tokens:
                    self._open[row] = False
            if self._streamer is not None and new:
                of_row = dict(new)
                self._streamer.put(torch.tensor([of_row.get(row, self._options.fill) for row in range(len(self._answers))]))
            if self._prompts.stops is not None and new:
                self._stop(new)
            if self._stopping and new:
                self._end_early()

    def _end_early(self) -> None:
        """End the answers that the time limit or the caller's criteria end."""
        if self._history is not None and self._stopping.criteria:
            ended = self._stopping.ended(self._history.ids, self._records.scores_so_far()).tolist()
        else:
            ended = [self._stopping.is_late] * len(self._answers)
        self._close({row for row, is_ended in enumerate(ended) if is_ended and self._open[row]})

    def _close(self, stopped: set[int]) -> None:
        """End the answers of these rows of the request."""
        if stopped:
            self._open = [is_open and row not in stopped for row, is_open in enumerate(self._open)]
            self._state.stop([place for place, row in enumerate(self._rows) if row in stopped])

    def _stop(self, new: list[tuple[int, int]]) -> None:
        """End the answers whose newest token completes a stop string."""
        stops, tokens = self._prompts.stops, [token for _, token in new]
        texts = [self._texts.index(row) for row, _ in new]  # `extend` keeps the texts of these rows alone, in this order
        stopped = {row for (row, _), ended in zip(new, stops.ends(texts, tokens), strict=True) if ended}
        stops.extend(texts, tokens)
        self._texts = [row for row, _ in new]
        self._close(stopped)

    def _drop_ended(self) -> None:
        """Move the answers that go on together, if a step for them has fewer rows."""
        if self._stays:
            return
        going_on = [place for place, row in enumerate(self._rows) if self._open[row]]
        size = ladder if self._runtime.decoder_graphs.can_capture else int
        if going_on and size(len(going_on)) < size(len(self._rows)):
            self._state.keep(going_on)
            self._rows = [self._rows[place] for place in going_on]

    def _output(self) -> GenerateOutput:
        longest = max(map(len, self._answers))
        fill = self._options.fill
        new = torch.tensor([answer + [fill] * (longest - len(answer)) for answer in self._answers], dtype=torch.int64)
        return self._records.put_into(GenerateOutput(on_device(new, self._model.device)), longest)
