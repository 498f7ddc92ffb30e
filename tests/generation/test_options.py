"""What becomes of each option of transformers' GenerationConfig, and what the caller is told about it."""

import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
import transformers

from granite_speech import GenerationConfig, InputError, UnsupportedError
from granite_speech.engine.arguments import moved
from granite_speech.engine.requests import engine_options
from granite_speech.generation.option_table import ACCEPTED, REFUSED
from granite_speech.generation.options import GenerationOptions
from granite_speech.modules.prompts import ModelInputs
from tests.support.small_models import small_model

IDS = torch.tensor([[3, 4, 5, 3, 4]])
BEFORE_5_23 = {"_commit_hash"}  # an attribute that 5.17 has; 5.23 reads the key and drops it
IMPLEMENTED = {one.name for one in fields(GenerationOptions)}


def resolved(**options) -> GenerationOptions:
    return GenerationOptions.resolve(options, None, GenerationConfig(), 5)


def test_every_option_of_transformers_is_decided():
    names = vars(transformers.GenerationConfig()).keys() | BEFORE_5_23
    kinds = [IMPLEMENTED, ACCEPTED, REFUSED.keys()]
    assert set().union(*kinds) == names
    assert sum(map(len, kinds)) == len(names), "an option of two kinds"
    assert list(map(len, kinds)) == [39, 19, 16]


def test_a_configuration_has_the_attributes_of_transformers():
    assert vars(GenerationConfig()) == dict.fromkeys(vars(transformers.GenerationConfig()).keys() | BEFORE_5_23)


def test_options_without_effect_are_accepted_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolved(**dict.fromkeys(transformers.GenerationConfig().to_dict()))
        resolved(**{name: values[0] for name, values in REFUSED.items() if values}, **dict.fromkeys(ACCEPTED, "anything"))
        resolved(temperature=1.0, top_p=1, top_k=50, length_penalty=1.0, early_stopping=False, num_beams=1, output_scores=False)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_others_are_refused_by_name(name):
    with pytest.raises(InputError, match=name):
        resolved(**{name: 7}, return_dict_in_generate=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, ["temperature=0.0", "do_sample"]),
        ({"top_p": 0.9, "top_k": 5, "do_sample": False}, ["top_p=0.9", "top_k=5"]),
        ({"min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "top_h": 0.2}, ["min_p", "typical_p", "eta", "top_h"]),
        ({"early_stopping": True, "length_penalty": 2.0}, ["early_stopping=True", "length_penalty=2.0", "num_beams"]),
        ({"output_scores": True, "output_attentions": True}, ["output_scores", "output_attentions", "return_dict_in_generate"]),
        ({"max_length": 30, "max_new_tokens": 4}, ["max_length=30", "max_new_tokens=4"]),
    ],
)
def test_options_that_do_nothing_give_a_warning(options, words):
    with pytest.warns(UserWarning) as caught:
        resolved(**options)
    text = " ".join(str(one.message) for one in caught)
    assert all(word in text for word in words), text


