"""Forced alignment: the likeliest path, and where any words are in any output of a CTC head."""

import builtins
import math
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st

from granite_speech.transcription.alignment import Place, align
from granite_speech.transcription.viterbi import best_path, likeliest_labels
from tests.support.heard_letters import CHARACTERS, frame, spelled


def random_emissions(frames: int, labels: int, seed: int) -> np.ndarray:
    """Log-probabilities `(frames, labels)` without equal paths."""
    return torch.randn(frames, labels, generator=torch.Generator().manual_seed(seed)).mul(3).log_softmax(-1).numpy()


def needed(targets: Sequence[int]) -> int:
    """The frames of the shortest path: one for each target, and a blank between equal neighbours."""
    return len(targets) + sum(one == other for one, other in pairwise(targets))


def torchaudio_path(emissions: np.ndarray, targets: Sequence[int]) -> list[int]:
    path, _ = torchaudio.functional.forced_align(torch.from_numpy(emissions)[None], torch.tensor([targets], dtype=torch.int32))
    return path[0].tolist()


TARGETS = st.lists(st.integers(1, 4), min_size=1, max_size=12)


# --- the likeliest path ---------------------------------------------------------------------------------------------------------------


@given(targets=TARGETS, spare=st.integers(0, 20), seed=st.integers(0, 10_000))
def test_the_path_is_torchaudios(targets, spare, seed):
    emissions = random_emissions(needed(targets) + spare, 5, seed)
    path = likeliest_labels(emissions, targets)
    assert path == torchaudio_path(emissions, targets)


@pytest.mark.parametrize("targets", [[1], [1, 1], [1, 1, 1, 2], [2, 1, 2, 1]], ids=str)
def test_exactly_enough_frames_leave_one_path(targets):
    emissions = random_emissions(needed(targets), 3, 0)
    forced = [targets[0]]
    for before, after in pairwise(targets):
        forced += [0, after] if before == after else [after]
    assert likeliest_labels(emissions, targets) == forced == torchaudio_path(emissions, targets)
    assert best_path(emissions, targets) == [(frame, frame) for frame, label in enumerate(forced) if label]
    assert best_path(emissions[1:], targets) is None


def test_no_targets_are_nowhere():
    assert best_path(random_emissions(3, 3, 0), []) == []


@given(targets=TARGETS, spare=st.integers(0, 20), seed=st.integers(0, 10_000))
def test_spans_are_as_many_as_targets_and_in_order(targets, spare, seed):
    frames = needed(targets) + spare
    spans = best_path(random_emissions(frames, 5, seed), targets)
    assert len(spans) == len(targets)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges) and edges[0] >= 0 and edges[-1] < frames
    for place, (one, other) in enumerate(pairwise(spans)):
        assert other[0] - one[1] > (targets[place] == targets[place + 1]), "a blank is between equal neighbours"


