"""`parse_tags`: speakers and times that a plus checkpoint writes into its answer, also where it writes them wrongly."""

import math
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_speech.transcription.tagged_answers import parse_tags
from granite_speech.transcription.text_units import text_units


def timed(answer: str, seconds: float = math.inf, prefix: str = "") -> list[tuple[str, float, float]]:
    """Words with their times; those that are not from tags have a "~" after them."""
    words = parse_tags(answer, "word_timestamps", seconds, prefix).words
    return [(one.word + "~" * one.bridged, one.start, one.end) for one in words]


def spoken(answer: str, prefix: str = "") -> list[tuple[str, str]]:
    return [(one["speaker"], one["text"]) for one in parse_tags(answer, "speaker_attributed", prefix=prefix).turns]


def test_without_a_mode_nothing_is_a_tag():
    found = parse_tags(" [Speaker 1]: at [T:45] _ ", "default")
    assert (found.text, found.raw_text, found.words, found.turns) == ("[Speaker 1]: at [T:45] _", None, (), None)


# --- speakers ---------------------------------------------------------------------------------------------------------------------------


def test_turns_of_speakers():
    found = parse_tags(" [Speaker 1]: Hello  there.\n[Speaker 2]: Hi. [Speaker 1]: Bye.", "speaker_attributed")
    assert found.text == "Hello there. Hi. Bye."
    assert found.raw_text == "[Speaker 1]: Hello  there.\n[Speaker 2]: Hi. [Speaker 1]: Bye."
    assert found.turns == (
        {"speaker": "Speaker 1", "text": "Hello there."},
        {"speaker": "Speaker 2", "text": "Hi."},
        {"speaker": "Speaker 1", "text": "Bye."},
    )
    assert [(one.word, one.speaker, one.start) for one in found.words][1:3] == [("there.", "Speaker 1", None), ("Hi.", "Speaker 2", None)]


def test_tags_of_speakers_in_other_forms():
    assert spoken("[speaker 1] a [ Speaker  B ] : b[SPEAKER 12]:c") == [("Speaker 1", "a"), ("Speaker B", "b"), ("Speaker 12", "c")]
    assert spoken("[Speaker 1]: [Speaker 2]: a [Speaker 1]:") == [("Speaker 2", "a")], "a turn without words is none"
    assert spoken("[Speaker 1]: a [Speaker 1]: b") == [("Speaker 1", "a"), ("Speaker 1", "b")]
    assert spoken("nobody") == spoken("") == []


def test_words_before_the_first_speaker_are_in_the_text_and_in_no_turn():
    assert parse_tags("well [Speaker 1]: yes", "speaker_attributed").text == "well yes"
    assert spoken("well [Speaker 1]: yes") == [("Speaker 1", "yes")]


def test_an_answer_that_continues_a_text_continues_its_last_turn():
    assert spoken(" fine [Speaker 1]: good", prefix="[Speaker 1]: how are you [Speaker 2]: I am") == [
        ("Speaker 2", "fine"),
        ("Speaker 1", "good"),
    ]
    assert spoken("fine", prefix="how are you") == []


def test_brackets_that_are_no_tags_stay():
    assert parse_tags("[Speaker]: a [laughs] [T] 3 [Tom]", "speaker_attributed").text == "[Speaker]: a [laughs] [T] 3 [Tom]"


@pytest.mark.parametrize("rest", ["[", "[T", "[T:", "[T: 4", "[Sp", "[speaker ", "[Speaker 1"])
@pytest.mark.parametrize("mode", ["speaker_attributed", "word_timestamps"])
def test_half_a_tag_at_the_end_of_an_answer_that_was_cut_off_is_removed(rest, mode):
    assert parse_tags(f"a b {rest}", mode).text == "a b"


# --- times ------------------------------------------------------------------------------------------------------------------------------


def test_times_are_the_ends_of_words():
    assert timed(" hello [T:45] world [T:82]") == [("hello", 0, 0.45), ("world", 0.45, 0.82)]
    found = parse_tags("hello[T:45]world.[t: 82 ]", "word_timestamps")
    assert found.text == "hello world." and found.raw_text == "hello[T:45]world.[t: 82 ]" and found.turns is None
    assert [(one.word, one.start, one.end) for one in found.words] == [("hello", 0, 0.45), ("world.", 0.45, 0.82)]
    assert timed("") == timed("[T:5]") == timed("_ [T:30]") == []


def test_a_silence_is_no_word_and_the_next_word_begins_after_it():
    assert timed("_ [T:30] a [T:50] _ [T:90] b [T:120]") == [("a", 0.3, 0.5), ("b", 0.9, 1.2)]
    assert timed("a [T:50] [T:90] b [T:120]") == [("a", 0, 0.5), ("b", 0.9, 1.2)], "a time without a word is that of a silence"
    assert parse_tags("_ [T:30] a_b [T:50] _", "word_timestamps").text == "a_b"


def test_times_begin_again_after_ten_seconds():
    ends = [110 * number for number in range(1, 27)]
    found = timed(" ".join(f"w [T:{end % 1000}]" for end in ends), seconds=29)
    assert [one[2] for one in found] == [end / 100 for end in ends]


def test_times_with_all_their_digits():
    assert [one[2] for one in timed("_ [T:700] a [T:800] _ [T:950] b [T:1050] c [T:1100]", seconds=12)] == [8, 10.5, 11]


