"""TurboCTC's tokenizer against transformers' ParakeetTokenizer, on a small one of each kind."""

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.errors import InputError
from granite_speech.inputs.ctc_tokenizer import GraniteSpeech5Tokenizer
from tests.support.ctc_tokenizers import KINDS, write_ctc_tokenizer

TEXTS = ["hello world", "the quick brown fox , twice !", "", "nine nine  nine", "Ünknown ☃"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_ctc_tokenizer(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    return GraniteSpeech5Tokenizer.from_pretrained(folder), transformers.ParakeetTokenizer.from_pretrained(folder)


def test_text_becomes_the_same_labels(pair):
    ours, theirs = pair
    for options in ({}, {"add_special_tokens": False}, {"padding": True}, {"max_length": 3, "truncation": True}):
        mine, expected = ours(TEXTS, **options), theirs(TEXTS, **options)
        assert dict(mine) == dict(expected)
    assert ours.pad_token_id == theirs.pad_token_id == 0 and len(ours) == len(theirs)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_ids_give_the_same_text(pair, data):
    ours, theirs = pair
    ids = st.lists(st.one_of(st.integers(0, 3), st.integers(0, len(ours) - 1)), max_size=12)
    rows = data.draw(st.lists(ids, min_size=1, max_size=3))
    options = data.draw(st.fixed_dictionaries({}, optional={name: st.booleans() for name in ("group_tokens", "skip_special_tokens")}))
    assert ours.batch_decode(rows, **options) == theirs.batch_decode(rows, **options) == ours.decode(rows, **options)
    assert ours.decode(rows[0], **options) == theirs.decode(rows[0], **options)


def test_neighbors_are_grouped_before_blanks_are_dropped(pair):
    ours, theirs = pair
    token = ours.encode("hello", add_special_tokens=False)[-1]
    once, twice = ours.decode([token]), ours.decode([token, 0, token])
    assert ours.decode([0, token, token, 0, 0]) == once != twice
    assert ours.decode([token, token], group_tokens=False) == twice
    for ids in ([token] * 3, torch.tensor([[token, 0, token]]), np.array([token, token, 0]), [torch.tensor([token, 0])], token):
        for group_tokens in (True, False):
            assert ours.decode(ids, group_tokens=group_tokens) == theirs.decode(ids, group_tokens=group_tokens)


def test_labels_come_back_as_text(pair):
    ours, _ = pair
    for text in ("hello world", "nine one five seven"):
        assert ours.decode(ours(text)["input_ids"], group_tokens=False).strip() == text


def test_without_a_pad_token_nothing_is_dropped(tmp_path):
    write_ctc_tokenizer(tmp_path, pad_token=None)
    ours, theirs = GraniteSpeech5Tokenizer.from_pretrained(tmp_path), transformers.ParakeetTokenizer.from_pretrained(tmp_path)
    assert ours.decode([0, 5, 5]) == theirs.decode([0, 5, 5])
    assert "<pad>" in ours.decode([0, 5, 5])


def test_spaces_before_punctuation_are_cleaned_up_as_in_transformers(folder, pair):
    ours, theirs = pair
    ids = ours("hello world , twice !")["input_ids"]
    for choice in (None, False):
        assert ours.decode(ids, clean_up_tokenization_spaces=choice) == theirs.decode(ids, clean_up_tokenization_spaces=choice)
    if ours.backend.model.__class__.__name__ == "BPE":
        with pytest.warns(UserWarning, match="no effect"):
            assert ours.decode(ids, clean_up_tokenization_spaces=True) == theirs.decode(ids, clean_up_tokenization_spaces=True)
        return
    cleaned = ours.decode(ids, clean_up_tokenization_spaces=True)
    assert cleaned == theirs.decode(ids, clean_up_tokenization_spaces=True) != ours.decode(ids)
    assert "," in cleaned and " ," not in cleaned
    loaded = (kind.from_pretrained(folder, clean_up_tokenization_spaces=True) for kind in (type(ours), type(theirs)))
    assert [one.decode(ids) for one in loaded] == [cleaned, cleaned]


@pytest.mark.parametrize("named", ["ParakeetTokenizer", "ParakeetTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None])
def test_files_of_every_class_are_read_and_written_for_transformers(tmp_path, named):
    write_ctc_tokenizer(tmp_path, tokenizer_class=named)
    ours = GraniteSpeech5Tokenizer.from_pretrained(tmp_path)
    assert ours.decode([5, 5, 0, 5]) == ours.decode([5, 5], group_tokens=False)
    ours.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"] == "ParakeetTokenizer"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(theirs) is transformers.ParakeetTokenizer
    again = GraniteSpeech5Tokenizer.from_pretrained(tmp_path / "saved")
    for one in (theirs, again):
        assert one(TEXTS)["input_ids"] == ours(TEXTS)["input_ids"] and one.decode([0, 5, 5, 6]) == ours.decode([0, 5, 5, 6])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([-100, 3], {}, "token id -100.*Remove label padding"),
        ("hello", {}, "token ids of type str"),
        ([1.5], {}, "token ids of type float"),
        ([3], {"group_token": True}, "unknown options group_token"),
    ],
    ids=str,
)
def test_bad_ids_and_options_are_refused(pair, ids, options, message):
    with pytest.raises(InputError, match=message):
        pair[0].decode(ids, **options)
