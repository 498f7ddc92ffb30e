"""Audio of waiting requests, encoded between decode steps: short clips packed together, a long one a few blocks at a time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from granite_speech.engine.encoding import encode
from granite_speech.engine.requests import Request
from granite_speech.engine.runtime import Runtime
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.packing import Segments
from granite_speech.modules.transfers import Reading

__all__ = ["EncoderQueue"]

# Frames to encode between two decode steps. On a GPU, the most that a captured stage takes: about 15 ms of an H100.
_FRAMES = {"cuda": 8192, "cpu": 1024}


class EncoderQueue:
    """Encodes audio.

    Args:
        model: the model.
        runtime: has the captured stages.
    """

    def __init__(self, model: Any, runtime: Runtime):
        self._model, self._runtime = model, runtime
        self._frames = _FRAMES.get(model.device.type, _FRAMES["cuda"])
        self._long: tuple[Request, Iterator[Tensor]] | None = None

    def pack(self, requests: Iterable[Request]) -> list[Request]:
        """The first of these requests whose clips can be encoded together now; one that is too long goes its own way."""
        pack, frames = [], 0
        for one in requests:
            own = sum(one.prompt.clips)
            if own > self._frames:
                if self._long is None:
                    self._long = one, self._blocks(one)
            elif frames + own > self._frames:
                break
            else:
                pack.append(one)
                frames += own
        return pack

    def encode(self, requests: Sequence[Request]) -> None:
        """Encode these requests' clips together, and give each request its vectors and, if it wants them, its CTC log-probabilities."""
        frames, clips = _packed(requests)
        states, vectors, tokens = encode(self._model, self._runtime.encoder_graphs, frames, clips)
        lengths = iter(tokens.lengths)
        counts = [sum(next(lengths) for _ in one.prompt.clips) for one in requests]
        for one, own in zip(requests, vectors.split(counts), strict=True):
            # Cloned, because a view would keep the vectors of all of them.
            one.vectors = own if len(requests) == 1 else own.clone()
        if any(one.wants_ctc for one in requests):
            logits = self._model.encoder.ctc_logits(states)
            for one, own in zip(requests, logits.split([sum(one.prompt.clips) for one in requests]), strict=True):
                self._give_ctc(one, own)

    def _give_ctc(self, request: Request, logits: Tensor) -> None:
        if request.wants_ctc:
            request.handle.ctc = Reading(logits.log_softmax(-1, dtype=torch.float32))

    @property
    def long(self) -> Request | None:
        """The request whose long audio is being encoded."""
        return None if self._long is None else self._long[0]

    def advance(self) -> None:
        """Encode some blocks of the long request."""
        request, blocks = self._long
        layers = self._model.encoder.num_layers
        for _ in range(max(1, self._frames * layers // sum(request.prompt.clips))):
            if next(blocks, None) is None:
                self._long = None
                return

    def drop_long(self) -> None:
        """Stop encoding the long request."""
        self._long = None

    def _blocks(self, request: Request) -> Iterator[Tensor]:
        """Yields after each block; the request has its vectors at the end."""
        frames, clips = _packed([request])
        encoder, is_padded = self._model.encoder, have_hooks(self._model.encoder)
        states = given = clips.pad(frames, clips.longest) if is_padded else frames
        for states in encoder.blocks(given, clips):
            yield states
        states = clips.pack(states) if is_padded else states
        request.vectors, _ = self._model.project_packed(states, clips)
        if request.wants_ctc:
            self._give_ctc(request, encoder.ctc_logits(states))


def _packed(requests: Sequence[Request]) -> tuple[Tensor, Segments]:
    """Frames of all clips of these requests, and where each clip lies."""
    clips = tuple(length for one in requests for length in one.prompt.clips)
    frames = [one.prompt.frames for one in requests]
    return frames[0] if len(frames) == 1 else torch.cat(frames), Segments(clips, frames[0].device)
