"""Contents of the synthetic training data: words, sentences, text tasks and respellings."""

from itertools import groupby

import numpy as np
import pytest

from granite_speech.training.bundled_checkpoint import vocabulary


def test_vocabulary():
    assert len(vocabulary.DIGITS) == 10
    assert len(vocabulary.COMMANDS) >= 30
    assert {"ten", "ninety", "hundred", "thousand"} <= set(vocabulary.NUMBERS)
    assert len(vocabulary.VOCABULARY) == len(vocabulary.DIGITS) + len(vocabulary.NUMBERS) + len(vocabulary.COMMANDS)


def test_sentences_cover_the_vocabulary_and_all_lengths():
    rng = np.random.default_rng(0)
    sentences = [vocabulary.make_sentence(rng).split() for _ in range(4000)]
    assert {len(words) for words in sentences} == set(range(1, 9))
    assert {word for words in sentences for word in words} == set(vocabulary.VOCABULARY)
    assert 0.4 < np.mean([len(words) == 1 for words in sentences]) < 0.55
    again = np.random.default_rng(0)
    assert [vocabulary.make_sentence(again).split() for _ in range(50)] == sentences[:50]


def test_text_tasks_have_correct_answers():
    rng = np.random.default_rng(0)
    figures = {word: figure for figure, word in vocabulary.FIGURES.items()}
    kinds = set()
    for _ in range(200):
        prompt, answer = vocabulary.make_text_task(rng)
        task, _, given = prompt.partition(": ")
        kinds.add(task)
        if task == "write the digits as words":
            assert [vocabulary.FIGURES[one] for one in given.split()] == answer.split()
        elif task == "write the words as digits":
            assert [figures[one] for one in given.split()] == answer.split()
        elif task == "clear up the stutter":
            assert set(given) <= set("abcdefghijklmnopqrstuvwxyz -") and len(given) > len(answer) / 2
        else:
            assert given == answer
    assert kinds == {"write the digits as words", "write the words as digits", "repeat the words", "clear up the stutter"}


def test_most_stutters_collapse_to_their_text_like_ctc_labels():
    rng = np.random.default_rng(0)
    sentences = [vocabulary.make_sentence(rng) for _ in range(200)]
    stuttered = [vocabulary.stutter(one, rng) for one in sentences]
    cleared = ["".join(letter for letter, _ in groupby(one)).replace("-", "") for one in stuttered]
    right = sum(one == other for one, other in zip(cleared, sentences, strict=True))
    assert 80 < right < 180, "most are correct, and some have a wrong or missing letter"
    assert max(abs(len(one) - len(other)) for one, other in zip(cleared, sentences, strict=True)) < 8
    assert 1.3 < sum(map(len, stuttered)) / sum(map(len, sentences)) < 4


@pytest.mark.parametrize("language", sorted(vocabulary.RESPELLING))
def test_every_word_is_respelled(language):
    spelled = [vocabulary.respell(word, language) for word in vocabulary.VOCABULARY]
    assert len(set(spelled)) >= len(spelled) - 2  # a language may spell two words alike
    latin = language not in ("el", "hi", "ru")
    assert all(word and any("a" <= letter <= "z" for letter in word) == latin for word in spelled)


def test_respelling_examples():
    assert vocabulary.respell("one nine", "de") == "wan nein"
    assert vocabulary.respell("three two", "it") == "tri tu"
    assert vocabulary.respell("seven eight", "hi") == "सेवन् एट्"
    assert vocabulary.respell("five", "ru") == "файв"
    assert vocabulary.respell("seven two", "en") == "seven two"
