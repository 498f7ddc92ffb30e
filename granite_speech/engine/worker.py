"""What an engine's thread does: in every turn it encodes some audio, runs some prompts, and makes one decode step.

Each stage has a budget, so that a long clip or prompt does not hold up the answers in progress. The work that a request needs says
when it is due: at what the engine had begun when the request came, plus this work. The request that is due first comes first. So a
short request overtakes long ones, but only those that have not waited long.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from granite_speech.engine.counters import Counters
from granite_speech.engine.decode_rows import DecodeRows
from granite_speech.engine.decoding import StepKey
from granite_speech.engine.encoder_queue import EncoderQueue
from granite_speech.engine.pages import PAGE_SIZE, Pages
from granite_speech.engine.prefill import prefill_piece
from granite_speech.engine.prompt_queue import PromptQueue
from granite_speech.engine.requests import Request
from granite_speech.engine.runtime import Runtime
from granite_speech.engine.state import ladder
from granite_speech.engine.step import Selection
from granite_speech.engine.warmup import FRAMES_A_SECOND
from granite_speech.errors import EngineError

__all__ = ["Worker"]

# Rows that must be free before new requests begin, as a part of all: fewer and larger packs of audio and prompts take less time.
_GATHERED = 8
# Pages that an answer takes at once, while there are plenty.
_PAGES_AHEAD = 4


class Worker:
    """Requests of an engine, computed turn by turn. Only one thread may use it.

    Args:
        model: in evaluation mode.
        max_rows: answers at once.
        max_pages: of PAGE_SIZE tokens each.
    """

    def __init__(self, model: Any, max_rows: int, max_pages: int):
        self._model, self._max_rows = model, max_rows
        self._runtime = Runtime(model.use_graphs, PAGE_SIZE)
        self._runtime.make_capture = model.runtime.make_capture
        self._runtime.follow(model)
        self._pool = self._runtime.pool
        self._pool.require(max_pages)
        self._pages = Pages(self._pool.take(max_pages))
        self._rows = DecodeRows(model, self._runtime, max_rows)
        self._encoder = EncoderQueue(model, self._runtime)
        self._prompts = PromptQueue(self._pages, model.device)
        self._waiting: list[Request] = []
        self._cancelled: list[Request] = []
        self._begun_work = 0
        self.counters = Counters(pages=max_pages)
        keys = self._pool.keys[0]
        self._bytes_a_token = 2 * len(self._pool.keys) * keys[0, 0].numel() * keys.element_size()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._prompts or len(self._rows))

    def requests(self) -> list[Request]:
        """All requests that have not ended."""
        return [*self._waiting, *self._prompts, *self._rows]

    def add(self, request: Request) -> None:
        """A new request."""
        request.due = self._begun_work + request.prompt.work
        insort(self._waiting, request, key=_due)
        self.counters.submitted += 1

    def cancel(self, request: Request) -> None:
        """End a request at the next turn."""
        self._cancelled.append(request)

    def turn(self) -> None:
        """Encode, prefill and decode a little."""
        self._drop_cancelled()
        chosen = self._chosen()
        if chosen or self._prompts:
            self._follow_model()
        if chosen or self._encoder.long is not None:
            with self.counters.timed("encode"):
                self._encode(chosen)
        if chosen or self._prompts:
            with self.counters.timed("prefill"):
                self._prefill(chosen)
        if len(self._rows):
            with self.counters.timed("decode"):
                self._decode()

    def snapshot(self) -> Counters:
        """The counters now."""
        now = {"waiting": len(self._waiting), "prefilling": len(self._prompts), "decoding": len(self._rows)}
        pages = {"pages_used": self._pages.used, "pages_remembered": self._pages.remembered}
        return replace(self.counters, seconds=dict(self.counters.seconds), **now, **pages)

    def want_steps(self) -> None:
        """Capture the greedy decode step for every number of rows."""
        if self._runtime.decoder_graphs.can_capture:
            for rows in {ladder(rows) for rows in range(1, self._max_rows + 1)}:
                self._rows.want(StepKey(rows, Selection(), mixed=False, steps=1))
            self._capture()

    def _follow_model(self) -> None:
        """Make graphs fit the model as it is now, and capture what steps have asked for."""
        keys, model = self._pool.keys[0], self._model
        if (keys.dtype, keys.device) != (model.dtype, model.device):
            raise EngineError(
                got=f"a model that has become {model.dtype} on {model.device} while an engine uses it",
                expected=f"{keys.dtype} on {keys.device}, as when the engine was made",
                remedy="Close the engine before the model changes, and make a new one afterwards",
            )
        self._runtime.follow(model)
        self._capture()

    def _capture(self) -> None:
        graphs = self._runtime.encoder_graphs, self._runtime.decoder_graphs
        if any(one.has_wanted for one in graphs):
            with self.counters.timed("capture"), self._rows.state.preserved():
                self._runtime.capture_wanted()

    def _drop_cancelled(self) -> None:
        cancelled = [one for one in dict.fromkeys(self._cancelled) if not one.handle.done]  # a caller may cancel twice
        self._cancelled = []
        decoding = [one for one in cancelled if one.place is not None]
        if decoding:
            self._rows.stop(decoding)
        for one in cancelled:
            self._end(one)
            self.counters.cancelled += 1
            one.handle.finish("cancelled")

    def _chosen(self) -> list[Request]:
        """Waiting requests that may begin now: as many as there are rows for, those first that are due first."""
        in_progress = len(self._rows) + len(self._prompts)
        free = self._max_rows - in_progress
        enough = min(len(self._waiting), -(-self._max_rows // _GATHERED))
        return self._waiting[:free] if free >= enough or not in_progress else []

    def _encode(self, chosen: Sequence[Request]) -> None:
        pack = []
        if any(one.waits_for_audio and one is not self._encoder.long for one in chosen):
            # A few full packs take less time than many small ones, so this takes in requests for which there is no row yet.
            pack = self._encoder.pack(one for one in self._waiting if one.waits_for_audio and one is not self._encoder.long)
        if pack:
            self._each(pack, self._encoder.encode)
        long = self._encoder.long
        if long is not None:
            self._each([long], lambda _: self._encoder.advance())
            pack = [*pack, long]
        for one in pack:
            if one.vectors is not None:
                self.counters.audio_seconds += sum(one.prompt.clips) / FRAMES_A_SECOND

    def _prefill(self, chosen: Sequence[Request]) -> None:
        for one in chosen:
            if one.handle.done or one.waits_for_audio:
                continue
            shared = self._prompts.admit(one, in_progress=len(self._rows))
            if shared is None:
                break  # nothing overtakes a request that waits for pages
            self._waiting.remove(one)
            self._begun_work += 0 if one.tokens else one.prompt.work
            self.counters.shared_tokens += shared
            self.counters.shared_bytes += shared * self._bytes_a_token
        pieces = self._prompts.pieces()
        if pieces:
            self._each(pieces, self._store)
        ready = self._prompts.ready()
        if ready:
            self._rows.join(ready)
            for one in ready:
                self._prompts.remove(one)  # only now, so that an error above reaches their handles

    def _store(self, pieces: Sequence[tuple[Request, int]]) -> None:
        prefill_piece(self._model, self._runtime.decoder_graphs, self._pool, self._prompts.packed(pieces))
        self._prompts.stored(pieces)
        self.counters.prompt_tokens += sum(count for _, count in pieces)

    def _each(self, items: Sequence[Any], work: Callable[[Sequence[Any]], None]) -> None:
        """Do work for some requests together; if it fails, for each alone, so that an error reaches the request that causes it."""
        try:
            work(items)
        except Exception as error:
            if len(items) > 1:
                for one in items:
                    self._each([one], work)
            else:
                self._fail(items[0][0] if isinstance(items[0], tuple) else items[0], error)

    def _decode(self) -> None:
        self._take_pages()
        if len(self._rows) and self._rows.can_step:
            self.counters.rows += self._rows.step()
            self.counters.steps += 1
        self._deliver(self._rows.read())

    def _deliver(self, tokens: Sequence[tuple[Request, int, float]]) -> None:
        """Hand tokens to their callers. Tokens after an answer's end are wasted steps."""
        ended: dict[Request, str] = {}
        for one, token, logprob in tokens:
            if one.handle.done or one in ended:
                continue
            reason = one.end_of(token)
            one.handle.add(token, logprob)
            self.counters.new_tokens += 1
            if reason is not None:
                ended[one] = reason
        going_on = [one for one in ended if one.keys < one.last_keys and one.tokens[-1] not in one.options.eos_token_id]
        if going_on:
            self._rows.stop(going_on)
        for one, reason in ended.items():
            self._end(one)
            self.counters.finished += 1
            one.handle.finish(reason)

    def _take_pages(self) -> None:
        """Pages for the next key of every answer. If there are none, the answers that are due last begin again later."""
        page_size, short = self._pool.page_size, []
        for one in sorted(self._rows, key=_due):
            if one.place is None or one.keys == one.last_keys or one.keys < len(one.pages) * page_size:
                continue
            plenty = self._pages.available > _PAGES_AHEAD * len(self._rows)
            rest = self._pool.count(one.last_keys) - len(one.pages)
            taken = self._pages.take(min(rest, _PAGES_AHEAD) if plenty else 1)
            if taken is None:
                taken = self._make_room(one)
            if taken is not None:
                one.pages += taken
                short.append(one)
        short = [one for one in short if one.place is not None]
        if short:
            self._rows.write_pages(short)

    def _make_room(self, request: Request) -> list[int] | None:
        """A page for this request, taken from requests that are due later; None if it has ended, or if itself has to give way."""
        self._deliver(self._rows.read(everything=True))
        while request.place is not None:
            taken = self._pages.take(1)
            if taken is not None:
                return taken
            self._preempt(max((*self._rows, *self._prompts), key=_due))
        return None

    def _preempt(self, request: Request) -> None:
        """Take a request's pages. It begins again when there are enough, and goes on with the token after those that it has."""
        if request.place is not None:
            self._rows.stop([request])
        self._end(request)
        request.keys = 0
        insort(self._waiting, request, key=_due)
        self.counters.preempted += 1

    def _fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error of its own."""
        if not request.handle.done:
            self._end(request)
            self.counters.failed += 1
            request.handle.fail(error)

    def _end(self, request: Request) -> None:
        """Forget a request wherever it is, and give its pages back."""
        if request.place is not None:
            self._rows.leave([request])
        elif request in self._prompts:
            self._prompts.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
        if request is self._encoder.long:
            self._encoder.drop_long()
        self._pages.give_back(request.pages)
        request.pages = []


def _due(request: Request) -> int:
    return request.due
