"""The comparison of a recording with its utterances alone, and the table of a run."""

import json

from bench import hours, hours_process
from granite_speech.transcription.transcript import Segment
from tests.support.long_recordings import Spoken
from tests.support.spoken import SPEECH, sentences

TRUTH = [Spoken("one two", 0.0, 1.0), Spoken("three", 2.0, 3.0), Spoken("four five", 5.0, 6.0)]
ALONE = ["one two", "tree", "four five"]


def segments(*texts: str) -> list[Segment]:
    return [Segment(number, one.start, one.end, text) for number, (one, text) in enumerate(zip(TRUTH, texts, strict=True))]


def test_what_the_model_gets_wrong_alone_too_is_not_a_difference():
    found = hours.compare(TRUTH, ALONE, segments(*ALONE))
    assert found["wer"] == found["wer_alone"] == 0.2
    assert found["differing"] == [] and set(found["words"].values()) == {0} and found["passages"] == 3


def test_words_that_are_lost_doubled_added_and_changed_are_counted_and_shown():
    found = hours.compare(TRUTH, ALONE, [*segments("one two two", "three", "four"), Segment(3, 8.0, 9.0, "no")])
    assert found["words"] == {"lost": 1, "doubled": 1, "added": 1, "changed": 1}
    assert [(one["start"], one["alone"], one["here"]) for one in found["differing"]] == [
        (0.0, "one two", "one two two"),
        (2.0, "tree", "three"),
        (5.0, "four five", "four"),
        (8.0, "", "no"),
    ]
    assert found["wer"] == 2 / 5, "of the whole text: four five, four no"


def test_a_segment_with_two_utterances_is_compared_with_both():
    found = hours.compare(TRUTH, ALONE, [Segment(0, 0.0, 3.1, "one tree"), Segment(1, 5.0, 5.5, "four"), Segment(2, 5.5, 6.0, "five")])
    (one,) = found["differing"]
    assert (one["spoken"], one["alone"], one["here"], one["cuts"]) == ("one two three", "one two tree", "one tree", [])
    assert found["words"]["lost"] == 1 and found["passages"] == 2 and not any(found["words in cut passages"].values())


def test_words_that_a_cut_costs_are_counted_apart():
    cut = [Segment(0, 0.0, 1.0, "one two"), Segment(1, 2.0, 3.0, "tree"), Segment(2, 5.0, 5.5, "four"), Segment(3, 5.4, 6.0, "four five")]
    found = hours.compare(TRUTH, ALONE, cut)
    assert found["words"] == found["words in cut passages"] == {"lost": 0, "doubled": 1, "added": 0, "changed": 0}
    assert found["differing"][0]["cuts"] == [5.5]


def test_the_pauses_and_utterances_are_an_hour():
    import numpy as np

    utterances = [(np.zeros(16_000 * (1 + number % 3), np.float32), "one") for number in range(200)]
    pauses = hours.pauses_of_an_hour(utterances, np.random.default_rng(0))
    assert len(pauses) == 201 and min(pauses) >= 0.3
    assert abs(sum(pauses) + sum(samples.size for samples, _ in utterances) / 16_000 - 3600) < 1e-6


def test_a_process_measures_words_time_and_memory():
    measured = json.loads(json.dumps(hours_process.measure(str(SPEECH / "03.flac"), 2)))
    assert measured["transcript"]["text"] == sentences()[3].text
    assert len(measured["seconds"]) == 2 and min(measured["seconds"]) > 0
    memory = measured["memory"]
    assert memory["peak"] >= memory["with model"] > 2**27 and memory["peak above import"] == memory["peak"] - memory["after import"] >= 0


def test_the_table_shows_every_recording():
    entry = hours.compare(TRUTH, ALONE, segments("one two two", "three", "four")) | {"utterances": 3, "audio_seconds": 6.0}
    entry |= {"what": "six seconds", "seconds": [0.2, 0.1, 0.3], "rtfx": 30.0, "threads": 2, "memory": {"peak above import": 3 << 20}}
    run = {"machine": "a CPU", "commit": "0123456789", "versions": {"torch": "2"}}
    shape = {"model": "embedded", "dtype": "float32", "format": "WAV", "rounds": 3}
    pauses = {"shortest": 0.31, "longest": 29.8}
    text = hours.table({"run": run, "shape": shape, "pauses": pauses, "measurements": [entry], "memory_ratio": 1.0})
    assert "a CPU, 2 threads, torch 2, commit 01234567" in text and "pauses of 0.3 to 30 s" in text
    assert "| six seconds | 3 | 20.00% | 40.00% | 1, 1, 0, 1 | 0, 0, 0, 0 | 200 ms | 30 | 3 MiB |" in text
    assert "1.00 times that of its first ten minutes" in text
