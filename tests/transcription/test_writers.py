"""Each format, read back by parsers that others wrote."""

import csv
import html
import io
import json
import math
import re
import subprocess
import sys
from datetime import timedelta

import pysubs2
import pytest
import srt
import webvtt
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from granite_speech.errors import AudioError, InputError
from granite_speech.transcription.subtitles import SubtitleOptions, one_line
from granite_speech.transcription.transcript import Segment, Transcript, TranscriptNote, Word
from granite_speech.transcription.writers import FORMATS, write_text
from tests.support.paths import ROOT

PLAIN = SubtitleOptions()
LAYOUTS = st.builds(SubtitleOptions, *[st.none() | st.integers(1, 30)] * 3)
AWKWARD = [
    "-->",
    "a --> b",
    "00:00:01,000 --> 00:00:02,000",
    "00:01.000 --->\n00:02.000",
    "1",
    "12\n34",
    "\n\n",
    "WEBVTT",
    "NOTE x",
    "<b>&amp; <i",
    "{\\an8}\\N",
    '"one" two',
    '"',
    "tab\there",
    "\x00\x1b[0m\x85\u2028",
    "\u00a0",
    "\ufeff",
    "\udce9",
    "日本語の字幕",
    "\u200f\U0001f468\u200d\U0001f469",
]
TEXTS = st.text(max_size=40) | st.lists(st.sampled_from(AWKWARD), max_size=4).map(" ".join)


@st.composite
def transcripts(draw, texts=TEXTS):
    """Segments in order, each long enough to be divided into cues of some milliseconds; some failed."""
    now, segments = 0, []
    for index in range(draw(st.integers(0, 6))):
        start = now + draw(st.integers(0, 10**7))
        now = start + draw(st.integers(300, 10**5))
        error = draw(st.sampled_from([None, None, None, "failed"]))
        segments.append(Segment(index, start / 1000, now / 1000, draw(texts), error=error))
    return Transcript(" ".join(one.text for one in segments), segments=segments, duration=now / 1000)


def expected(transcript):
    """(start, end, text) of each segment that is shown, in milliseconds."""
    shown = [one for one in transcript.segments if one.error is None and one_line(one.text)]
    return [(round(1000 * one.start), round(1000 * one.end), one_line(one.text)) for one in shown]


def letters(text):
    return re.sub(r"\s", "", text)


def check_cues(found, transcript, options):
    """The cues that a parser found are those of the transcript, whole or divided."""
    wanted = expected(transcript)
    assert letters("".join(text for _, _, text in found)) == letters("".join(text for _, _, text in wanted))
    times = [time for start, end, _ in found for time in (start, end)]
    assert times == sorted(times) and all(start < end for start, end, _ in found)
    assert {start for start, _, _ in wanted} <= {start for start, _, _ in found}
    assert {end for _, end, _ in wanted} <= {end for _, end, _ in found}
    if options == PLAIN:
        assert found == wanted


def arrows(transcript):
    """The transcript as srt shows it."""
    segments = [
        Segment(one.id, one.start, one.end, re.sub("-+->", "->", one_line(one.text)), error=one.error) for one in transcript.segments
    ]
    return Transcript(segments=segments, duration=transcript.duration)


def by_pysubs2(content, format):
    found = pysubs2.SSAFile.from_string(content, format_=format, keep_html_tags=True)
    return [(one.start, one.end, one.text.replace("\\N", "\n" if format == "srt" else " ")) for one in found]


