"""What a CTC engine's thread does: in every turn it runs the requests that wait, as many as go together, and gives them their tokens.

On a GPU the results of one turn are read while the next one's work runs.
"""

from collections import deque
from dataclasses import dataclass, replace

import torch
from granite_kernels.ctc_greedy import CtcGreedy
from torch import Tensor

from granite_speech.engine.counters import Counters
from granite_speech.engine.ctc_encoding import decode
from granite_speech.engine.handle import Handle
from granite_speech.engine.runtime import FollowedGraphs
from granite_speech.errors import EngineError
from granite_speech.modules.ctc_frames import FramesToPath
from granite_speech.modules.packing import Segments
from granite_speech.modules.transfers import Reading

__all__ = ["CTCRequest", "CTCWorker"]

# Columns of what is read: each is as long as the rows of all clips.
_COLUMNS = ("tokens", "first_frames", "last_frames", "token_logprobs", "logprobs")


@dataclass(eq=False)
class CTCRequest:
    """One recording.

    Attributes:
        frames: `(frames, 4 * num_mel_bins)` on the model's device, in its dtype.
        handle: gets the tokens.
        seconds: of audio.
        computed: an event on the GPU after which the frames exist; None: they do.
    """

    frames: Tensor
    handle: Handle
    seconds: float
    computed: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Running:
    """Requests whose results are on their way from the device.

    Attributes:
        requests: in the order of their rows.
        left: rows of each.
        columns: `_COLUMNS`, and then the number of tokens of each request; as int32 in one tensor.
    """

    requests: list[CTCRequest]
    left: Segments
    columns: Reading


class CTCWorker:
    """Requests of an engine, computed turn by turn. Only one thread may use it.

    Args:
        model: in evaluation mode.
        max_frames: that run together, if more than one request waits.
    """

    def __init__(self, model: FramesToPath, max_frames: int):
        self._model, self._max_frames = model, max_frames
        self._kind = model.dtype, model.device
        self._followed = FollowedGraphs()
        self._waiting: deque[CTCRequest] = deque()
        self._running: deque[_Running] = deque()
        self._cancelled: list[CTCRequest] = []
        self.counters = Counters()

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def requests(self) -> list[CTCRequest]:
        """All requests that have not ended."""
        return [*(one for several in list(self._running) for one in several.requests), *self._waiting]

    def add(self, request: CTCRequest) -> None:
        """A new request."""
        self._waiting.append(request)
        self.counters.submitted += 1

    def cancel(self, request: CTCRequest) -> None:
        """End a request at the next turn."""
        self._cancelled.append(request)

    def turn(self) -> None:
        """Run some requests, and give those before them their tokens."""
        self._drop_cancelled()
        has_new = bool(self._waiting)
        if has_new:
            self._follow_model()
            with self.counters.timed("encode"):
                self._running.append(self._run(self._pack()))
        # A GPU gets its next work before anybody waits for the last.
        if self._running and (len(self._running) > 1 or not has_new or self._reads_at_once):
            with self.counters.timed("decode"):
                self._finish(self._running[0])
            self._running.popleft()  # only now, so that an error above reaches its requests

    @property
    def _reads_at_once(self) -> bool:
        """A CPU has nothing to do meanwhile."""
        return self._model.device.type == "cpu"

    def snapshot(self) -> Counters:
        """The counters now."""
        running = sum(not one.handle.done for several in list(self._running) for one in several.requests)
        return replace(self.counters, seconds=dict(self.counters.seconds), waiting=len(self._waiting), decoding=running)

    def _follow_model(self) -> None:
        """Make graphs fit the model as it is now, and capture what calls have asked for."""
        model = self._model
        if (model.dtype, model.device) != self._kind:
            raise EngineError(
                got=f"a model that has become {model.dtype} on {model.device} while an engine uses it",
                expected=f"{self._kind[0]} on {self._kind[1]}, as when the engine was made",
                remedy="Close the engine before the model changes, and make a new one afterwards",
            )
        self._followed.follow(model)
        if self._followed.graphs.has_wanted:
            with self.counters.timed("capture"):
                self._followed.graphs.capture_wanted()

    def _pack(self) -> list[CTCRequest]:
        """The first requests that fit together, and at least one."""
        pack, frames = [], 0
        while self._waiting and (not pack or frames + len(self._waiting[0].frames) <= self._max_frames):
            pack.append(self._waiting.popleft())
            frames += len(pack[-1].frames)
        return pack

    def _run(self, pack: list[CTCRequest]) -> _Running:
        try:
            clips = Segments(tuple(len(one.frames) for one in pack), self._model.device)
            frames = pack[0].frames if len(pack) == 1 else torch.cat([one.frames for one in pack])
            path, left = decode(self._model, self._followed.graphs, frames, clips)
            columns = Reading(_columns(path))
        except BaseException:
            self._waiting.extendleft(reversed(pack))  # so that the error reaches them
            raise
        self.counters.steps += 1
        self.counters.rows += len(pack)
        self.counters.audio_seconds += sum(one.seconds for one in pack)
        return _Running(pack, left, columns)

    def _finish(self, done: _Running) -> None:
        """Give the requests their tokens."""
        values = done.columns.wait()
        rows = len(_COLUMNS) * done.left.total
        columns = dict(zip(_COLUMNS, values[:rows].view(len(_COLUMNS), -1), strict=True))
        of_tokens, of_frames = (columns[name].view(torch.float32) for name in ("token_logprobs", "logprobs"))
        for one, count, start, length in zip(done.requests, values[rows:].tolist(), done.left.starts, done.left.lengths, strict=False):
            if one.handle.done:  # cancelled meanwhile
                continue
            heard = of_frames[start : start + length].clone()  # a view would keep those of all requests
            if heard.isnan().any():
                one.handle.fail(_nan(self._model.dtype))
                self.counters.failed += 1
                continue
            own = slice(start, start + count)
            one.handle.frames = list(zip(columns["first_frames"][own].tolist(), columns["last_frames"][own].tolist(), strict=True))
            one.handle.frame_logprobs = heard
            for token, logprob in zip(columns["tokens"][own].tolist(), of_tokens[own].tolist(), strict=True):
                one.handle.add(token, logprob)
            one.handle.finish("stop")
            self.counters.finished += 1
            self.counters.new_tokens += count

    def _drop_cancelled(self) -> None:
        """End the cancelled requests. What already runs for them is thrown away."""
        cancelled = [one for one in dict.fromkeys(self._cancelled) if not one.handle.done]  # a caller may cancel twice
        self._cancelled = []
        for one in cancelled:
            if one in self._waiting:
                self._waiting.remove(one)
            self.counters.cancelled += 1
            one.handle.finish("cancelled")


def _columns(path: CtcGreedy) -> Tensor:
    """What `_Running.columns` is made of, in one tensor, so that one copy brings it to the host."""
    logprobs = [one.float().view(torch.int32) for one in (path.token_logprobs, path.logprobs)]
    return torch.cat([path.tokens, path.first_frames, path.last_frames, *logprobs, path.counts])


def _nan(dtype: torch.dtype) -> EngineError:
    return EngineError(
        got=f"probabilities that are NaN, from a model in {str(dtype).removeprefix('torch.')}",
        expected="numbers",
        remedy="Load the model with dtype='float32', and check its weights",
    )
