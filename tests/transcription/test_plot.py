"""The plot of words: what is drawn where, that it can be read, and that a file is complete or as it was."""

import json
import sys
import warnings
from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.image import imread

import granite_speech
from granite_speech import (
    AudioError,
    GraniteSpeechFeatureExtractor,
    InputError,
    MissingDependencyError,
    OutputError,
    TranscriptionResult,
)
from granite_speech.transcription import plot, plot_pages
from granite_speech.transcription.plot import check_plot_file, plot_words
from granite_speech.transcription.plot_pages import pages
from granite_speech.transcription.transcript import Transcript, Word
from tests.support.sound_headers import wav_header

WORDS = [Word("one", 0.2, 0.6, 0.9, 0.8, 0.95), Word("two", 0.7, 1.5, 0.5, None, 0.5, bridged=True), Word("three", 1.5, 1.9, 0.4, 0.4)]


def samples(seconds):
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)


def transcript(words=WORDS):
    return Transcript(" ".join(one.word for one in words), words=words)


def drawn(words, seconds=2.0, title=""):
    mel = np.random.default_rng(0).random((round(seconds * 100), 80), np.float32)
    return list(pages(words, mel, seconds, title))


def rows_of(figure):
    """The spectrogram, the words and the confidences of each row."""
    return [figure.axes[first : first + 3] for first in range(0, len(figure.axes), 3)]


def bars(axes):
    """(begin, end, height) of each bar, in data units."""
    found = [(one.get_x(), one.get_x() + one.get_width(), one.get_height()) for one in axes.patches]
    return [tuple(round(value, 3) for value in one) for one in found]


def labels(axes):
    return [one.get_text() for one in axes.texts]


# --- what is drawn ----------------------------------------------------------------------------------------------------------------


def test_words_and_their_confidences_are_at_their_times():
    (figure,) = drawn(WORDS, title="speech.wav")
    ((spectrogram, words, confidence),) = rows_of(figure)
    assert {axes.get_xlim() for axes in figure.axes} == {(0.0, 2.0)}
    assert spectrogram.images[0].get_extent() == [0.0, 2.0, 0, 80]
    assert sorted(labels(words)) == ["one", "three", "two"]
    assert sorted(bar[:2] for bar in bars(words)) == [(0.2, 0.6), (0.7, 1.5), (1.5, 1.9)]
    assert sorted(bars(confidence)) == [(0.2, 0.6, 0.9), (0.7, 1.5, 0.5), (1.5, 1.9, 0.4)]
    assert confidence.get_xlabel() == "seconds" and confidence.get_ylim()[1] >= 1
    lines = [[path.vertices.tolist() for path in one.get_paths()] for one in confidence.collections]
    assert lines == [[[[0.2, 0.8], [0.6, 0.8]], [[1.5, 0.4], [1.9, 0.4]]], [[[0.2, 0.95], [0.6, 0.95]], [[0.7, 0.5], [1.5, 0.5]]]]
    assert figure.texts[0].get_text() == "speech.wav"


def test_the_legend_tells_the_confidences_apart_and_has_no_entry_for_nothing():
    (figure,) = drawn(WORDS)
    entries = [one.get_text() for one in figure.legends[0].get_texts()]
    assert entries == ["word", "word without a time of its own", "confidence", "of the CTC head", "of the language model"]
    (figure,) = drawn(WORDS[2:])
    assert [one.get_text() for one in figure.legends[0].get_texts()] == ["word", "confidence", "of the CTC head"]


def test_a_bridged_word_looks_different():
    (figure,) = drawn(WORDS)
    ((_, words, _),) = rows_of(figure)
    looks = {round(one.get_x(), 1): (one.get_facecolor(), one.get_linestyle()) for one in words.patches}
    assert looks[0.2] == looks[1.5] and looks[0.7][0] != looks[0.2][0] and looks[0.7][1] == "--"


def test_a_minute_is_one_page_whose_rows_have_one_length():
    for seconds, rows in ((0.3, 1), (9.9, 1), (11.0, 2), (60.0, 6)):
        (figure,) = drawn([], seconds)
        lengths = [row[0].get_xlim()[1] - row[0].get_xlim()[0] for row in rows_of(figure)]
        assert len(lengths) == rows and np.allclose(lengths, max(seconds, 0.5) / rows)


def test_a_long_recording_has_pages_of_a_minute():
    words = [Word(f"w{place}", place + 0.1, place + 0.9, 0.9) for place in range(130)]
    found = drawn(words, 130.0, "speech.wav")
    assert [one.texts[0].get_text() for one in found] == [f"speech.wav   page {number} of 3" for number in (1, 2, 3)]
    assert [len(rows_of(one)) for one in found] == [6, 6, 1]
    shown = [text for figure in found for _, axes, _ in rows_of(figure) for text in labels(axes)]
    assert shown == [one.word for one in words], "each word once"
    assert all(one.get_figheight() < 24 and one.get_figwidth() == 14 for one in found)


