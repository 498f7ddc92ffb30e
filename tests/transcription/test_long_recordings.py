"""Minutes of audio made of sentences that the model knows: every word, where it was said, in memory that does not grow."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from granite_speech import Transcriber
from granite_speech.training import word_error_rate
from granite_speech.transcription.transcript import Segment
from tests.support.long_recordings import Difference, Spoken, assemble, differences, draw_pauses, passages
from tests.support.paths import ROOT
from tests.support.spoken import load
from tests.support.sweep_lengths import voices

VOICES = voices()
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


@pytest.fixture(scope="module")
def transcriber() -> Iterator[Transcriber]:
    with Transcriber(*load()) as transcriber:
        yield transcriber


# Noise 40 dB below these changes the model's answer.
NOISE_CHANGES = ("five zero one zero three three nine three", "bed repeat bed")


Utterance = tuple[np.ndarray, str]


def in_random_order(count: int, rng: np.random.Generator, voices: Sequence[Utterance] = VOICES) -> list[Utterance]:
    """Each sentence as often as the others, give or take one."""
    order = np.concatenate([rng.permutation(len(voices)) for _ in range(-(-count // len(voices)))])
    return [voices[number] for number in order[:count]]


@pytest.mark.parametrize("noise_db, gains_db", [(None, 0), (-40, 12)])
def test_every_word_of_ten_minutes_where_it_was_said(transcriber, tmp_path, noise_db, gains_db):
    rng = np.random.default_rng(11)
    said = in_random_order(60, rng, [one for one in VOICES if noise_db is None or one[1] not in NOISE_CHANGES])
    gains = rng.uniform(-gains_db, 0, len(said))
    truth = assemble(
        tmp_path / "minutes.flac", said, draw_pauses(rng, len(said) + 1, 0.3, 15), rate=22_050, noise_db=noise_db, gains_db=gains
    )
    transcript = transcriber.transcribe(tmp_path / "minutes.flac")
    assert transcript.duration > 480 and transcript.warnings == ()
    heard = passages(truth, transcript.segments)
    assert [one.text for one in heard] == [one.expected for one in heard]
    assert len(heard) > 50, "pauses divide the segments"
    for one in heard:
        assert abs(one.segments[0].start - one.spoken[0].start) < 0.3
        assert abs(one.segments[-1].end - one.spoken[-1].end) < 0.3
    assert transcript == " ".join(text for _, text in said)


def test_speech_without_pauses_loses_few_words_and_no_window(transcriber, tmp_path):
    said = in_random_order(48, np.random.default_rng(5))
    truth = assemble(tmp_path / "continuous.wav", said, [0.0] * (len(said) + 1))
    transcript = transcriber.transcribe(tmp_path / "continuous.wav")
    assert all(one.text and one.end - one.start <= 4.0 + 1e-3 for one in transcript.segments)
    assert transcript.segments[0].start < 0.1 and transcript.segments[-1].end > truth[-1].end - 0.1
    assert all(after.start - before.end < 0.1 for before, after in zip(transcript.segments, transcript.segments[1:], strict=False))
    assert word_error_rate([" ".join(one.text for one in truth)], [str(transcript)]) < 0.15


def test_memory_does_not_grow_with_length(tmp_path):
    peaks = []
    for minutes in (10, 30):
        rng, file = np.random.default_rng(minutes), tmp_path / f"{minutes}.wav"
        said = in_random_order(3 * minutes, rng)
        spoken = sum(samples.size for samples, _ in said) / 16_000
        assemble(file, said, draw_pauses(rng, len(said) + 1, 0.3, 30, total=60 * minutes - spoken))
        command = [sys.executable, "-m", "bench.hours_process", "1", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout)
        assert abs(measured["transcript"]["duration"] - 60 * minutes) < 0.1 and len(measured["transcript"]["segments"]) >= len(said)
        peaks.append(measured["memory"]["peak above import"])
        file.unlink()
    short, long = peaks
    # bench/results has the ratio on a quiet machine. On a busy one, more windows wait at once than in ten minutes. Samples alone, if they
    # were kept, would add 73 MiB.
    assert long <= 1.25 * short, f"{short / 2**20:.1f} MiB for ten minutes, {long / 2**20:.1f} MiB for thirty"


# --- the comparison itself ----------------------------------------------------------------------------------------------------------


def test_segments_are_matched_to_utterances_by_time():
    truth = [Spoken("one two", 1, 2), Spoken("three", 2.5, 3), Spoken("four", 9, 10)]
    segments = [
        Segment(0, 0.9, 2.6, "one two"),
        Segment(1, 2.6, 3.1, "three"),
        Segment(2, 5, 6, "no"),
        Segment(3, 9.9, 11, "four"),
    ]
    found = passages(truth, segments)
    assert [(one.expected, one.text) for one in found] == [("one two three", "one two three"), ("", "no"), ("four", "four")]
    assert [(one.expected, one.text) for one in passages(truth, [])] == [("one two", ""), ("three", ""), ("four", "")]


@pytest.mark.parametrize(
    "expected, heard, found",
    [
        ("one two", "one two", []),
        ("", "", []),
        ("one two three", "one three", [Difference("lost", ("two",), (), False)]),
        ("one two", "one", [Difference("lost", ("two",), (), True)]),
        ("one two", "one two two", [Difference("doubled", (), ("two",), True)]),
        ("one two three", "one two four three", [Difference("added", (), ("four",), False)]),
        ("one two", "nine two", [Difference("changed", ("one",), ("nine",), True)]),
        ("one", "", [Difference("lost", ("one",), (), True)]),
        ("", "one", [Difference("added", (), ("one",), True)]),
    ],
)
def test_differences_say_what_became_of_the_words(expected, heard, found):
    assert differences(expected, heard) == found


def test_an_assembled_recording_has_each_utterance_where_it_says(tmp_path: Path):
    import soundfile

    said = VOICES[:3]
    truth = assemble(tmp_path / "a.wav", said, [0.5, 25.0, 0.0, 1.0])
    samples, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert rate == 16_000 and len(samples) == round((truth[-1].end + 1.0) * rate)
    assert truth[0].start == 0.5 and truth[1].start == truth[0].end + 25.0 and truth[2].start == truth[1].end
    for one, (waveform, text) in zip(truth, said, strict=True):
        begin = round(one.start * rate)
        assert one.text == text and np.abs(samples[begin : begin + waveform.size] - waveform).max() < 1e-4
    assert not samples[: round(0.5 * rate)].any()