@pytest.mark.parametrize("wrong", ["[T:195]", "[T:900]", "[T:2]", "[T:99999]", "[T:]", "[T:abc]", "[T:-3]", ""])
def test_one_time_that_is_wrong_or_missing_is_bridged_and_moves_no_other(wrong):
    found = timed(f"a [T:100] b [T:200] cc {wrong} dd [T:300] e [T:350]", seconds=13.5)
    assert found == [("a", 0, 1), ("b", 1, 2), ("cc~", 2, 2.5), ("dd~", 2.5, 3), ("e", 3, 3.5)]


def test_a_silence_may_be_longer_than_a_word():
    assert timed("a [T:120] _ [T:110] b [T:150] c [T:200]", seconds=12.5) == [("a", 0, 1.2), ("b", 11.1, 11.5), ("c", 11.5, 12)]


def test_no_time_is_after_the_window():
    assert timed("a [T:100] b [T:210]", seconds=2.0) == [("a", 0, 1), ("b", 1, 2)]
    assert timed("a [T:100] b [T:290]", seconds=2.0) == [("a", 0, 1), ("b~", 1, 1.08)]


def test_words_without_times_at_the_end_are_as_long_as_usual_and_inside_the_window():
    assert timed("a [T:100] four six [T", seconds=9) == [("a", 0, 1), ("four~", 1, 1.32), ("six~", 1.32, 1.56)]
    assert timed("a [T:100] four", seconds=1.1) == [("a", 0, 1), ("four~", 1, 1.1)]


def test_an_answer_that_continues_a_text_begins_where_its_last_word_ended():
    assert timed("are [T:80] you [T:120]", prefix="hi [T:290] _ [T:590] how [T:20]", seconds=12) == [
        ("are", 10.2, 10.8),
        ("you", 10.8, 11.2),
    ]
    assert timed("are [T:80]", prefix="hi how") == [("are", 0, 0.8)]


def test_scripts_without_spaces_have_several_words_before_a_time():
    found = parse_tags("今日は[T:90]雨 [T:150]", "word_timestamps")
    assert found.text == "今日は 雨"
    assert [(one.word, one.start, one.end) for one in found.words] == [("今", 0, 0.3), ("日", 0.3, 0.6), ("は", 0.6, 0.9), ("雨", 0.9, 1.5)]


def test_a_part_of_an_answer_has_the_words_of_its_text():
    found = parse_tags("[Speaker 1]: one two [Speaker 2]: three four", "speaker_attributed")
    first, last = found.beginning("one two three"), found.end("two three four")
    assert first.turns == ({"speaker": "Speaker 1", "text": "one two"}, {"speaker": "Speaker 2", "text": "three"})
    assert last.turns == ({"speaker": "Speaker 1", "text": "two"}, {"speaker": "Speaker 2", "text": "three four"})
    assert found.beginning("").words == found.end("").words == () and found.end("").turns == ()
    assert parse_tags("one two", "default").end("two").words == ()


def test_five_minutes_of_words_take_little_time():
    answer = " ".join(f"word [T:{30 * number % 1000}]" for number in range(1, 1001))
    begun = time.perf_counter()
    found = timed(answer, seconds=300)
    assert found[-1] == ("word", 299.7, 300) and time.perf_counter() - begun < 2


durations = st.lists(st.tuples(st.integers(5, 250), st.booleans()), min_size=1, max_size=60)


@given(durations, st.data())
def test_true_times_are_found_again_even_if_some_are_missing_or_wrong(parts, data):
    """Words of at most 2.5 s, with silences; one time in five is garbage."""
    end, tokens, ends = 0, [], []
    for number, (duration, is_silence) in enumerate(parts):
        end += duration
        # Two wrong times side by side may look like two right ones.
        is_right = number % 5 != 2 or not data.draw(st.booleans())
        tokens.append(("_" if is_silence else "word") + (f" [T:{end % 1000}]" if is_right else data.draw(st.sampled_from(["", " [T:]"]))))
        if not is_silence:
            ends.append(end / 100 if is_right else None)
    found = parse_tags(" ".join(tokens), "word_timestamps", end / 100)
    assert [one.end if right is not None else None for one, right in zip(found.words, ends, strict=True)] == ends


pieces = st.sampled_from(
    ["[T:", "]", "[Speaker ", "]:", "1", "45", "999", "[", "_", " ", "\n", "a", "word", "今日", "[T:200]", "[Speaker 1]: "]
)


@given(st.lists(pieces, max_size=40).map("".join) | st.text(max_size=60), st.floats(0, 40), st.lists(pieces, max_size=9).map("".join))
def test_whatever_a_model_writes_words_are_those_of_the_text_and_times_never_go_back(answer, seconds, prefix):
    for mode in ("word_timestamps", "speaker_attributed"):
        found = parse_tags(answer, mode, seconds, prefix)
        assert [one.word for one in found.words] == [unit for _, unit in text_units(found.text) if unit]
        assert [answer[one.begin : one.stop] for one in found.words] == [one.word for one in found.words]
        assert found.text == " ".join(found.text.split()) and found.raw_text == answer.strip()
        assert parse_tags(found.text, mode).text == found.text or "[" in found.text or "_" in found.text
    words = parse_tags(answer, "word_timestamps", seconds, prefix).words
    times = [time for one in words for time in (one.start, one.end)]
    assert all(0 <= one <= seconds + 0.001 for one in times) and all(one <= other for one, other in pairwise(times))
    turns = parse_tags(answer, "speaker_attributed", seconds, prefix).turns
    assert all(one["text"] and one["speaker"].startswith("Speaker ") for one in turns)
