"""Texts of windows that overlap, without the words that both have."""

import random

import pytest

from granite_speech.transcription.overlaps import join

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "left",
    "right",
    "stop",
    "go",
    "yes",
    "no",
    "print",
]


def joined(before: str, after: str, overlap: float = 1.0, seconds: float = 4.0) -> str:
    return " ".join(join(before, after, overlap=overlap, before_seconds=seconds, after_seconds=seconds)).strip()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("one two three four five six", "five six seven eight nine", "one two three four five six seven eight nine"),
        ("One, two, three, four five. Six.", "five six seven eight nine", "One, two, three, four five. Six. seven eight nine"),
        ("one two three four five six", "FIVE, six, seven eight nine", "one two three four five six seven eight nine"),
        # The last word is cut off, the first one is, or both.
        ("one two three four five sev", "five seven eight nine left", "one two three four five seven eight nine left"),
        ("one two three four five six", "ve five six seven eight nine", "one two three four five six seven eight nine"),
        ("one two three four five six sev", "ive six seven eight nine left", "one two three four five six seven eight nine left"),
        # Only a part of a word is in both.
        ("one two three four five six", "sixteen seven eight nine left", "one two three four five sixteen seven eight nine left"),
        ("one two three four five sixteen", "teen seven eight nine left", "one two three four five sixteen seven eight nine left"),
        ("", "one two", "one two"),
        ("one two", "", "one two"),
        ("one two three four five ...", "five ... six seven eight", "one two three four five ... six seven eight"),
    ],
)
def test_words_in_both_are_written_once(before, after, expected):
    assert joined(before, after) == expected


def test_without_an_overlap_nothing_is_removed():
    assert join("one two", "two three", overlap=0.0, before_seconds=4.0, after_seconds=4.0) == ("one two", "two three")


def test_time_tells_how_often_a_repeated_word_was_said():
    """Both texts end and begin with "five five": there were two if both windows have both, and three if they have one in common."""
    before, after = "one two three four five five", "five five six seven eight nine"
    assert joined(before, after, overlap=1.3).count("five") == 2
    assert joined(before, after, overlap=0.6).count("five") == 3


def test_no_more_is_removed_than_fits_into_the_overlap():
    text = "yes left right stop go no"
    assert len(joined(text, text, overlap=0.7).split()) >= 11


def test_any_words_cut_anywhere_are_put_together_again():
    """Words of half a second in windows of 4 s that overlap by 1 s; the words at the edges may be broken."""
    rng = random.Random(0)
    for _ in range(500):
        words = rng.sample(WORDS, 14)
        first, second = words[:8], words[6:]
        broken = rng.random()
        if broken < 0.3:
            first = [*first, words[8][:1]]
        elif broken < 0.6:
            second = [words[5][-2:], *second]
        if rng.random() < 0.5:
            first = [word.capitalize() for word in first[:-1]] + [first[-1] + "."]
        assert joined(" ".join(first), " ".join(second)).lower().replace(".", "").split() == words
