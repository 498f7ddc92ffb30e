"""The words of an answer: their confidences from its tokens and from the CTC head, and their times."""

import math
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers.convert_slow_tokenizer import bytes_to_unicode

from granite_speech import GraniteSpeechProcessor
from granite_speech.engine.handle import Answer
from granite_speech.generation.token_bytes import TokenBytes
from granite_speech.transcription.tagged_answers import TaggedAnswer, parse_tags
from granite_speech.transcription.text_units import text_units
from granite_speech.transcription.transcript import Word
from granite_speech.transcription.words import aligned_words, language_model_confidences, tagged_words
from tests.support.heard_letters import level, spelled

CHARACTER = bytes_to_unicode()
END = "<|end_of_text|>"
FRAMES = 60


def answered(pieces: Sequence[bytes | str], logprobs: Sequence[float], decoder=None) -> tuple[Answer, TokenBytes]:
    """An answer of tokens with these bytes (text: of a special one), and the bytes of its tokenizer's tokens."""
    tokens = [one if isinstance(one, str) else "".join(CHARACTER[byte] for byte in one) for one in pieces]
    tokenizer = Tokenizer(models.BPE({one: number for number, one in enumerate(sorted({*tokens} - {END}))}, []))
    tokenizer.decoder = decoder or decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    ids = [tokenizer.token_to_id(one) for one in tokens]
    return Answer(tokenizer.decode(ids), ids, "stop", list(logprobs)), TokenBytes(SimpleNamespace(backend=tokenizer))


def places(text: str) -> list[tuple[int, int]]:
    return [one.span() for one in re.finditer(r"\S+", text)]


def confidences(*tokens: tuple[bytes | str, float]) -> list[float | None]:
    """Of the words of an answer, from its tokens and their probabilities."""
    answer, pieces = answered([piece for piece, _ in tokens], [math.log(one) for _, one in tokens])
    return language_model_confidences(answer, places(answer.text), pieces)


# --- confidences of the language model ------------------------------------------------------------------------------------------------


def test_a_word_has_the_product_of_its_tokens():
    assert confidences((b" op", 0.5), (b"en", 0.5), (b" two", 0.9), (b",", 0.5)) == pytest.approx([0.25, 0.45])


def test_a_token_over_two_words_belongs_to_both():
    assert confidences((b" ope", 0.5), (b"n tw", 0.4), (b"o up", 0.9)) == pytest.approx([0.2, 0.36, 0.9])


@pytest.mark.parametrize("space", [b" ", b"  ", b"\n", "\u3000".encode()])
def test_a_token_of_space_alone_belongs_to_the_word_after_it(space):
    assert confidences((b"open", 0.5), (space, 0.4), (b"two", 0.9), (space, 0.1)) == pytest.approx([0.5, 0.36])


def test_what_is_between_two_words_belongs_to_neither():
    answer, pieces = answered([b"a", b" ", b"[T:", b"4", b"]", b" ", b"b"], [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0])
    found = language_model_confidences(answer, [(0, 1), (8, 9)], pieces)
    assert answer.text == "a [T:4] b" and found == pytest.approx([math.exp(-1), math.exp(-13)])


def test_special_tokens_belong_to_no_word():
    assert confidences((END, 0.1), (b"open", 0.5), (END, 0.1), (b" two", 0.9), (END, 0.1)) == pytest.approx([0.5, 0.9])


def test_a_character_of_several_tokens_belongs_to_each():
    first, second, third = (bytes([byte]) for byte in "東".encode())
    assert confidences((b"a " + first, 0.5), (second, 0.4), (third + b" b", 0.9)) == pytest.approx([0.5, 0.18, 0.9])


def test_an_answer_cut_off_inside_a_character():
    cut = "東".encode()[:2]
    assert confidences((b"open", 0.5), (b" " + cut[:1], 0.4), (cut[1:], 0.9)) == pytest.approx([0.5, 0.36])


def test_no_words_and_no_tokens():
    assert confidences() == confidences((END, 0.5)) == confidences((b" ", 0.5)) == []


def test_a_tokenizer_whose_bytes_are_not_the_text_gives_none():
    answer, pieces = answered([b"open", b"two"], [-0.1, -0.2], decoder=decoders.WordPiece())
    assert answer.text == "open two" and language_model_confidences(answer, places(answer.text), pieces) == [None, None]


