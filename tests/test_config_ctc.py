"""TurboCTC's configurations against transformers' own. `test_config` has what holds for all configurations."""

import copy
import dataclasses
import json

import pytest
import transformers

from granite_speech import AutoConfig, GraniteSpeech5CTCConfig, GraniteSpeech5EncoderConfig, GraniteSpeechConfig
from granite_speech.errors import ConfigError, InputError

ENCODER = {
    "vocab_size": 23,
    "hidden_size": 30,
    "intermediate_size": 50,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_mel_bins": 11,
    "context_size": 9,
    "max_position_embeddings": 12,
    "subsample_layers": [3],
    "attention_bias": False,
    "initializer_range": 0.5,
}
SMALL = {"vocab_size": 23, "encoder_config": ENCODER, "ctc_loss_reduction": "sum", "ctc_zero_infinity": False, "tie_word_embeddings": False}


def same(ours, theirs):
    for one in dataclasses.fields(ours):
        mine, other = getattr(ours, one.name), getattr(theirs, one.name)
        if one.name == "encoder_config":
            same(mine, other)
        else:
            assert mine == other and type(mine) is type(other), one.name


@pytest.mark.parametrize(
    "values", [{}, SMALL, SMALL | {"pad_token_id": 7}, SMALL | {"pad_token_id": None}], ids=["default", "small", "other blank", "none"]
)
def test_files_go_both_ways(values, tmp_path):
    ours = GraniteSpeech5CTCConfig(**copy.deepcopy(values))
    theirs = transformers.GraniteSpeech5CTCConfig(**copy.deepcopy(values))
    same(ours, theirs)
    theirs.save_pretrained(str(tmp_path))
    same(GraniteSpeech5CTCConfig.from_pretrained(tmp_path), theirs)
    ours.save_pretrained(tmp_path)
    back = transformers.GraniteSpeech5CTCConfig.from_pretrained(str(tmp_path))
    same(ours, back)
    assert back.to_dict()["initializer_range"] == ours.to_dict()["initializer_range"] == ours.encoder_config.initializer_range
    assert type(AutoConfig.from_pretrained(tmp_path)) is GraniteSpeech5CTCConfig
    part = GraniteSpeech5EncoderConfig.from_pretrained(tmp_path)
    assert part == ours.encoder_config
    part.save_pretrained(tmp_path / "part")
    same(part, transformers.GraniteSpeech5EncoderConfig.from_pretrained(str(tmp_path / "part")))
    assert AutoConfig.from_pretrained(tmp_path / "part") == part
    assert AutoConfig.for_model("granite_speech5_encoder", hidden_size=64).hidden_size == 64


def test_derived_values():
    encoder = GraniteSpeech5EncoderConfig(hidden_size=30, num_attention_heads=4)
    assert (encoder.head_dim, encoder.num_key_value_heads, encoder.subsample_layers) == (7, 4, [0, 1])
    assert GraniteSpeech5EncoderConfig(subsample_layers=(2, 0)).subsample_layers == [2, 0]
    assert GraniteSpeech5EncoderConfig(num_hidden_layers=1).subsamplings == 1  # the default names a second block, which is not there
    one, other = GraniteSpeech5EncoderConfig(), GraniteSpeech5EncoderConfig()
    one.subsample_layers.append(5)
    assert other.subsample_layers == [0, 1]


def test_the_initializer_range_is_the_encoders(tmp_path):
    config = GraniteSpeech5CTCConfig(**copy.deepcopy(SMALL), initializer_range=9.0)
    assert (
        config.initializer_range
        == 0.5
        == transformers.GraniteSpeech5CTCConfig(**copy.deepcopy(SMALL), initializer_range=9.0).initializer_range
    )
    config.initializer_range = 0.25
    config.save_pretrained(tmp_path)
    assert GraniteSpeech5CTCConfig.from_pretrained(tmp_path).encoder_config.initializer_range == 0.25


def test_options_of_calls_change_values(tmp_path):
    GraniteSpeech5CTCConfig(**copy.deepcopy(SMALL)).save_pretrained(tmp_path)
    config = GraniteSpeech5CTCConfig.from_pretrained(tmp_path, pad_token_id=3, encoder_config={"activation_dropout": 0.25})
    assert config.pad_token_id == 3 and config.encoder_config.activation_dropout == 0.25 and config.encoder_config.hidden_size == 30
    with pytest.raises(InputError, match=r"value of encoder_config.*Pass encoder_config="):
        GraniteSpeech5CTCConfig.from_pretrained(tmp_path, activation_dropout=0.25)


def test_files_of_the_other_family_are_refused(tmp_path):
    GraniteSpeech5CTCConfig(**copy.deepcopy(SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'granite_speech5_ctc'; expected 'granite_speech'\. Load it with GraniteSpeech5CTCConfig"):
        GraniteSpeechConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "granite_speech"}))
    with pytest.raises(ConfigError, match=r"expected 'granite_speech5_ctc'\. Load it with GraniteSpeechConfig"):
        GraniteSpeech5CTCConfig.from_pretrained(tmp_path)


SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_mel_bins context_size
    max_position_embeddings conv_kernel_size conv_expansion_factor"""
BAD = {
    GraniteSpeech5EncoderConfig: {
        **{size: [0, -1, True, 1.5, "8", None, 10**400] for size in SIZES.split()},
        "head_dim": [0, -1, 1.5, "8"],
        "num_key_value_heads": [0, 4, "8"],
        "context_size": [513],
        "subsample_layers": ["01", [-1], [0.5], [True], 3, {"0": 1}, [[0]]],
        "hidden_act": ["mish2", None, 3],
        "attention_bias": [None, 1, "true"],
        "attention_dropout": [1.0, -0.1, None, "0.1", float("nan")],
        "activation_dropout": [1.0, -0.1, None],
        "initializer_range": [-1, float("inf"), None],
    },
    GraniteSpeech5CTCConfig: {
        "vocab_size": [0, 100, None],
        "ctc_loss_reduction": ["average", None, 1],
        "ctc_zero_infinity": [None, 1, "true"],
        "encoder_config": [[1], "encoder", 7],
        "pad_token_id": [-1, 16384, 1.5, "0", True],
        "tie_word_embeddings": [None, 0],
    },
}


@pytest.mark.parametrize(
    "cls, name, value", [(cls, name, value) for cls, table in BAD.items() for name, values in table.items() for value in values]
)
def test_bad_values_are_refused_by_name(cls, name, value):
    with pytest.raises(ConfigError) as caught:
        cls(**{name: value})
    assert f"{cls.__name__}.{name} = " in str(caught.value)
    assert len(str(caught.value)) < 500 and caught.value.remedy


def test_a_bad_value_of_the_encoder_is_refused():
    with pytest.raises(ConfigError, match=r"GraniteSpeech5EncoderConfig.hidden_size = 0; expected an integer from 1"):
        GraniteSpeech5CTCConfig(encoder_config={"hidden_size": 0})