def test_a_word_in_two_rows_has_its_label_where_more_of_it_is():
    (figure,) = drawn([Word("early", 9.5, 10.1, 0.9), Word("late", 19.9, 20.6, 0.9)], 30.0)
    assert [labels(words) for _, words, _ in rows_of(figure)] == [["early"], [], ["late"]]
    assert [len(words.patches) for _, words, _ in rows_of(figure)] == [1, 2, 1]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 10), st.floats(-0.1, 2.0), st.text("aWil. é_", max_size=30)), max_size=40))
def test_labels_never_overlap_whatever_the_words(found):
    words = [Word(text, start, start + length, 0.5) for start, length, text in found]
    (figure,) = drawn(words, 10.0)
    ((_, axes, _),) = rows_of(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [one.get_window_extent(renderer) for one in axes.texts if one.get_text().strip()]
    assert not any(a.overlaps(b) for a, b in combinations([one.padded(-1) for one in boxes], 2))
    assert all(axes.bbox.x0 - 1 <= one.x0 and one.x1 <= axes.bbox.x1 + 1 for one in boxes if one.width < axes.bbox.width)
    missing = len(words) - len(axes.texts)
    assert figure.texts[0].get_text() == (f"({missing} words without room for their label)" if missing else "")
    assert figure.get_figheight() < 5


def test_a_long_word_is_shortened():
    (figure,) = drawn([Word("x" * 300, 0.5, 0.6, 0.9)])
    assert labels(rows_of(figure)[0][1]) == ["x" * 23 + "…"]


# --- files ------------------------------------------------------------------------------------------------------------------------


def test_an_image_of_a_file_is_written(tmp_path):
    (tmp_path / "a$b.wav").write_bytes(wav_header(data=samples(2.0).astype("<i2").tobytes()))
    file = tmp_path / "new" / "words.png"
    assert granite_speech.plot_words(transcript(), tmp_path / "a$b.wav", file) == [file]
    height, width, _ = imread(file).shape
    assert width == 1540 and 250 < height < 500
    assert [one.name for one in file.parent.iterdir()] == ["words.png"]


def test_a_result_of_load_model_and_a_json_file_are_plotted_like_the_transcript(tmp_path):
    result = TranscriptionResult.of(transcript(), {"task": "transcribe", "language": None}, 30.0)
    images = set()
    for one in (transcript(), result, json.loads(json.dumps(result)), transcript().to_dict()):
        (file,) = plot_words(one, samples(2.0), tmp_path / "words.png")
        images.add(file.read_bytes())
    assert len(images) == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ("one two", "a str"),
        (None, "a NoneType"),
        ({"text": "one"}, "without words"),
        ({}, "without words"),
        ({"words": ["one"]}, "cannot be read"),
        ({"words": [{"word": "one"}]}, "cannot be read"),
    ],
)
def test_what_is_no_transcript_is_refused(tmp_path, given, message):
    with pytest.raises(InputError, match=message):
        plot_words(given, samples(2.0), tmp_path / "words.png")


@pytest.mark.parametrize("suffix, begin", [(".PDF", b"%PDF"), (".svg", b"<?xml"), (".jpg", b"\xff\xd8"), (".eps", b"%!PS")])
def test_the_suffix_says_the_type(tmp_path, suffix, begin, capfd):
    (file,) = plot_words(transcript(), samples(2.0), tmp_path / f"words{suffix}")
    assert file.read_bytes().startswith(begin) and capfd.readouterr() == ("", "")


def test_pages_are_files_and_a_pdf_has_all_of_them(tmp_path):
    found = plot_words(transcript(), samples(61.0), tmp_path / "words.png")
    assert [one.name for one in found] == ["words.png", "words.page2.png"]
    assert len({imread(one).tobytes() for one in found}) == 2
    (file,) = plot_words(transcript(), samples(61.0), str(tmp_path / "words.pdf"))
    assert file.read_bytes().count(b"/Type /Page ") == 2


def test_other_rates_and_silence(tmp_path):
    (figure_file,) = plot_words(transcript(), samples(1.0), tmp_path / "words.png", sampling_rate=8000)  # two seconds
    assert imread(figure_file).shape[1] == 1540
    (file,) = plot_words(Transcript(""), np.zeros(16_000, np.float32), tmp_path / "silence.png")
    assert imread(file).shape[1] == 1540


