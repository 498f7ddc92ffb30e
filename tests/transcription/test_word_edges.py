"""Where words begin and end, from levels made by hand, and the level of sounds made by hand."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.transcription.alignment import Place
from granite_speech.transcription.word_edges import edges, loudness
from tests.support.known_words import known_words

RATE = 16_000
LOUD, QUIET, BREATH = 30.0, 0.0, 2.0
CLOSE = 1.5  # frames of 10 ms


def level(*parts: tuple[int, float]) -> np.ndarray:
    """Frames of 10 ms: so many of each level."""
    return np.concatenate([np.full(count, value, np.float32) for count, value in parts])


def place(first: int, last: int) -> Place:
    """One word, whose first and last letter are in these frames of 10 ms, which are even."""
    return Place(first // 2, last // 2, (3,), 0.9)


def close(found: list[tuple[float, float]], *expected: tuple[float, float]) -> None:
    assert len(found) == len(expected)
    assert np.abs(np.subtract(found, expected)).max() <= CLOSE, found


# --- edges ----------------------------------------------------------------------------------------------------------------------------


def test_words_end_and_begin_where_the_pause_between_them_does():
    sound = level((10, QUIET), (30, LOUD), (15, QUIET), (25, LOUD), (20, QUIET))
    close(edges(sound, [place(14, 30), place(58, 70)]), (10, 40), (55, 80))


def test_without_a_pause_words_meet_in_the_faintest_moment():
    sound = level((10, QUIET), (30, LOUD), (1, LOUD - 9), (30, LOUD), (10, QUIET))
    [one, other] = edges(sound, [place(14, 20), place(46, 66)])
    assert one[1] == other[0]
    close([one, other], (10, 40), (40, 71))


def test_a_breath_between_two_long_pauses_belongs_to_neither_word():
    sound = level((10, QUIET), (30, LOUD), (30, QUIET), (12, BREATH), (30, QUIET), (30, LOUD), (10, QUIET))
    close(edges(sound, [place(14, 30), place(118, 130)]), (10, 40), (112, 142))


@pytest.mark.parametrize("closure", [3, 8, 12])
def test_a_closure_before_a_final_burst_stays_in_the_word(closure):
    """As in "next": silence, then t, then a pause."""
    end = 40 + closure + 4
    sound = level((10, QUIET), (30, LOUD), (closure, QUIET), (4, LOUD - 10), (40, QUIET), (30, LOUD), (10, QUIET))
    close(edges(sound, [place(14, 30), place(end + 44, end + 60)]), (10, end), (end + 40, end + 70))


def test_a_burst_after_the_last_letter_is_the_words_at_the_end_of_the_recording_too():
    sound = level((10, QUIET), (30, LOUD), (8, QUIET), (4, LOUD - 10), (30, QUIET))
    close(edges(sound, [place(14, 30)]), (10, 52))


def test_a_word_fills_a_recording_without_a_pause():
    [(begin, end)] = edges(level((60, LOUD)), [place(4, 50)])
    assert begin <= 4 and 50 < end <= 60


def test_a_pause_within_a_word_does_not_end_it():
    sound = level((10, QUIET), (20, LOUD), (25, QUIET), (20, LOUD), (10, QUIET))
    close(edges(sound, [place(14, 64)]), (10, 75))


def test_silence_and_no_place_at_all():
    [(begin, end)] = edges(level((40, QUIET)), [place(10, 20)])
    assert 0 <= begin <= 12 and 20 <= end <= 40
    assert edges(level((40, LOUD)), []) == []


@st.composite
def places_and_level(draw) -> tuple[np.ndarray, list[Place]]:
    """Any level, and places as `align` gives them: in order, none in a frame of another."""
    cuts = sorted(draw(st.sets(st.integers(0, 59), max_size=16)))
    places = [Place(first, last, (1,), None) for first, last in zip(cuts[::2], cuts[1::2], strict=False)]
    if cuts and draw(st.booleans()):
        places.append(Place(cuts[-1] + 1, cuts[-1] + 1, (1,), None))
    frames = 2 * draw(st.integers(max([0, *(one.last for one in places)]) + 1, 62))
    values = draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 2.0, 40.0]), min_size=frames, max_size=frames))
    return np.array(values, np.float32), places


@given(places_and_level())
def test_edges_are_in_order_within_the_recording_and_around_their_letters(case):
    sound, places = case
    found = edges(sound, places)
    assert len(found) == len(places)
    times = [time for one in found for time in one]
    assert times == sorted(times)
    assert all(0 <= time <= len(sound) for time in times)
    for (begin, end), one in zip(found, places, strict=True):
        assert begin <= 2 * one.first + 1 and end >= 2 * one.last
        assert begin < end, "a word takes time"
    for (_, end), (begin, _) in pairwise(found):
        assert end <= begin


# --- the level ------------------------------------------------------------------------------------------------------------------------

PROCESSOR = GraniteSpeechProcessor.from_pretrained("embedded")


def level_of(samples: torch.Tensor) -> np.ndarray:
    features = PROCESSOR.audio_processor(samples)["input_features"][0]
    return loudness(features, 80).numpy()


def two_words(gap: float = 0.2) -> torch.Tensor:
    """Two spoken words with silence around them, and between them."""
    one, other = (torch.from_numpy(word.samples) for word in known_words()[8:10])
    pause = torch.zeros(int(gap * RATE))
    return torch.cat([pause, one, pause, other, pause])


def word_edges(samples: torch.Tensor) -> np.ndarray:
    one, other = known_words()[8:10]
    frames, gap = [len(word.samples) // 160 for word in (one, other)], 20
    places = [place(gap + 6, gap + frames[0] // 2), place(2 * gap + frames[0] + 6, 2 * gap + frames[0] + frames[1] // 2)]
    return np.array(edges(level_of(samples), places))


@pytest.mark.parametrize("gain", [0.01, 0.03, 0.1, 0.3, 10.0, 20.0])
def test_edges_do_not_depend_on_the_gain(gain):
    assert np.abs(word_edges(gain * two_words()) - word_edges(two_words())).max() <= 1


@pytest.mark.parametrize("noise_db", [-60, -40, -25])
def test_edges_in_steady_noise_are_those_in_silence(noise_db):
    words = two_words()
    noise = torch.randn(len(words), generator=torch.Generator().manual_seed(0)) * words.std() * 10 ** (noise_db / 20)
    begins, ends = (word_edges(words + noise) - word_edges(words)).T
    assert np.abs(begins).max() <= 3 and np.abs(ends).max() <= 10


@pytest.mark.parametrize("amplitude", [1e-4, 0.01, 0.3])
def test_noise_alone_is_no_speech(amplitude):
    noise = amplitude * torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0))
    assert np.quantile(level_of(noise), 0.9) < 0.8
    assert np.quantile(level_of(two_words()), 0.6) > 4, "words are"


def test_what_is_far_below_the_words_is_no_speech():
    """A hum that is 55 dB fainter, after words with nothing around them."""
    words = two_words()
    hum = words.abs().max() * 10 ** (-55 / 20) * torch.sin(torch.arange(RATE // 2) * 0.1)
    assert level_of(torch.cat([words, hum, torch.zeros(RATE // 2)]))[len(words) // 160 + 2 :].max() < 1


def test_digital_silence_is_a_pause_beside_words_and_alone():
    sound = level_of(two_words())
    assert sound[:18].max() == 0 and sound[-18:].max() == 0
    assert level_of(torch.zeros(RATE)).max() == 0


def test_a_level_has_two_values_for_each_frame_of_any_dtype_and_width():
    features = PROCESSOR.audio_processor(two_words())["input_features"][0]
    expected = loudness(features, 80)
    assert expected.shape == (2 * features.shape[0],) and expected.dtype == torch.float32 and float(expected.min()) >= 0
    assert torch.equal(loudness(torch.cat([features, torch.randn(features.shape[0], 7)], 1), 80), expected)
    close_to = loudness(features.bfloat16(), 80)
    assert close_to.dtype == torch.float32 and float((close_to - expected).abs().mean()) < 0.5
    assert loudness(features[:1], 80).shape == (2,)
