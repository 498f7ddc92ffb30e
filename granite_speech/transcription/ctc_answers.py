"""From the tokens of a recording's windows to its segments: overlaps are joined frame by frame, and segments end in pauses."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from granite_speech.transcription.collected import Collected, confidence
from granite_speech.transcription.ctc_piece import CTCSetup
from granite_speech.transcription.ctc_tokens import Token, joined, passages, within, words_of
from granite_speech.transcription.transcript import Segment
from granite_speech.transcription.window_piece import WindowPiece

__all__ = ["CTCAnswers"]

_NOTHING = np.zeros(0, np.float32)
_OVER = 5.0  # seconds of silence after which no word goes on


@dataclass(frozen=True)
class _Heard:
    """What a window gives to the text.

    Attributes:
        start, end: in seconds.
        tokens: within them.
        level: `loudness` from `start` on, if the call has asked for words.
        logprobs: of the frames from `start` on; not needed once windows are joined.
        error: why there are no tokens; None: nothing failed.
    """

    start: float
    end: float
    tokens: list[Token]
    level: np.ndarray
    logprobs: np.ndarray
    error: Exception | None = None


class CTCAnswers(Collected):
    """Makes the segments and the transcript of one recording, from the tokens of a CTC model.

    Two windows that overlap meet in the middle of the overlap: frames before it are those of the first window, the others those of the
    second. So nothing is said twice, and a token whose frames are in both windows stays one.
    """

    _setup: CTCSetup
    _open: _Heard | None = None  # what may go on in the next window

    def segments(self, pieces: Iterable[WindowPiece]) -> Iterator[Segment]:
        """Yields each segment once nothing can change it any more."""
        held: _Heard | None = None  # the window after it may take its end over
        for piece in pieces:
            window = piece.window
            border = window.start + window.overlap / 2
            if held is not None:
                yield from self._take(self._part(held, held.start, border) if window.overlap else held, goes_on=bool(window.overlap))
            held = self._part(self._heard(piece), border, window.end)
            self._on_progress(window.end)
        if held is not None:
            yield from self._take(held, goes_on=False)

    def _heard(self, piece: WindowPiece) -> _Heard:
        window = piece.window
        try:
            piece, answer = self._answer(piece)
            level = piece.level().numpy() if self._has_words else _NOTHING
        except Exception as error:  # whatever a window fails with, the others have their texts
            return _Heard(window.start, window.end, [], _NOTHING, _NOTHING, error)
        begin = window.start / self._setup.frame_seconds
        found = zip(answer.token_ids, answer.logprobs, answer.frames, strict=True)
        tokens = [Token(token, logprob, begin + first, begin + last) for token, logprob, (first, last) in found]
        return _Heard(window.start, window.end, tokens, level, answer.frame_logprobs.numpy())

    def _part(self, heard: _Heard, start: float, end: float) -> _Heard:
        """What was heard between two moments."""
        frame, hop = self._setup.frame_seconds, self._setup.level_seconds
        level = heard.level[round((start - heard.start) / hop) : round((end - heard.start) / hop)]
        logprobs = heard.logprobs[round((start - heard.start) / frame) :]
        tokens = within(heard.tokens, start / frame, end / frame, heard.logprobs, heard.start / frame)
        return replace(heard, start=start, end=end, tokens=tokens, level=level, logprobs=logprobs)

    def _take(self, heard: _Heard, goes_on: bool) -> Iterator[Segment]:
        """The segments that have ended in a part of the recording; the last one is kept if what follows may continue it."""
        if heard.error is not None:
            yield from self._close()
            yield self._failed(heard)
            return
        before = self._open
        if before is not None:
            heard = replace(
                heard, start=before.start, tokens=joined(before.tokens, heard.tokens), level=np.concatenate([before.level, heard.level])
            )
        self._open = heard
        frame = self._setup.frame_seconds
        parts = list(passages(heard.tokens, self._setup.text, frame))
        for number, tokens in enumerate(parts[:-1], 1):
            yield from self._segment(tokens, parts[number][0].first * frame)
        last = self._open
        if not goes_on or (last.tokens and last.end - (last.tokens[-1].last + 1) * frame > _OVER):
            yield from self._close()
        elif not last.tokens:
            self._open = self._part(last, max(last.start, last.end - _OVER), last.end)

    def _close(self) -> Iterator[Segment]:
        """The segment that was kept."""
        if self._open is not None and self._open.tokens:
            yield from self._segment(self._open.tokens, self._open.end)
        self._open = None

    def _segment(self, tokens: list[Token], until: float) -> Iterator[Segment]:
        """The segment of a passage, which is taken away from what is kept; none if its tokens have no text.

        Args:
            tokens: the first of what is kept.
            until: where the next passage begins, or what is kept ends, in seconds.
        """
        kept, setup, frame = self._open, self._setup, self._setup.frame_seconds
        text, logprobs = setup.text([one.id for one in tokens]).strip(), [one.logprob for one in tokens]
        start, end = max(kept.start, tokens[0].first * frame), min(until, (tokens[-1].last + 1) * frame)
        if text:
            words = None
            if self._has_words:
                level = kept.level[: round((until - kept.start) / setup.level_seconds)]
                times = {"frame_seconds": frame, "level_seconds": setup.level_seconds}
                words = tuple(words_of(tokens, setup.text, level, start=kept.start, end=until, **times))
                start, end = (words[0].start, words[-1].end) if words else (start, end)
            segment = Segment(len(self._segments), round(start, 3), round(end, 3), text, words=words, confidence=confidence(logprobs))
            self._logprobs += logprobs
            self._segments.append(segment)
            yield segment
        used = max(kept.start, end)
        level = kept.level[round((used - kept.start) / setup.level_seconds) :]
        self._open = replace(kept, start=used, tokens=kept.tokens[len(tokens) :], level=level)

    def _failed(self, heard: _Heard) -> Segment:
        """The segment of a window without tokens."""
        self._errors.append(heard.error)
        self._note("window_error", heard.start, heard.end, f"this window has no text: {heard.error}")
        words = () if self._has_words else None
        place = round(heard.start, 3), round(heard.end, 3)
        segment = Segment(len(self._segments), *place, "", error=str(heard.error), words=words)
        self._segments.append(segment)
        return segment
