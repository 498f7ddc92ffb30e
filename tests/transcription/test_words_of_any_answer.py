"""Words of whole recordings, whatever the model answers and the CTC head hears: they are those of the text, in order, and inside it."""

import json
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech import Transcriber, Transcript
from granite_speech.engine.handle import Answer
from granite_speech.transcription import job
from granite_speech.transcription.piece import Piece
from granite_speech.transcription.subtitles import SubtitleOptions, cues
from granite_speech.transcription.text_units import single_spaces, text_units
from granite_speech.transcription.windows import Window
from tests.support.spoken import load

RATE = 16_000
NO_BREAK_SPACES = "Qu\u2019est-ce\u202f? Une\u00a0: \u00ab\u00a0deux\u00a0\u00bb. one two three"
TEXTS = st.lists(
    st.text(max_size=12) | st.sampled_from(["one", "one two", "l'été\u00a0!", "日本語。", "4\u202f000", "\x07"]), max_size=8
).map(" ".join)


@pytest.fixture(scope="module")
def transcriber() -> Iterator[Transcriber]:
    with Transcriber(*load()) as transcriber:
        yield transcriber


def transcribed(transcriber: Transcriber, texts: list[str], seconds: float, overlap: float, seed: int, **options) -> Transcript:
    """The transcript of windows of noise that share `overlap` seconds, with these answers, as if the CTC head heard anything."""
    noise = torch.Generator().manual_seed(seed)
    step = seconds - overlap
    windows = {
        number * step: Window(number * step, number * step + seconds, torch.randn(round(seconds * RATE), generator=noise) * 0.1, over)
        for number, over in enumerate([0.0] + [overlap] * (len(texts) - 1))
    }
    tokenizer, spoken = transcriber.processor.tokenizer, dict(zip(windows, texts, strict=True))

    class Given:
        duration = (len(texts) - 1) * step + seconds

        def __init__(self, blocks, **options):
            self._windows = iter(windows.values())

        def __next__(self) -> Window:
            return next(self._windows)

    def answer(piece: Piece) -> Answer:
        ids = tokenizer.encode(spoken[piece.window.start], add_special_tokens=False)
        frames = int(seconds * 50)
        heard = torch.randn(frames, 128, generator=noise) * 4
        heard[:, 0] += 8
        logprobs = (-torch.rand(len(ids), generator=noise)).tolist()
        return Answer(tokenizer.decode(ids, skip_special_tokens=True), ids, "stop", logprobs, heard.log_softmax(-1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Windows", Given)
        patch.setattr(Piece, "submit", lambda piece: None)
        patch.setattr(Piece, "answer", answer)
        [found] = transcriber.stream([torch.zeros(RATE)], compression_ratio_threshold=None, **options)
    return found


def assert_sound(found: Transcript) -> None:
    """Assert what is true of the words of any transcript."""
    assert all(one.error is None for one in found.segments)
    latest = 0.0
    for segment in found.segments:
        assert [one.word for one in segment.words] == [unit for _, unit in text_units(single_spaces(segment.text)) if unit]
        for word in segment.words:
            assert latest <= word.start <= word.end <= found.duration
            latest = word.end
            assert all(0 <= one <= 1 for one in (word.confidence, word.ctc_confidence, word.lm_confidence) if one is not None)
    json.dumps(found.to_dict(), allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3), st.sampled_from([0.06, 0.5, 3.0]), st.sampled_from([0.0, 0.2, 0.5]), st.integers(0, 999))
def test_words_of_any_answers_are_those_of_the_text(transcriber, texts, seconds, part, seed):
    options = {"seconds": seconds, "overlap": seconds * part, "seed": seed}
    found = transcribed(transcriber, texts, **options, word_timestamps=True)
    assert_sound(found)
    assert found == transcribed(transcriber, texts, **options)


def test_answers_with_ctc_probabilities_can_be_compared_and_printed():
    one, other = (Answer("one", [1], "stop", [-0.5], torch.full((1500, 348), value)) for value in (0.0, 1.0))
    assert one == other != Answer("two", [1], "stop", [-0.5], one.ctc_logprobs)
    assert "tensor" not in repr(one)


@pytest.mark.parametrize("overlap", [0.0, 1.0])
def test_a_no_break_space_is_inside_a_word(transcriber, overlap):
    found = transcribed(transcriber, [NO_BREAK_SPACES, "three four\u00a0!"], 3.0, overlap, 0, word_timestamps=True)
    assert_sound(found)
    assert [one.word for one in found.words][:4] == ["Qu\u2019est-ce\u202f?", "Une\u00a0:", "\u00ab\u00a0deux\u00a0\u00bb.", "one"]
    assert all(one.lm_confidence is not None for one in found.words)
    shown = cues(found, SubtitleOptions(highlight_words=True))
    assert len([one for one in shown if one.underlined is not None]) == len(found.words)
