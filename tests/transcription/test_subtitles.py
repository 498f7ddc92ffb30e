"""The cues of a transcript: no text is lost, no line is too long without need, and times never go back."""

import math
import re
from dataclasses import replace
from itertools import groupby, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from granite_speech.errors import InputError
from granite_speech.transcription.subtitles import SubtitleOptions, cues, one_line
from granite_speech.transcription.text_units import text_units
from granite_speech.transcription.transcript import Segment, Transcript, Word

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
@example([(0.0, 1.0, "0\xa0\u0e00")], SubtitleOptions(1))
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


# --- with words -------------------------------------------------------------------------------------------------------------------

HIGHLIGHTED = st.builds(SubtitleOptions, LIMITS, LIMITS, LIMITS, st.just(True))


def timed(text, *times):
    """A segment whose words have these times."""
    units = [unit for _, unit in text_units(one_line(text))] if one_line(text) else []
    words = [Word(unit, start, end, 0.9) for unit, (start, end) in zip(units, times, strict=True)]
    return Segment(0, times[0][0] if times else 0.0, times[-1][1] if times else 1.0, text, words=words)


def steps(text, start=0.0, length=0.3, gap=0.2):
    """A segment whose words are `length` seconds long, with a pause after each."""
    count = len(list(text_units(text)))
    return timed(text, *[(start + place * (length + gap), start + place * (length + gap) + length) for place in range(count)])


def times(found):
    return [(cue.start, cue.end, " / ".join(cue.lines)) for cue in found]


@st.composite
def segments_with_words(draw):
    segments = []
    for text in draw(st.lists(TEXTS, max_size=5)):
        count = len(list(text_units(one_line(text)))) if one_line(text) else 0
        segments.append(timed(text, *draw(st.lists(st.tuples(TIMES, TIMES), min_size=count, max_size=count))))
    return segments


def test_cues_have_the_times_of_their_words():
    segment = timed("open menu seven two", (1.0, 1.4), (1.5, 2.0), (2.6, 3.0), (3.0, 3.25))
    talk = Transcript(segment.text, segments=[segment])
    assert times(cues(talk, SubtitleOptions())) == [(1000, 3250, "open menu seven two")]
    assert times(cues(talk, SubtitleOptions(9, 1))) == [(1000, 2000, "open menu"), (2600, 3250, "seven two")]
    assert times(cues(talk, SubtitleOptions(9))) == [(1000, 3250, "open menu / seven two")]
    one_each = [(1000, 1400, "open"), (1500, 2000, "menu"), (2600, 3000, "seven"), (3000, 3250, "two")]
    assert times(cues(talk, SubtitleOptions(max_words_per_line=1))) == one_each


def test_a_transcript_without_segments_uses_its_words():
    words = [Word("one", 0.5, 1.0, 1.0), Word("two", 2.0, 2.5, 1.0)]
    found = cues(Transcript("one two", words=words, duration=9.0), SubtitleOptions(max_words_per_line=1))
    assert times(found) == [(500, 1000, "one"), (2000, 2500, "two")]


def test_a_word_that_is_divided_shares_its_time_by_its_characters():
    segment = timed("字幕。」』！", (0.0, 1.0), (1.0, 3.0))
    assert [one.word for one in segment.words] == ["字", "幕。」』！"]
    found = cues(Transcript(segment.text, segments=[segment]), SubtitleOptions(2, 1))
    assert times(found) == [(0, 1400, "字幕"), (1400, 2200, "。」"), (2200, 3000, "』！")]


def test_a_new_cue_begins_after_a_long_pause_if_there_is_a_layout():
    segment = timed("one two three four", (0.0, 1.0), (4.0, 5.0), (8.001, 9.0), (9.0, 9.5))
    talk = Transcript(segment.text, segments=[segment])
    assert times(cues(talk, SubtitleOptions(max_line_width=80))) == [(0, 5000, "one two"), (8001, 9500, "three four")]
    assert times(cues(talk, SubtitleOptions(max_words_per_line=3))) == [(0, 5000, "one two"), (8001, 9500, "three four")]
    assert times(cues(talk, SubtitleOptions())) == [(0, 9500, "one two three four")]


@pytest.mark.parametrize("words", [["one"], ["one", "two", "three"], ["one", "too"], []])
def test_words_that_are_not_those_of_the_text_are_not_used(words):
    segment = Segment(0, 0.0, 6.0, "one two", words=[Word(word, 0.1, 0.2, 1.0) for word in words])
    plain = [(0, 3000, "one"), (3000, 6000, "two")]
    for options in (SubtitleOptions(max_words_per_line=1), SubtitleOptions(max_words_per_line=1, highlight_words=True)):
        found = cues(Transcript("one two", segments=[segment]), options)
        assert times(found) == plain and all(cue.underlined is None for cue in found)