@pytest.mark.parametrize("error", [ImportError("none"), OSError("libcudart.so.13: cannot open"), RuntimeError("CUDA 13.0")], ids=repr)
def test_without_torchaudio_the_places_are_the_same(monkeypatch, error):
    emissions, words = spelled("open two", frames=40), ["open", "two"]
    expected = align(emissions, words)
    load, refused = builtins.__import__, []

    def refuse(name, *given, **named):
        if name.partition(".")[0] == "torchaudio":
            refused.append(name)
            raise error
        return load(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert align(emissions, words) == expected and refused


# --- the places of words --------------------------------------------------------------------------------------------------------------


def spans(places: Sequence[Place]) -> list[tuple[int, int]]:
    return [(one.first, one.last) for one in places]


def test_words_are_where_their_letters_are():
    places = align(spelled("open two", frames=30), ["open", "two"])
    assert spans(places) == [(frame(0), frame(3)), (frame(5), frame(7))]
    assert [one.confidence for one in places] == pytest.approx([0.9, 0.9], abs=1e-2)
    assert [one.weights for one in places] == [(4,), (3,)]


def test_double_letters_are_two():
    assert spans(align(spelled("all_well", frames=30), ["all", "well"])) == [(frame(0), frame(2)), (frame(4), frame(7))]


@pytest.mark.parametrize("said", ["über den", "ÜBER DEN", "uber den", "Uber Den"])
@pytest.mark.parametrize("text", ["Über den", "über, den!", "ÜBER «DEN»", "u\u0308ber den", "uber den"])
def test_case_accents_and_punctuation_do_not_matter(said, text):
    places = align(spelled(said, frames=30), text.split())
    assert spans(places) == [(frame(0), frame(3)), (frame(5), frame(7))]
    assert min(one.confidence for one in places) > 0.85


@pytest.mark.parametrize("word", ["cœur", "Cœur", "ﬁn", "Straße"])
def test_ligatures_are_spelled_by_their_letters(word):
    said = {"cœur": "coeur", "ﬁn": "fin", "straße": "straße"}[word.casefold() if word == "Cœur" else word.lower()]
    [place] = align(spelled(said, frames=30), [word])
    assert spans([place]) == [(frame(0), frame(len(said) - 1))] and place.confidence > 0.85


def test_confidence_is_the_geometric_mean_of_the_letters():
    heard = spelled("two", frames=20).exp()
    heard[frame(1), ord("w")], heard[frame(1), 0] = 0.3, 0.6
    [place] = align(heard.log(), ["two"])
    assert place.confidence == pytest.approx((0.9 * 0.3 * 0.9) ** (1 / 3), rel=1e-2)


def test_a_word_that_is_not_said_has_no_confidence():
    sure, wrong = (align(spelled("open", frames=20), [word])[0].confidence for word in ("open", "quit"))
    assert wrong < 0.05 < 0.85 < sure


# --- words that cannot be spelled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["東京", "привет", "42", "€", "x²", "🎉", "no⁇7"])
def test_what_cannot_be_spelled_is_bridged_between_its_neighbours(word):
    """At the frames in which something is heard: here, the letters of what was said."""
    places = align(spelled("go__hey__up", frames=40), ["go", word, "up"])
    assert spans(places) == [(frame(0), frame(1)), (frame(4), frame(6)), (frame(9), frame(10))]
    assert places[1].confidence is None and len(places[1].weights) == 1
    assert min(places[0].confidence, places[2].confidence) > 0.85


def test_neighbours_that_cannot_be_spelled_are_bridged_together():
    places = align(spelled("go__hey__up", frames=40), ["go", "東", "4", "—", "京都", "up"])
    assert [len(one.weights) for one in places] == [1, 4, 1] and places[1].weights == (1, 1, 0, 2)
    assert spans(places)[1] == (frame(4), frame(6)) and places[1].confidence is None


def test_a_bridge_over_silence_takes_all_frames_between_its_neighbours():
    places = align(spelled("go_______up", frames=40), ["go", "東京", "up"])
    assert spans(places)[1] == (frame(1) + 1, frame(9) - 1)
    assert spans(align(spelled("", frames=8), ["東京"])) == [(0, 7)]


def test_digits_are_spelled_if_the_head_gives_them():
    said = align(spelled("go 42 up", frames=40), ["go", "42", "up"])
    assert spans(said)[1] == (frame(3), frame(4)) and said[1].confidence > 0.85
    unsaid = align(spelled("go xx up", frames=40), ["go", "42", "up"])
    assert spans(unsaid)[1] == (frame(3), frame(4)) and unsaid[1].confidence is None


def test_punctuation_alone_is_part_of_the_word_beside_it():
    places = align(spelled("yes no", frames=30), ["—", "yes", "…", "no", "!"])
    assert [one.weights for one in places] == [(0, 3, 0), (2, 0)]
    assert spans(places) == [(frame(0), frame(2)), (frame(4), frame(5))]
    [place] = align(spelled("yes", frames=12), ["…", "—"])
    assert place == Place(frame(0), frame(2), (0, 0), None)


def test_a_text_too_long_for_its_frames_is_bridged_whole():
    words = ["open", "two", "…", "up"]
    [place] = align(spelled("open", frames=8), words)
    assert place == Place(frame(0), frame(2), (4, 3, 0, 2), None)
    assert len(align(spelled("open", frames=9), words)) == 3, "nine letters fit into nine frames"


def test_labels_beyond_latin_of_the_heads_of_4_x_are_no_code_points():
    """They have 348 labels, of which the last 92 are Katakana: label 0x103 is not "ă"."""
    heard = spelled("go__\u0103__up", frames=40, labels=348)
    assert align(heard, ["go", "\u0142", "up"])[1].confidence is None
    places = align(heard, ["go", "\u0103", "up"])
    assert places[1].confidence < 0.05, "its only label is that of a"
    wide = align(spelled("go__\u0103__up", frames=40, labels=400), ["go", "\u0103", "up"])
    assert spans(wide)[1] == (frame(4), frame(4)) and wide[1].confidence > 0.85


# --- any words, any log-probabilities -------------------------------------------------------------------------------------------------

SCRIPTS = st.text("aZéßøœÿ ﬁ½Ⅷ٣4%&-…—。、「」東ア가щא🎉👩\u200d🚀\u0301\ufeff\x00", min_size=1, max_size=8)
ANY_WORD = st.one_of(SCRIPTS, st.text(min_size=1, max_size=6), st.sampled_from(["the", "naïve", "C3PO", "100%", "—", "東京"]))


@given(
    words=st.lists(ANY_WORD, max_size=8),
    frames=st.integers(1, 60),
    labels=st.sampled_from([2, 3, 34, 128, 256, 348, 1000]),
    sharpness=st.sampled_from([0.0, 1.0, 5.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_every_word_is_in_one_place_in_order_and_within_the_frames(words, frames, labels, sharpness, seed):
    logits = torch.randn(frames, labels, generator=torch.Generator().manual_seed(seed)) * sharpness
    places = align(logits.log_softmax(-1), words)
    assert sum(len(one.weights) for one in places) == len(words)
    assert all(one.weights for one in places)
    for one in places:
        assert one.confidence is None or 0 < one.confidence <= 1
        assert 0 <= one.first <= one.last < frames
    for before, after in pairwise(places):
        assert before.last < after.first
        assert before.confidence is not None or after.confidence is not None, "neighbouring bridges are one"
    spoken = [sum(one.isalnum() for one in unicodedata.normalize("NFC", word)) > 0 for word in words]
    weights = [weight for one in places for weight in one.weights]
    assert all(weight > 0 for weight, is_spoken in zip(weights, spoken, strict=True) if is_spoken)


def test_frames_with_probabilities_of_zero_align_too():
    heard = torch.full((12, CHARACTERS), -math.inf)
    heard[:, 0] = 0.0
    [place] = align(heard, ["open"])
    assert 0 <= place.first < place.last < 12 and place.confidence == pytest.approx(1e-4, rel=1e-3)
