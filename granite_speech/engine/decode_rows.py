"""Answers in progress in the rows of a decode state: they join and leave between steps, and tokens are read as they arrive.

On a GPU the tokens of a step are read while the next one runs. So an answer's last step may be wasted, but no step waits for the host.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from granite_speech.engine.decoding import StepKey
from granite_speech.engine.requests import Request
from granite_speech.engine.runtime import Runtime
from granite_speech.engine.state import DecodeState, StateSize, ladder, tokens_and_logprobs
from granite_speech.engine.step import DecodeStep, Selection
from granite_speech.modules.transfers import Reading, on_device

__all__ = ["DecodeRows"]

# Pages of a row at first; the state grows if an answer needs more.
_PAGES = 64


class _Launched(NamedTuple):
    """A step whose tokens are on their way to the host, and whose rows they are."""

    reading: Reading
    rows: list[Request | None]


class DecodeRows:
    """The decode state of an engine.

    Args:
        model: the model.
        runtime: its pages, state and graphs.
        most: answers at once.

    Attributes:
        requests: by row of the state; None: a free row.
    """

    def __init__(self, model: Any, runtime: Runtime, most: int):
        self._model, self._runtime, self._most = model, runtime, most
        self._vocab_size = model.config.text_config.vocab_size
        self._ahead = 1 if model.device.type == "cuda" else 0
        self.requests: list[Request | None] = [None] * most
        self._launched: deque[_Launched] = deque()
        self._eager: tuple[Any, DecodeStep] | None = None
        self._selections: dict[Request, Selection] = {}
        self._rules: tuple[Selection, bool] | None = None  # of all answers together, until one joins or leaves
        self._audio: list[Request] = []  # joined since the last step, with audio as their last token
        self._state = runtime.decode_state(StateSize.of(most, _PAGES, 1), self._vocab_size)
        self._state.reset()

    def __len__(self) -> int:
        """Answers in progress."""
        return len(self._selections)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._selections))

    @property
    def state(self) -> DecodeState:
        return self._state

    def join(self, requests: Sequence[Request]) -> None:
        """Let these answers go on from their last token; all other tokens have keys."""
        free = (place for place, one in enumerate(self.requests) if one is None)
        for one, place in zip(requests, free, strict=False):
            one.place, self.requests[place] = place, one
            self._selections[one] = Selection.of(one.options, self._vocab_size)
        self._fit(max(len(one.pages) for one in requests), max(len(one.options.eos_token_id) for one in requests))
        places = [one.place for one in requests]
        self._state.enter([one.row() for one in requests], places)
        self.write_pages(requests)
        penalized = [one for one in requests if one.options.repetition_penalty != 1]
        if penalized:
            self._see(penalized)
        self._audio += [one for one in requests if one.begins_with_audio]
        self._rules = None

    def write_pages(self, requests: Sequence[Request]) -> None:
        """Tell the device which pages these answers have."""
        self._fit(max(len(one.pages) for one in requests), 1)
        width = self._state.size.pages
        table = torch.tensor([one.pages + [0] * (width - len(one.pages)) for one in requests], dtype=torch.int32)
        self._state.write_block_table(table, [one.place for one in requests])

    def leave(self, requests: Sequence[Request]) -> None:
        """Free the rows of these answers."""
        for one in requests:
            self.requests[one.place], one.place = None, None
            del self._selections[one]
        self._rules = None

    def stop(self, requests: Sequence[Request]) -> None:
        """End answers that the device would go on with, before they leave."""
        self._state.stop([one.place for one in requests])

    @property
    def can_step(self) -> bool:
        """Whether some answer has tokens for which no step is launched yet."""
        return any(one.keys < one.last_keys for one in self._selections)

    def step(self) -> int:
        """Launch one step. All its answers have pages for one more key. Returns the number of answers."""
        self._compact()
        used = 1 + max(one.place for one in self._selections)
        graphs = self._runtime.decoder_graphs
        if self._rules is None:
            mixed = not all(one.prompt.has_audio for one in self._selections)
            self._rules = Selection.covering(self._selections.values(), self._vocab_size), mixed
        key = StepKey(ladder(used) if graphs.can_capture else used, *self._rules, 1)
        with_vectors = self._place_vectors()
        if with_vectors or graphs.captured(key) is None:
            if not with_vectors:
                self.want(key)
            self._eager_step(key, with_vectors).run()
        else:
            graphs.replay(key)
        self._launched.append(_Launched(Reading(self._state.record[:1]), self.requests[:used]))
        for one in self._selections:
            one.keys = min(one.keys + 1, one.last_keys)
        return len(self._selections)

    def want(self, key: StepKey) -> None:
        """Have a step captured."""
        self._runtime.decoder_graphs.want(key, partial(self._new_step, key))

    def read(self, everything: bool = False) -> list[tuple[Request, int, float]]:
        """New tokens of answers with their log-probabilities: those of all steps but the newest, on a GPU, or of all.

        Args:
            everything: wait for the newest step too.
        """
        keep = 0 if everything or not self.can_step else self._ahead
        tokens = []
        while len(self._launched) > keep:
            launched = self._launched.popleft()
            used = len(launched.rows)
            [chosen], [logprobs] = (one[:, :used].tolist() for one in tokens_and_logprobs(launched.reading.wait()))
            of_rows = zip(launched.rows, chosen, logprobs, strict=True)
            tokens += [(one, token, logprob) for one, token, logprob in of_rows if one is not None and token >= 0]
        return tokens

    def _new_step(self, key: StepKey, with_vectors: bool = False) -> DecodeStep:
        options = {"mixed": key.mixed, "with_vectors": with_vectors, "layers": self._runtime.layers}
        return DecodeStep(self._model, self._state, key.selection, key.rows, **options)

    def _place_vectors(self) -> bool:
        """Give the state the embeddings of newest tokens that are audio; False if there are none."""
        audio = [one for one in self._audio if one.place is not None and one.begins_with_audio]
        self._audio = []
        if audio:
            vectors = torch.cat([one.vectors[-1:] for one in audio])
            self._state.place_vectors(vectors.to(self._model.dtype), [one.place for one in audio])
        return bool(audio)

    def _eager_step(self, key: StepKey, with_vectors: bool) -> DecodeStep:
        what = key, with_vectors
        if self._eager is None or self._eager[0] != what:
            self._eager = what, self._new_step(*what)
        return self._eager[1]

    def _fit(self, pages: int, ends: int) -> None:
        """A state with at least this many pages and end tokens a row."""
        size, before = StateSize.of(self._most, pages, ends), self._state
        if size.union(before.size) != before.size:
            self._state, self._eager = self._runtime.decode_state(size, self._vocab_size), None
            self._state.move_from(before)

    def _see(self, requests: Sequence[Request]) -> None:
        rows = [one.ids(0, one.length) for one in requests]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        device = self._model.device
        kept = on_device(ids >= 0, device)
        self._state.see(on_device(ids.clamp(min=0), device), kept, [one.place for one in requests])

    def _compact(self) -> None:
        """Move the answers together, if a step for them has fewer rows."""
        size = ladder if self._runtime.decoder_graphs.can_capture else int
        places = sorted(one.place for one in self._selections)
        if size(len(places)) == size(places[-1] + 1):
            return
        self._state.keep(places)
        moved = [self.requests[place] for place in places]
        self.requests = moved + [None] * (self._most - len(moved))
        for place, one in enumerate(moved):
            one.place = place