def test_what_no_file_can_hold_does_not_hide_the_words():
    words = [Word("o\x00ne", 1.0, 2.0, 1.0), Word("\x00", 2.0, 2.0, 1.0), Word("two", 3.0, 4.0, 1.0)]
    segment = Segment(0, 0.0, 6.0, "o\x00ne\n two", words=words)
    found = cues(Transcript(segment.text, segments=[segment]), SubtitleOptions(max_words_per_line=1))
    assert times(found) == [(1000, 2000, "one"), (3000, 4000, "two")]


@settings(max_examples=200, deadline=None)
@given(segments_with_words(), OPTIONS | HIGHLIGHTED)
def test_any_words_at_any_times(segments, options):
    found = cues(Transcript("", segments=segments), options)
    lines = [line for cue in found for line in cue.lines if not options.highlight_words]
    if options.highlight_words:
        marked = [(cue.lines[cue.underlined[0]], *cue.underlined[1:]) for cue in found if cue.underlined is not None]
        lines = [line[begin:end] for line, begin, end in marked]
    assert letters("".join(lines)) == letters("".join(one.text for one in segments))
    assert all(cue.start < cue.end for cue in found) and all(a.end <= b.start for a, b in pairwise(found))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a b, c", "長い字幕 x", "Rechtsschutz"]), st.integers(0, 40)), max_size=6), OPTIONS)
def test_a_cue_begins_with_its_first_word_and_ends_with_its_last(texts, options):
    segments, now = [], 0.0
    for text, gap in texts:
        segments.append(steps(text, now + gap / 10))
        now = segments[-1].end + 0.1
    found = cues(Transcript("", segments=segments), options)
    assert {cue.start for cue in found} <= {round(1000 * one.start) for segment in segments for one in segment.words}
    assert {cue.end for cue in found} <= {round(1000 * one.end) for segment in segments for one in segment.words}


def test_the_word_that_is_spoken_is_underlined_and_none_between_words():
    segment = timed("open menu stop", (1.0, 1.4), (1.5, 2.0), (2.0, 2.5))
    found = cues(Transcript(segment.text, segments=[segment]), SubtitleOptions(9, highlight_words=True))
    lines = ("open menu", "stop")
    assert [(cue.start, cue.end, cue.underlined) for cue in found] == [
        (1000, 1400, (0, 0, 4)),
        (1400, 1500, None),
        (1500, 2000, (0, 5, 9)),
        (2000, 2500, (1, 0, 4)),
    ]
    assert {cue.lines for cue in found} == {lines}


def test_no_cue_fills_the_time_between_two_cues_of_highlighted_words():
    segments = [steps("one two", 0.0), steps("three", 5.0)]
    found = cues(Transcript("", segments=segments), SubtitleOptions(highlight_words=True))
    assert [(cue.start, cue.end) for cue in found] == [(0, 300), (300, 500), (500, 800), (5000, 5300)]
    divided = cues(Transcript("", segments=segments), SubtitleOptions(max_words_per_line=1, highlight_words=True))
    assert [(cue.start, cue.end, cue.lines) for cue in divided] == [(0, 300, ("one",)), (500, 800, ("two",)), (5000, 5300, ("three",))]


@settings(max_examples=200, deadline=None)
@given(segments_with_words(), OPTIONS)
def test_highlighting_shows_the_same_lines(segments, options):
    talk = Transcript("", segments=segments)
    plain, highlighted = (cues(talk, replace(options, highlight_words=chosen)) for chosen in (False, True))
    assert [lines for lines, _ in groupby(one.lines for one in highlighted)] == [lines for lines, _ in groupby(one.lines for one in plain)]


def test_highlighting_needs_words():
    with pytest.raises(InputError, match=r"'hello'.*word_timestamps=True"):
        cues(Transcript("hello", segments=[Segment(0, 0.0, 1.0, "hello")]), SubtitleOptions(highlight_words=True))
    silent = [Segment(0, 0.0, 1.0, ""), Segment(1, 1.0, 2.0, "", error="no memory")]
    assert cues(Transcript(segments=silent), SubtitleOptions(highlight_words=True)) == []


# --- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_line_width", "max_line_count", "max_words_per_line"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "42", True])
def test_options_are_checked(name, value):
    with pytest.raises(InputError, match=name):
        SubtitleOptions(**{name: value})


@pytest.mark.parametrize("value", [None, 1, "True"])
def test_highlighting_is_true_or_false(value):
    with pytest.raises(InputError, match="highlight_words"):
        SubtitleOptions(highlight_words=value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_times_must_be_finite(value):
    with pytest.raises(InputError, match="finite"):
        cues(transcript((0.0, value, "a")), SubtitleOptions())
    segment = Segment(0, 0.0, 1.0, "a", words=[Word("a", 0.0, value, 0.9)])
    with pytest.raises(InputError, match=r"a word .*finite"):
        cues(Transcript("a", segments=[segment]), SubtitleOptions())