def test_a_models_own_options_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = GenerationConfig(temperature=0.6, top_p=0.9, early_stopping=True, do_sample=True)
        GenerationOptions.resolve({"do_sample": False}, None, own, 5)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_new_tokens", np.int64(3), 3),
        ("max_new_tokens", torch.tensor(3), 3),
        ("do_sample", np.bool_(True), True),
        ("repetition_penalty", np.float32(0.5), 0.5),
        ("eos_token_id", np.array([3, 4]), (3, 4)),
        ("eos_token_id", {np.int64(3)}, (3,)),
        ("suppress_tokens", range(3), (0, 1, 2)),
        ("forced_eos_token_id", 3, (3,)),
        ("bad_words_ids", [[np.int64(3), 4], (5,)], ((3, 4), (5,))),
        ("sequence_bias", {(3, 4): 2}, (((3, 4), 2),)),
        ("sequence_bias", [[[3, 4], float("-inf")]], (((3, 4), float("-inf")),)),
        ("exponential_decay_length_penalty", [3, 1.5], (3, 1.5)),
    ],
)
def test_values_become_plain(name, value, expected):
    options = resolved(**{"eos_token_id": 1} | {name: value})
    assert getattr(options, name) == expected and type(getattr(options, name)) is type(expected)
    hash(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"sequence_bias": {3: 1.0}}, "sequence_bias"),
        ({"sequence_bias": {(3,): "high"}}, "sequence_bias"),
        ({"sequence_bias": 3}, "sequence_bias"),
        ({"exponential_decay_length_penalty": 3}, "exponential_decay"),
        ({"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": []}, "without an end token"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"min_p": 1.5, "do_sample": True}, "min_p=1.5"),
        ({"typical_p": 0, "do_sample": True}, "typical_p=0"),
        ({"max_time": -1}, "max_time=-1"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens"),
        ({"suppress_tokens": [3, 4], "forced_eos_token_id": 3}, "forced_eos_token_id.*suppress_tokens"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        resolved(**options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits_processor": print}, InputError, "logits_processor of type builtin"),
        ({"logits_processor": [3]}, InputError, "logits_processor with"),
        ({"logits_processor": [lambda ids, scores: None]}, InputError, "result of type NoneType"),
        ({"logits_processor": [lambda ids, scores: scores[:, :2]]}, InputError, "shape"),
        ({"stopping_criteria": [lambda ids, scores: torch.ones(3)]}, InputError, "stopping criterion"),
        ({"stopping_criteria": [lambda ids, scores: "yes"]}, InputError, "stopping criterion"),
        ({"prefix_allowed_tokens_fn": [3]}, InputError, "prefix_allowed_tokens_fn of type list"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: []}, InputError, "no allowed token"),
        ({"assistant_model": small_model()}, UnsupportedError, "assistant_model"),
        ({"custom_generate": "someone/something"}, UnsupportedError, "custom_generate"),
        ({"negative_prompt_ids": IDS}, UnsupportedError, "negative_prompt_ids"),
        ({"past_key_values": ()}, UnsupportedError, "past_key_values"),
        ({"synced_gpus": True}, UnsupportedError, "synced_gpus"),
        ({"generation_config": IDS}, InputError, "generation_config of type Tensor"),
        ({"inputs": IDS}, InputError, "inputs and input_ids"),
        ({"sequence_bias": {(1000,): 1.0}}, InputError, "token 1000"),
        ({"inputs_embeds": torch.zeros(2, 3, 4)}, InputError, "inputs_embeds"),
        ({"token_type_ids": IDS}, InputError, "token_type_ids"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        small_model().generate(**{"input_ids": IDS, "max_new_tokens": 2, "eos_token_id": []} | arguments)


def test_a_dictionary_of_inputs_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"generate\(\*\*inputs\)"):
        small_model().generate({"input_ids": IDS})


def test_a_call_without_prompts_begins_with_the_first_token():
    model = small_model()
    assert torch.equal(model.generate(bos_token_id=7, max_new_tokens=3), model.generate(torch.tensor([[7]]), max_new_tokens=3))
    with pytest.raises(InputError, match="without input_ids"):
        model.generate(bos_token_id=None)


def test_inputs_on_another_device_are_copied_with_a_warning():
    inputs = ModelInputs(input_ids=IDS, attention_mask=torch.ones_like(IDS), input_features_lengths=[3])
    with pytest.warns(UserWarning, match="input_ids, attention_mask to meta"):
        copied = moved(inputs, torch.device("meta"))
    assert copied.input_ids.device.type == copied.attention_mask.device.type == "meta"
    assert moved(inputs, IDS.device) is inputs


@pytest.mark.parametrize(
    "options",
    [{"no_repeat_ngram_size": 2}, {"min_p": 0.1, "top_p": 0.9}, {"max_time": 1.0}, {"suppress_tokens": [3]}, {"output_logits": True}],
)
def test_an_engine_refuses_what_its_steps_cannot_do(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}.*model.generate"):
        engine_options({"max_new_tokens": 2} | options, small_model(), 5)


def test_a_processor_that_writes_to_its_argument_changes_no_logits():
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    plain = small_model().generate(IDS, **options)
    changed = small_model().generate(IDS, **options, logits_processor=[lambda ids, scores: scores.mul_(-1)])
    assert torch.equal(changed.logits[0], plain.logits[0]) and not torch.equal(changed.sequences, plain.sequences)


def test_a_criterion_ends_its_row_alone():
    model, ids = small_model(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    free = model.generate(ids, max_new_tokens=6, eos_token_id=[])
    seen = []

    def second_row(input_ids, scores, **kwargs):
        seen.append(input_ids.clone())
        return torch.tensor([False, input_ids.shape[1] == 5])

    ended = model.generate(ids, max_new_tokens=6, eos_token_id=[], pad_token_id=9, stopping_criteria=[second_row])
    assert torch.equal(ended[0], free[0])
    assert torch.equal(ended[1, :5], free[1, :5]) and ended[1, 5:].tolist() == [9] * 4
    assert [one.shape[1] for one in seen] == [4, 5, 6, 7, 8, 9] and torch.equal(seen[-1], ended)


def test_requests_without_rules_are_captured_as_before():
    """Options of a captured step need no history; those that only criteria look at do."""
    assert not resolved(do_sample=True, temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=1.2, min_new_tokens=3).rules
    assert resolved(do_sample=True, min_p=0.5).rules == ["min_p"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not resolved(min_p=0.5).rules
