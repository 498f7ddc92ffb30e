"""`TranscribeOptions`: values, names of other packages, and what is refused by name."""

import numpy as np
import pytest

from granite_speech import InputError, TranscribeOptions


@pytest.mark.parametrize(
    "given, spans",
    [
        (None, None),
        ("", None),
        ("0", None),
        (0, None),
        ([0.0], None),
        (5, ((5.0, None),)),
        ("10,20", ((10.0, 20.0),)),
        (" 10, 20 ,30.5", ((10.0, 20.0), (30.5, None))),
        ([10, 20, 20, 25], ((10.0, 20.0), (20.0, 25.0))),
        ([(1, 2), (3, None)], ((1.0, 2.0), (3.0, None))),
        (((0, 4),), ((0.0, 4.0),)),
    ],
)
def test_clip_timestamps(given, spans):
    assert TranscribeOptions(clip_timestamps=given).clip_timestamps == spans


@pytest.mark.parametrize(
    "given", ["a", "1,,2", "3,2", "1,1", [-1], [(1, None), (2, 3)], [None], "nan", "inf", "1,2,inf", [(1, 2), (1.5, 3)], []]
)
def test_clip_timestamps_that_are_no_ranges(given):
    with pytest.raises(InputError, match="clip_timestamps"):
        TranscribeOptions(clip_timestamps=given)


@pytest.mark.parametrize(
    "call",
    [
        {"task": "sing"},
        {"segmentation": "bars"},
        {"errors": "ignore"},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"max_new_tokens": -1},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"chunk_length": 0.4},
        {"segmentation": ["fixed"]},
        {"chunk_length": "30"},
        {"chunk_overlap": 1.0, "segmentation": "energy"},
        {"chunk_overlap": -1.0, "segmentation": "fixed"},
        {"compression_ratio_threshold": 0},
        {"word_timestamps": "yes"},
        {"prompt_mode": "summary"},
        {"prompt_mode": ["default"]},
    ],
    ids=str,
)
def test_values_that_cannot_be_used_are_named(call):
    with pytest.raises(InputError, match=f"{next(iter(call))}="):
        TranscribeOptions.of(call)


@pytest.mark.parametrize(
    "call, message",
    [
        ({"prefix_text": 3}, "prefix_text of type int"),
        ({"prompt_mode": "speaker_attributed", "task": "translate"}, "prompt_mode='speaker_attributed' with task='translate'"),
        ({"prefix_text": "so", "task": "translate"}, "prefix_text with task='translate'"),
        ({"word_timestamps": True, "task": "translate"}, "the words of a translation were not said"),
    ],
)
def test_options_that_exclude_each_other(call, message):
    with pytest.raises(InputError, match=message):
        TranscribeOptions.of(call)


def test_answers_with_a_time_for_each_word_may_be_longer():
    assert TranscribeOptions().max_new_tokens == TranscribeOptions(prompt_mode="speaker_attributed").max_new_tokens == 400
    assert TranscribeOptions(prompt_mode="word_timestamps").max_new_tokens == 2000
    assert TranscribeOptions(prompt_mode="word_timestamps", max_new_tokens=300).max_new_tokens == 300


def test_what_changes_nothing_goes_with_any_task():
    options = {"task": "translate", "prompt_mode": "default", "prefix_text": "", "word_timestamps": False}
    assert TranscribeOptions.of(options) == TranscribeOptions(task="translate", prefix_text="")
    assert TranscribeOptions(prompt_mode="word_timestamps", prompt="what?").prompt == "what?"


def test_an_overlap_means_fixed_windows():
    assert TranscribeOptions().segmentation == "energy"
    assert TranscribeOptions(chunk_overlap=1.0).segmentation == "fixed"


def test_names_of_other_packages():
    options = TranscribeOptions.of(
        {"keyword_biases": ["a", "b"], "initial_prompt": "go", "temperature": (0.5, 0.8), "max_new_tokens": None}
    )
    assert options == TranscribeOptions(keywords=["a", "b"], prompt="go", temperature=0.5)
    assert TranscribeOptions.of({"prompt": None, "initial_prompt": "go"}).prompt == "go"
    assert TranscribeOptions.of({"compression_ratio_threshold": None}).compression_ratio_threshold is None
    assert TranscribeOptions(max_new_tokens=np.int64(7)).max_new_tokens == 7
    with pytest.raises(InputError, match="prompt and initial_prompt; expected one of them"):
        TranscribeOptions.of({"prompt": "a", "initial_prompt": "b"})


@pytest.mark.parametrize(
    "name, accepted, refused",
    [
        ("beam_size", 1, 5),
        ("num_beams", None, 2),
        ("fp16", True, False),
        ("condition_on_previous_text", False, True),
        ("no_speech_threshold", 0.6, 0.3),
        ("suppress_tokens", "-1", "1,2"),
        ("suppress_blank", True, False),
        ("without_timestamps", False, True),
        ("max_initial_timestamp", 1.0, 2.0),
        ("vad_threshold", 0.2, 0.5),
        ("vad_min_silence_duration", 0.5, 1.0),
    ],
)
def test_what_changes_nothing_is_accepted_and_the_rest_refused_by_name(name, accepted, refused):
    assert TranscribeOptions.of({name: accepted}) == TranscribeOptions()
    with pytest.raises(InputError, match=f"{name}={refused!r}, which is not supported"):
        TranscribeOptions.of({name: refused})


@pytest.mark.parametrize(
    "option", [{"prepend_punctuations": "("}, {"append_punctuations": "!"}, {"hallucination_silence_threshold": 2.0}], ids=str
)
def test_what_only_changes_words_is_refused_with_words_and_accepted_without(option):
    assert TranscribeOptions.of(option) == TranscribeOptions.of(option | {"word_timestamps": False}) == TranscribeOptions()
    for call in (option | {"word_timestamps": True}, {"word_timestamps": True} | option):
        with pytest.raises(InputError, match=f"{next(iter(option))}=.* is not supported"):
            TranscribeOptions.of(call)
    whispers = {"prepend_punctuations": "\"'“¿([{-", "append_punctuations": "\"'.。,，!！?？:：”)]}、"}
    assert TranscribeOptions.of({"word_timestamps": True} | whispers).word_timestamps


def test_what_never_changes_anything_is_accepted_with_any_value():
    call = {"patience": 2.0, "length_penalty": 0.5, "append_punctuations": "!", "hallucination_silence_threshold": 2, "verbose": False}
    assert TranscribeOptions.of(call) == TranscribeOptions()


def test_an_unknown_option_is_named_with_the_known_ones():
    with pytest.raises(InputError, match="the option 'sampling'; expected one of task, language"):
        TranscribeOptions.of({"sampling": True})
