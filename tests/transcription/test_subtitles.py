"""The cues of a transcript: no text is lost, no line is too long without need, and times never go back."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.errors import InputError
from granite_speech.transcription.subtitles import SubtitleOptions, cues, one_line
from granite_speech.transcription.transcript import Segment, Transcript

LIMITS = st.none() | st.integers(1, 12)
OPTIONS = st.builds(SubtitleOptions, LIMITS, LIMITS, LIMITS)
WORDS = st.lists(
    st.sampled_from(["a", "seven", "stop,", "Rechtsschutz", "日本語の、字幕", "「はい」。", "ไทย", "é", "42", "\u00a0x"]), max_size=20
)
TEXTS = st.text(max_size=60) | st.builds(" ".join, WORDS) | st.builds("".join, WORDS)
TIMES = st.floats(-1, 30) | st.integers(0, 3) | st.floats(0, 0.003)
SEGMENTS = st.lists(st.tuples(TIMES, TIMES, TEXTS), max_size=8)


def transcript(*segments):
    parts = [Segment(index, start, end, text) for index, (start, end, text) in enumerate(segments)]
    return Transcript(" ".join(part.text for part in parts), segments=parts, duration=60.0)


def shown(text, *options, start=0.0, end=10.0):
    return [cue.lines for cue in cues(transcript((start, end, text)), SubtitleOptions(*options))]


def letters(text):
    """What must survive: everything but spaces, and what no file can hold."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f\ufeff]", "", text)


def test_a_segment_is_one_cue_of_one_line_by_default():
    text = "a long text " * 40
    assert shown(f" {text}\n\nand more\t") == [(text + "and more",)]


def test_lines_break_between_words():
    assert shown("open menu seven two five stop", 11) == [("open menu", "seven two", "five stop")]
    assert shown("a Donaudampfschifffahrt b", 5) == [("a", "Donaudampfschifffahrt", "b")]
    assert shown("자막은 낱말 사이에서", 4) == [("자막은", "낱말", "사이에서")]


def test_japanese_breaks_between_characters():
    assert shown("これは長い字幕です", 4) == [("これは長", "い字幕で", "す")]
    # Not before a full stop or a small kana, and not after an opening bracket.
    assert shown("字幕です。はい", 4) == [("字幕で", "す。はい")]
    assert shown("これはちょっと", 4) == [("これは", "ちょっと")]
    assert shown("彼は「はい」と", 3) == [("彼は", "「は", "い」と")]
    assert shown("GraniteはAIです", 4) == [("Granite", "はAIで", "す")]
    assert shown("長い。」』！", 2) == [("長い", "。」", "』！")]


def test_a_further_cue_begins_after_so_many_lines():
    found = cues(transcript((1.0, 4.0, "open menu seven two five stop")), SubtitleOptions(11, 2))
    assert [cue.lines for cue in found] == [("open menu", "seven two"), ("five stop",)]
    assert [(cue.start, cue.end) for cue in found] == [(1000, 3000), (3000, 4000)], "times by characters"


def test_the_number_of_lines_alone_implies_a_width():
    found = shown("word " * 30, None, 2)
    assert max(len(line) for lines in found for line in lines) == 39 and {len(lines) for lines in found} == {2}


def test_words_in_a_line():
    assert shown("one two three four five", None, None, 2) == [("one two",), ("three four",), ("five",)]
    assert shown("one two three four five", None, 2, 2) == [("one two", "three four"), ("five",)]
    assert shown("one two three four five", 7, None, 3) == [("one two", "three"), ("four", "five")]
    assert shown("one two three four five " * 3, None, 5, 9) == [
        ("one two three four five one two three four", "five one two three four five")
    ]


def test_each_cue_ends_before_the_next_begins():
    found = cues(transcript((0.0, 5.0, "a"), (4.0, 6.0, "b"), (3.0, 9.0, "c"), (20.0, 20.0, "d")), SubtitleOptions())
    assert [(cue.start, cue.end) for cue in found] == [(0, 4000), (4000, 6500), (6500, 9000), (20000, 20500)]


def test_segments_without_text_give_no_cue():
    segments = [
        Segment(0, 0, 1, " \n\x00"),
        Segment(1, 1, 2, "", error="x"),
        Segment(2, 2, 3, "partial", error="x"),
        Segment(3, 3, 4, "ok"),
    ]
    assert [cue.lines for cue in cues(Transcript("ok", segments=segments), SubtitleOptions())] == [("ok",)]
    assert cues(Transcript(), SubtitleOptions(4, 1, 1)) == []


def test_a_text_without_segments_is_one_cue():
    (cue,) = cues(Transcript("the whole text", duration=2.5), SubtitleOptions())
    assert (cue.start, cue.end, cue.lines) == (0, 2500, ("the whole text",))


@settings(max_examples=300, deadline=None)
@given(SEGMENTS, OPTIONS)
def test_any_text_at_any_times(segments, options):
    found = cues(transcript(*segments), options)
    assert letters("".join(line for cue in found for line in cue.lines)) == letters("".join(text for _, _, text in segments))
    assert all(line == one_line(line) and line for cue in found for line in cue.lines)
    assert all(cue.start < cue.end for cue in found) and all(a.end <= b.start for a, b in pairwise(found))
    if options.max_line_count:
        assert all(len(cue.lines) <= options.max_line_count for cue in found)
    elif options.max_words_per_line is None:
        assert len(found) == sum(1 for _, _, text in segments if one_line(text))
    for line in (line for cue in found for line in cue.lines):
        if options.max_words_per_line:
            assert len(line.split(" ")) <= options.max_words_per_line
        if options.max_line_width and len(line) > options.max_line_width:
            assert " " not in line and not re.search("[\u3040-\u9fff]{2}", line), "only a word is longer"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.sampled_from(["a b c", "長い字幕"])), max_size=8), OPTIONS)
def test_times_that_are_right_are_kept(gaps, options):
    segments, now = [], 0
    for length, gap, text in gaps:
        segments.append((now / 10, (now + length) / 10, text))
        now += length + gap
    found = cues(transcript(*segments), options)
    assert {round(1000 * start) for start, _, _ in segments} <= {cue.start for cue in found}
    assert {round(1000 * end) for _, end, _ in segments} <= {cue.end for cue in found}


@pytest.mark.parametrize("name", ["max_line_width", "max_line_count", "max_words_per_line"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "42", True])
def test_options_are_checked(name, value):
    with pytest.raises(InputError, match=name):
        SubtitleOptions(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_times_must_be_finite(value):
    with pytest.raises(InputError, match="finite"):
        cues(transcript((0.0, value, "a")), SubtitleOptions())