@settings(max_examples=200, deadline=None)
@given(transcripts(), LAYOUTS | st.just(PLAIN))
@example(Transcript(segments=[Segment(0, 0, 1, "a -"), Segment(1, 1, 2, "-> b --"), Segment(2, 2, 3, "-->")]), SubtitleOptions(1))
def test_srt_is_read_back(transcript, options):
    # The parser takes a line with a number and a line that begins like a time, in the text, for the next cue.
    assume(not any(re.search(r"\d\.?\s+\d+[^\w\s]\d+[^\w\s]\d", one_line(one.text)) for one in transcript.segments))
    content = write_text(transcript, "srt", options)
    found = list(srt.parse(content.encode().decode()))
    assert [one.index for one in found] == list(range(1, len(found) + 1))
    ms = timedelta(milliseconds=1)
    check_cues([(one.start // ms, one.end // ms, one.content) for one in found], arrows(transcript), options)


@settings(max_examples=200, deadline=None)
@given(transcripts(), LAYOUTS | st.just(PLAIN))
def test_vtt_is_read_back(transcript, options):
    content = write_text(transcript, "vtt", options)
    found = webvtt.from_string(content)
    times = [(one.start_time.in_milliseconds(), one.end_time.in_milliseconds()) for one in found]
    check_cues([(*time, html.unescape(one.raw_text)) for time, one in zip(times, found, strict=True)], transcript, options)
    for block in content.split("\n\n")[1:-1]:
        assert not set("<>") & set(block.split("\n", 1)[1]), "no markup"


# pysubs2 takes a last line of digits for the number of the next cue, a backslash for a command, and any two times for a cue's.
WORDS = st.lists(st.sampled_from(["open", "<b>", "&", "--", "->", "café", "日本語の字幕", "It's", "-->"]), max_size=12).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(transcripts(WORDS), LAYOUTS | st.just(PLAIN))
def test_pysubs2_reads_both(transcript, options):
    check_cues(by_pysubs2(write_text(transcript, "srt", options), "srt"), arrows(transcript), options)
    found = by_pysubs2(write_text(transcript, "vtt", options), "vtt")
    check_cues([(start, end, html.unescape(text)) for start, end, text in found], transcript, options)


@settings(max_examples=200, deadline=None)
@given(transcripts())
def test_tsv_is_read_back(transcript):
    rows = list(csv.reader(io.StringIO(write_text(transcript, "tsv", PLAIN)), delimiter="\t"))
    assert rows[0] == ["start", "end", "text"]
    assert [(int(start), int(end), text) for start, end, text in rows[1:]] == expected(transcript)


@settings(max_examples=200, deadline=None)
@given(transcripts())
def test_txt_has_a_line_for_each_segment(transcript):
    content = write_text(transcript, "txt", PLAIN)
    assert content.encode().decode().split("\n") == [*(text for _, _, text in expected(transcript)), ""]
    assert content.splitlines() == content.split("\n")[:-1], "nothing else ends a line"


@settings(max_examples=100, deadline=None)
@given(transcripts())
def test_json_is_read_back(transcript):
    content = write_text(transcript, "json", PLAIN)
    assert json.loads(content.encode()) == json.loads(json.dumps(transcript.to_dict()))


def test_json_has_everything():
    note = TranscriptNote("window_error", "boom", 0.0, 1.0)
    error = AudioError(got="caf\udce9.wav, which is cut off", expected="a whole file", remedy="Copy it again")
    segments = [Segment(0, 0.0, 1.0, "", error="boom"), Segment(1, 1.0, 2.5, 'ça "va"\n')]
    transcript = Transcript("ça va", segments=segments, warnings=[note], language="fr", duration=2.5, error=error)
    content = write_text(transcript, "json", PLAIN)
    assert json.loads(content.encode()) == transcript.to_dict()
    assert content.startswith('{\n  "text": "ça va",\n') and content.endswith("}\n")


def test_an_empty_transcript_is_a_valid_file():
    contents = {format: write_text(Transcript(), format, SubtitleOptions(20, 2)) for format in FORMATS}
    assert contents["txt"] == contents["srt"] == "" and contents["vtt"] == "WEBVTT\n\n" and contents["tsv"] == "start\tend\ttext\n"
    assert json.loads(contents["json"])["segments"] == []
    assert len(webvtt.from_string(contents["vtt"])) == 0 and list(srt.parse("")) == []


def test_the_forms_of_whisper():
    transcript = Transcript(
        segments=[Segment(0, 3599.9996, 3601.25, " one\ttwo"), Segment(1, 360000.0, 360001.0, "R & D")], duration=360001.0
    )
    assert write_text(transcript, "txt", PLAIN) == "one two\nR & D\n"
    assert write_text(transcript, "srt", PLAIN) == (
        "1\n01:00:00,000 --> 01:00:01,250\none two\n\n2\n100:00:00,000 --> 100:00:01,000\nR & D\n\n"
    )
    assert write_text(transcript, "vtt", PLAIN) == (
        "WEBVTT\n\n01:00:00.000 --> 01:00:01.250\none two\n\n100:00:00.000 --> 100:00:01.000\nR &amp; D\n\n"
    )
    assert write_text(transcript, "tsv", PLAIN) == "start\tend\ttext\n3600000\t3601250\tone two\n360000000\t360001000\tR & D\n"


# --- words ------------------------------------------------------------------------------------------------------------------------


@st.composite
def transcripts_with_words(draw):
    """Words in order, each some milliseconds long, with or without a pause after it."""
    now, segments = 0, []
    for texts in draw(st.lists(st.lists(st.sampled_from(["open", "<b>", "R&D", "--", "-->", "café", "</u>"]), min_size=1, max_size=5))):
        words = []
        for text in texts:
            start = now + draw(st.integers(0, 4000))
            now = start + draw(st.integers(1, 900))
            words.append(Word(text, start / 1000, now / 1000, 0.9))
        segments.append(Segment(len(segments), words[0].start, words[-1].end, " ".join(texts), words=words))
    return Transcript(" ".join(one.text for one in segments), segments=segments, duration=now / 1000)


def spoken_words(transcript):
    return [(round(1000 * one.start), round(1000 * one.end), one.word) for segment in transcript.segments for one in segment.words]


@settings(max_examples=100, deadline=None)
@given(transcripts_with_words())
def test_a_word_for_each_cue_is_read_back_with_its_times(transcript):
    options = SubtitleOptions(max_words_per_line=1)
    ms, arrow = timedelta(milliseconds=1), re.compile("-->")
    found = [(one.start // ms, one.end // ms, one.content) for one in srt.parse(write_text(transcript, "srt", options))]
    assert found == [(start, end, arrow.sub("->", word)) for start, end, word in spoken_words(transcript)]
    cues = webvtt.from_string(write_text(transcript, "vtt", options))
    times = [(one.start_time.in_milliseconds(), one.end_time.in_milliseconds()) for one in cues]
    assert [(*time, html.unescape(one.raw_text)) for time, one in zip(times, cues, strict=True)] == spoken_words(transcript)


@settings(max_examples=100, deadline=None)
@given(transcripts_with_words(), st.builds(SubtitleOptions, *[st.none() | st.integers(1, 30)] * 3, st.just(True)))
def test_highlighted_words_are_read_back_with_their_times(transcript, options):
    content = write_text(transcript, "vtt", options)
    found = re.findall(r"<u>([^<>]*)</u>", content)
    cues = [one for one in webvtt.from_string(content) if "<u>" in one.raw_text]
    times = [(one.start_time.in_milliseconds(), one.end_time.in_milliseconds()) for one in cues]
    assert [(*time, html.unescape(word)) for time, word in zip(times, found, strict=True)] == spoken_words(transcript)
    assert set(re.findall("<[^>]*>", content)) <= {"<u>", "</u>"}, "the text's own tags are escaped"
    events = by_pysubs2(write_text(transcript, "srt", options), "srt")
    underlined = [(start, end) for start, end, text in events if "<u>" in text]
    assert underlined == times and len(events) == len(webvtt.from_string(content))


def test_highlighted_words_in_whispers_form():
    words = [Word("R", 0.0, 0.4, 0.9), Word("&", 0.5, 0.75, 0.9), Word("-->", 0.75, 1.0, 0.9)]
    transcript = Transcript("R & -->", segments=[Segment(0, 0.0, 1.0, "R & -->", words=words)])
    options = SubtitleOptions(highlight_words=True)
    assert write_text(transcript, "srt", options) == (
        "1\n00:00:00,000 --> 00:00:00,400\n<u>R</u> & ->\n\n2\n00:00:00,400 --> 00:00:00,500\nR & ->\n\n"
        "3\n00:00:00,500 --> 00:00:00,750\nR <u>&</u> ->\n\n4\n00:00:00,750 --> 00:00:01,000\nR & <u>-></u>\n\n"
    )
    assert "00:00:00.750 --> 00:00:01.000\nR &amp; <u>--&gt;</u>\n\n" in write_text(transcript, "vtt", options)
    for format in ("txt", "tsv", "json"):
        assert write_text(transcript, format, options) == write_text(transcript, format, PLAIN)


def test_json_has_the_words():
    words = [Word("one", 0.1, 0.4, 0.9, 0.8, 0.95), Word("two", 0.5, 0.75, 0.9, bridged=True)]
    content = json.loads(
        write_text(Transcript("one two", segments=[Segment(0, 0.1, 0.75, "one two", words=words)], words=words), "json", PLAIN)
    )
    assert content["words"] == content["segments"][0]["words"] == [one.to_dict() for one in words]


# --- what is refused --------------------------------------------------------------------------------------------------------------


def test_an_unknown_format_is_named():
    with pytest.raises(InputError, match=r"'ass'.*txt, srt, vtt, tsv, json"):
        write_text(Transcript(), "ass", PLAIN)


@pytest.mark.parametrize("format", ["srt", "vtt", "tsv", "json"])
def test_times_must_be_finite(format):
    with pytest.raises(InputError, match="finite"):
        write_text(Transcript(segments=[Segment(0, 0.0, math.nan, "a")]), format, PLAIN)


def test_writing_needs_no_torch():
    script = "import sys; import granite_speech.transcription.output_files; assert not {'torch', 'numpy'} & set(sys.modules)"
    path = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
