"""Lessons: which clips each has, how long its batches are, and how strongly they are augmented."""

from itertools import chain, pairwise

import pytest
import torch

from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.training import Dialogue, read_manifest
from granite_speech.training.bundled_checkpoint.lessons import Lessons
from tests.support.tiny_speech import write_manifest, write_model

TEXTS = ("one", "two", "one two", "three one two", "two two two two", "three") * 3


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    write_model(folder / "model")
    model = GraniteSpeechForConditionalGeneration.from_pretrained(folder / "model")
    dialogue = Dialogue(GraniteSpeechProcessor.from_pretrained(folder / "model"), model.config)
    utterances = read_manifest(write_manifest(folder, TEXTS))

    def make(**options):
        return Lessons(utterances, dialogue, **{"lessons": 100, "lesson": 6, "batch_seconds": 2.4, **options})

    return make


def test_short_clips_come_first_and_then_passes_over_all_clips(make):
    data = make()
    lessons = [[index for batch in data.plan(lesson) for index in batch] for lesson in range(100)]
    assert all(data.words[index] <= 2 for lesson in lessons[:3] for index in lesson)
    for first in range(3, 99, 3):  # 18 clips in lessons of 6
        assert sorted(chain(*lessons[first : first + 3])) == list(range(18)), "each pass has each clip once"
    assert lessons[3:6] != lessons[6:9], "each pass has a new order"
    assert [make().plan(lesson) for lesson in (2, 50)] == [data.plan(lesson) for lesson in (2, 50)]
    assert make(seed=1).plan(50) != data.plan(50)


def test_batches_are_half_as_long_while_speech_is_clean(make):
    data = make()

    def seconds(lesson):
        return [sum(data.samples[index] for index in batch) / data.rate for batch in data.plan(lesson)]

    assert max(max(seconds(lesson)) for lesson in range(8)) <= 1.2 < max(max(seconds(lesson)) for lesson in range(8, 30)) <= 2.4


def test_augmentation_starts_late_and_gets_stronger(make):
    data = make()
    strengths = [data.strength(lesson) for lesson in range(100)]
    assert strengths[:9] == [0.0] * 9 and strengths[40:] == [1.0] * 60
    assert all(earlier < later for earlier, later in pairwise(strengths[8:41]))


def test_augmentation_is_repeatable_and_differs_between_lessons(make):
    data = make()
    first = data.load(60, [0, 3]).frames
    assert torch.equal(make().load(60, [0, 3]).frames, first)
    other = data.load(61, [0, 3]).frames
    assert other.shape != first.shape or not torch.equal(other, first)


def test_very_short_clips_are_padded(make, monkeypatch):
    monkeypatch.setattr("granite_speech.training.bundled_checkpoint.lessons.augment", lambda waveform, rng, strength, others: waveform[:3])
    assert len(make().load(60, [0]).frames) == 5  # a tenth of a second


def test_babble_is_made_of_the_other_clips(make, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "granite_speech.training.bundled_checkpoint.lessons.augment",
        lambda waveform, rng, strength, others: calls.append((len(others), others[3])) or waveform,
    )
    data = make()
    data.load(60, [0])
    assert calls[0][0] == len(TEXTS) and torch.equal(torch.from_numpy(calls[0][1]), data.utterances[3].waveform(data.rate))