@given(
    text=st.text(st.sampled_from("ab,é東🎉\u0301 \n\u2003"), max_size=16),
    cuts=st.sets(st.integers(1, 40), max_size=12),
    data=st.data(),
)
def test_each_token_counts_for_the_words_that_have_some_of_its_bytes(text, cuts, data):
    content = text.encode()
    edges = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    pieces = [content[begin:end] for begin, end in pairwise(edges) if begin < end]
    logprobs = data.draw(st.lists(st.floats(-3, 0), min_size=len(pieces), max_size=len(pieces)))
    answer, known = answered(pieces, logprobs)
    assert answer.text == text
    bytes_before = [0, *accumulate(len(one.encode()) for one in text)]
    words = [(bytes_before[begin], bytes_before[end]) for begin, end in places(text)]
    sums = [0.0] * len(words)
    for begin, piece, logprob in zip(accumulate(map(len, pieces), initial=0), pieces, logprobs, strict=False):
        own = [number for number, word in enumerate(words) if begin < word[1] and word[0] < begin + len(piece)]
        own = own or [number for number, word in enumerate(words) if word[0] >= begin + len(piece)][:1]
        for number in own:
            sums[number] += logprob
    assert language_model_confidences(answer, places(text), known) == pytest.approx([math.exp(one) for one in sums])


# --- words of the CTC head's times ----------------------------------------------------------------------------------------------------


def aligned(
    heard: str, text: str, *, mode: str = "default", prefix: str = "", start: float = 0.0, end: float = 100.0, logprob: float = -0.1
) -> list[Word]:
    """The words of an answer with this text, a token for each byte, to a window in which `heard` is said."""
    content = text.encode()
    answer, pieces = answered([bytes([one]) for one in content], [logprob] * len(content))
    answer = Answer(answer.text, answer.token_ids, "stop", answer.logprobs, spelled(heard, frames=FRAMES))
    said = level(heard, frames=FRAMES)
    return aligned_words(answer, parse_tags(text, mode), pieces, level=said, frame_seconds=0.01, start=start, end=end, prefix=prefix)


def times(words: Sequence[Word]) -> list[tuple[str, float, float]]:
    return [(one.word, one.start, one.end) for one in words]


def at(first: int, last: int) -> tuple[float, float]:
    """The times of a word whose first and last letter are these characters of what is said."""
    return 0.04 * (first + 1), 0.04 * (last + 2)


def test_words_have_the_times_of_their_letters_and_both_confidences():
    one, two = aligned("open two", " open  two ", start=10.0)
    for word, text, (begin, end) in ((one, "open", at(0, 3)), (two, "two", at(5, 7))):
        assert word.word == text and (word.start, word.end) == pytest.approx((10 + begin, 10 + end), abs=0.015)
        assert word.ctc_confidence == pytest.approx(0.9, abs=0.01) and not word.bridged and word.speaker is None
    # A token for each letter, and one for each space before the word.
    assert (one.lm_confidence, two.lm_confidence) == (round(math.exp(-0.5), 4), round(math.exp(-0.5), 4))
    assert one.confidence == pytest.approx(math.sqrt(one.ctc_confidence * one.lm_confidence), abs=1e-4)


def test_times_and_confidences_are_rounded():
    for word in aligned("open two up", "open two up", start=1 / 3, logprob=-1 / 7):
        assert all(value == round(value, 3) for value in (word.start, word.end))
        assert all(value == round(value, 4) for value in (word.confidence, word.ctc_confidence, word.lm_confidence))


def test_no_word_is_outside_its_window():
    words = aligned("go" + 20 * "_" + "up", "go up", start=5.0, end=5.9)
    assert words[0].start >= 5.0 and words[1].end == 5.9


def test_words_of_a_prefix_are_aligned_and_dropped():
    """Otherwise "two" would be where it is said first."""
    alone, after = aligned("two two up", "two up"), aligned("two two up", "two up", prefix=" two ")
    assert alone[0].start < 0.1
    assert [one.word for one in after] == ["two", "up"]
    assert after[0].start == pytest.approx(at(4, 6)[0], abs=0.015)


def test_what_cannot_be_spelled_shares_the_room_between_its_neighbours():
    go, two, one, up = aligned("go__hey__up", "go ща 7 up")
    assert (go.bridged, two.bridged, one.bridged, up.bridged) == (False, True, True, False)
    assert two.ctc_confidence is None and two.confidence == two.lm_confidence
    (begin, end), share = at(4, 6), 2 / 3  # two letters and one digit
    assert (two.start, one.end) == pytest.approx((begin, end), abs=0.015)
    assert two.end == one.start == pytest.approx(begin + (end - begin) * share, abs=0.015)