def test_the_spectrogram_of_a_long_recording_is_that_of_its_minutes(monkeypatch):
    sound = samples(150.3)
    sound[: 70 * 16_000] *= 0.01
    whole = GraniteSpeechFeatureExtractor()([torch.from_numpy(sound)])["input_features"].view(-1, 80).numpy()
    lengths, extract = [], GraniteSpeechFeatureExtractor.__call__
    monkeypatch.setattr(
        GraniteSpeechFeatureExtractor, "__call__", lambda self, clips: lengths.append(len(clips[0])) or extract(self, clips)
    )
    mel, seconds = plot._log_mel(sound, None)
    assert seconds == 150.3 and mel.shape == whole.shape and lengths == [60 * 16_000, round(90.3 * 16_000)]
    darkest = whole.max() - plot_pages._DARKEST
    differs = np.abs(np.maximum(mel, darkest) - np.maximum(whole, darkest)).max(1) > 1e-3
    assert set(np.flatnonzero(differs)) <= {5998, 5999, 6000, 6001}, "at the cut alone"


def test_a_file_with_a_fault_is_drawn_as_far_as_it_was_transcribed(tmp_path):
    content = wav_header(data=samples(4.0).astype("<i2").tobytes())
    (tmp_path / "cut.wav").write_bytes(content[: len(content) // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plot_words(transcript(), tmp_path / "cut.wav", tmp_path / "words.png") == [tmp_path / "words.png"]


def test_no_text_and_no_setting_of_the_user_prints_a_warning_or_fails(tmp_path, capfd):
    texts = ["$x_1$", "$\\frac{", "日本語", "ไทย", "عربي", "\U0001f600", "\udce9", "\x00", "a\nb", "", "%&#_{}"]
    words = [Word(text, place * 0.4, place * 0.4 + 0.3, 0.9) for place, text in enumerate(texts)]
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40}), warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = plot_words(transcript(words), samples(5.0), tmp_path / "words.png")
    assert capfd.readouterr() == ("", "") and imread(plain[0]).shape[1] == 1540


def test_an_installed_font_is_used_for_characters_that_the_usual_one_lacks(monkeypatch):
    charmaps = {"/usual.ttf": "abc", "/bold.ttf": "日本語", "/cjk.ttf": "日本語ab", "/more.ttf": "日"}

    def get_font(file):
        if file not in charmaps:
            raise RuntimeError("damaged")
        return type("Font", (), {"scalable": True, "get_charmap": lambda self: {ord(one): 1 for one in charmaps[file]}})()

    entries = [
        FontEntry(fname="/damaged.ttf", name="A", weight=400),
        FontEntry(fname="/bold.ttf", name="Bold", weight=700),
        FontEntry(fname="/cjk.ttf", name="CJK", weight=400),
        FontEntry(fname="/more.ttf", name="More", weight=400),
    ]
    monkeypatch.setattr(fontManager, "ttflist", entries)
    monkeypatch.setattr(fontManager, "findfont", lambda name: "/usual.ttf")
    monkeypatch.setattr("matplotlib.font_manager.get_font", get_font)
    assert plot._families("abc") == ["DejaVu Sans"]
    assert plot._families("日本a") == ["DejaVu Sans", "CJK"]


# --- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["words", "words.docx", "words.png.", "png", "words.rgba", ""])
def test_another_type_is_refused_by_name(tmp_path, name):
    with pytest.raises(InputError, match=r"\.png, \.svg, \.pdf"):
        check_plot_file(tmp_path / name if name else name)


def test_a_file_that_cannot_be_written_is_found_before_anything_is_drawn(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("file/words.png", "folder.png", "a\0b.png", "x" * 300 + ".png"):
        with pytest.raises(OutputError, match="cannot be written"):
            check_plot_file(tmp_path / name)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_file_from_before_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    file = tmp_path / "words.png"
    file.write_bytes(b"before")
    assert check_plot_file(file) == file and file.read_bytes() == b"before"

    def fail(figure, path, **settings):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OutputError, match="No space left"):
        plot_words(transcript(), samples(2.0), file)
    assert file.read_bytes() == b"before" and [one.name for one in tmp_path.iterdir()] == ["words.png"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"granite-speech-triton\[plot\]"):
        plot_words(transcript(), samples(2.0), tmp_path / "words.png")


def test_a_transcript_without_words_or_of_another_recording_is_refused(tmp_path):
    file = tmp_path / "words.png"
    with pytest.raises(InputError, match="word_timestamps=True"):
        plot_words(Transcript("one two"), samples(2.0), file)
    with pytest.raises(InputError, match=r"a word at 1\.50 s, and a recording of 1\.00 s"):
        plot_words(transcript(), samples(1.0), file)
    with pytest.raises(InputError, match="finite"):
        plot_words(transcript([Word("one", 0.0, float("nan"), 0.9)]), samples(1.0), file)
    with pytest.raises(AudioError):
        plot_words(transcript(), tmp_path / "absent.wav", file)
    assert not list(tmp_path.iterdir())