def test_scripts_without_spaces_have_a_word_for_each_unit():
    text = "東京、です。"
    words = aligned("hey", text)
    assert [one.word for one in words] == [unit for _, unit in text_units(text)] and len(words) == 4
    assert all(one.bridged and one.lm_confidence is not None for one in words)
    assert all(one.end == other.start for one, other in pairwise(words)) and words[0].start < words[-1].end


def test_punctuation_alone_takes_no_time_beside_a_word_and_shares_it_among_itself():
    dash, yes, dots = aligned("yes", "— yes …")
    assert dash.start == dash.end == yes.start < yes.end == dots.start == dots.end
    assert (dash.bridged, yes.bridged, dots.bridged) == (True, False, True) and dash.ctc_confidence is None
    one, other = aligned("yes", "— …")
    assert one.start < one.end == other.start < other.end


def test_words_that_neither_head_knows_have_no_confidence():
    answer, pieces = answered([b"4", b"2"], [-0.1, -0.1], decoder=decoders.WordPiece())
    answer = Answer(answer.text, answer.token_ids, "stop", answer.logprobs, spelled("hey", frames=FRAMES))
    given = {"level": level("hey", frames=FRAMES), "frame_seconds": 0.01, "start": 0.0, "end": 9.0}
    words = aligned_words(answer, TaggedAnswer(answer.text), pieces, **given)
    assert answer.text == "4 2"
    assert [(one.confidence, one.ctc_confidence, one.lm_confidence) for one in words] == [(0.0, None, None)] * 2


@given(text=st.text(st.sampled_from("abé ½東、🎉4—\u0301\n"), max_size=24), heard=st.text(st.sampled_from("ab 4_"), max_size=28))
def test_words_of_any_answer_are_its_units_in_order(text, heard):
    words = aligned(heard, text, end=2 * FRAMES / 100)
    assert [one.word for one in words] == [unit for _, unit in text_units(" ".join(text.split())) if unit]
    edges = [edge for one in words for edge in (one.start, one.end)]
    assert edges == sorted(edges) and all(0 <= edge <= 2 * FRAMES / 100 for edge in edges)
    assert all(0 <= one.confidence <= 1 for one in words)


# --- words of tagged answers ----------------------------------------------------------------------------------------------------------


def test_speakers_are_those_of_the_tags_and_tags_are_no_words():
    words = aligned("open two up", "[Speaker 1]: open [Speaker 2]: two up", mode="speaker_attributed")
    assert [(one.word, one.speaker) for one in words] == [("open", "Speaker 1"), ("two", "Speaker 2"), ("up", "Speaker 2")]
    assert [one.start for one in words] == pytest.approx([at(0, 3)[0], at(5, 7)[0], at(9, 10)[0]], abs=0.015)
    assert words[2].lm_confidence == round(math.exp(-0.3), 4), "its letters and the space; no tag"
    assert aligned("open", "[Speaker 1]:", mode="speaker_attributed") == []


def test_words_of_a_timed_answer_are_aligned_if_asked_for_and_otherwise_have_the_models_times():
    text = "open [T:45] _ [T:60] two [T:99]"
    found = aligned("open two", text, mode="word_timestamps", start=10.0)
    assert [one.word for one in found] == ["open", "two"] and found[1].start == pytest.approx(10 + at(5, 7)[0], abs=0.015)
    answer, pieces = answered([bytes([one]) for one in text.encode()], [-0.1] * len(text))
    written = tagged_words(answer, parse_tags(text, "word_timestamps"), pieces, start=10.0)
    assert times(written) == [("open", 10.0, 10.45), ("two", 10.6, 10.99)]
    for word in written:
        assert word.ctc_confidence is None and word.confidence == word.lm_confidence and not word.bridged
    assert [one.lm_confidence for one in written] == [round(math.exp(-0.4), 4)] * 2, "the tag between them is no part of a word"


def test_the_bundled_tokenizers_tokens_are_the_bytes_of_its_text():
    processor = GraniteSpeechProcessor.from_pretrained("embedded")
    ids = [*processor.tokenizer.encode(" open menu 42 naïve", add_special_tokens=False), processor.tokenizer.eos_token_id]
    answer = Answer(processor.tokenizer.decode(ids, skip_special_tokens=True), ids, "stop", torch.full((len(ids),), -0.1).tolist())
    assert None not in language_model_confidences(answer, places(answer.text), TokenBytes(processor))
