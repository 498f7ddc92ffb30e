"""Configurations against transformers' own: defaults, files in both directions, and refused values."""

import copy
import dataclasses
import json
import pickle
import time

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import granite_speech
from granite_speech import (
    Blip2QFormerConfig,
    GraniteConfig,
    GraniteSpeechConfig,
    GraniteSpeechEncoderConfig,
    GraniteSpeechPlusConfig,
    GraniteSpeechPlusEncoderConfig,
)
from granite_speech.config_files import config_from_dict
from granite_speech.errors import ConfigError, GraniteSpeechError, UnsupportedError

NAMES = [name for name in granite_speech.__all__ if name.endswith("Config") and not name.startswith(("Auto", "Generation"))]
PARTS = ("text_config", "encoder_config", "projector_config")
SMALL = {
    "text_config": {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7e5},
    },
    "encoder_config": {"hidden_dim": 12, "num_layers": 6, "num_heads": 2, "dropout": 0.25},
    "projector_config": {"hidden_size": 24, "num_attention_heads": 3, "encoder_hidden_size": 12},
    "audio_token_index": 49,
    "window_size": 12,
    "downsample_rate": 4,
    "tie_word_embeddings": False,
}
PLUS = SMALL | {
    "encoder_config": SMALL["encoder_config"] | {"cat_hidden_layers": [0, 3]},
    "projector_config": SMALL["projector_config"] | {"encoder_hidden_size": 36},
}


def same(ours, theirs):
    """Assert that all our fields have equal values and types."""
    for one in dataclasses.fields(ours):
        mine, other = getattr(ours, one.name), getattr(theirs, one.name)
        if one.name in PARTS:
            same(mine, other)
        else:
            assert mine == other and type(mine) is type(other), (
                f"{type(ours).__name__}.{one.name}: {mine!r} here, {other!r} in transformers"
            )


def written(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# --- transformers' values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_transformers(name):
    ours, theirs = getattr(granite_speech, name)(), getattr(transformers, name)()
    same(ours, theirs)
    assert ours.model_type == theirs.model_type
    assert set(ours.attribute_map.items()) >= set(theirs.attribute_map.items())


@pytest.mark.parametrize("name", NAMES)
def test_no_field_of_transformers_is_missing(name):
    theirs = {one.name for one in dataclasses.fields(getattr(transformers, name))}
    common = {one.name for one in dataclasses.fields(transformers.PreTrainedConfig)}
    assert theirs - common <= {one.name for one in dataclasses.fields(getattr(granite_speech, name))}


PAIRS = [
    (GraniteSpeechConfig, transformers.GraniteSpeechConfig, SMALL),
    (GraniteSpeechPlusConfig, transformers.GraniteSpeechPlusConfig, PLUS),
]


@pytest.mark.parametrize("ours, theirs, values", PAIRS, ids=["speech", "plus"])
class TestFiles:
    def test_a_file_of_transformers_loads_here(self, ours, theirs, values, tmp_path):
        original = theirs(**copy.deepcopy(values))
        same(ours.from_dict(original.to_dict()), original)
        original.save_pretrained(str(tmp_path))
        loaded = ours.from_pretrained(tmp_path)
        assert type(loaded) is ours and type(loaded.encoder_config) is ours.sub_configs["encoder_config"]
        same(loaded, original)

    def test_our_file_loads_in_transformers(self, ours, theirs, values, tmp_path):
        original = ours(**values)
        original.save_pretrained(tmp_path / "new" / "folder")
        same(original, theirs.from_pretrained(str(tmp_path / "new" / "folder")))
        same(original, theirs(**original.to_dict()))

    def test_a_round_trip_through_transformers_keeps_all_values(self, ours, theirs, values, tmp_path):
        original = ours(**values)
        original.save_pretrained(tmp_path)
        theirs.from_pretrained(str(tmp_path)).save_pretrained(str(tmp_path))
        same(ours.from_pretrained(tmp_path), original)


# --- construction ----------------------------------------------------------------------------------------------------------------


def test_parts_may_be_dictionaries_objects_or_none():
    by_dict = GraniteSpeechConfig(**SMALL)
    kinds = {"text_config": GraniteConfig, "encoder_config": GraniteSpeechEncoderConfig, "projector_config": Blip2QFormerConfig}
    by_object = GraniteSpeechConfig(**SMALL | {name: kind(**SMALL[name]) for name, kind in kinds.items()})
    assert by_dict == by_object
    for name, kind in kinds.items():
        assert type(getattr(by_dict, name)) is kind
        assert getattr(GraniteSpeechConfig(), name) == kind()
    text = GraniteConfig(hidden_size=64)
    assert GraniteSpeechConfig(text_config=text).text_config is text


def test_arguments_are_not_modified():
    given = copy.deepcopy(PLUS | {"note": {"a": [1]}})
    before = copy.deepcopy(given)
    GraniteSpeechPlusConfig.from_dict(given).to_dict()
    assert given == before


def test_positional_arguments_are_those_of_transformers():
    assert (
        GraniteSpeechEncoderConfig(80, 3, 64).to_dict() == GraniteSpeechEncoderConfig(input_dim=80, num_layers=3, hidden_dim=64).to_dict()
    )
    with pytest.raises(TypeError, match="at most 12 positional"):
        GraniteSpeechEncoderConfig(*range(1, 14))


@pytest.mark.parametrize("alias, name", GraniteSpeechEncoderConfig.attribute_map.items())
def test_encoder_aliases(alias, name):
    config = GraniteSpeechEncoderConfig(**{alias: 24})
    assert getattr(config, name) == getattr(config, alias) == 24
    setattr(config, alias, 48)
    assert getattr(config, name) == 48 == transformers.GraniteSpeechEncoderConfig(**{alias: 48}).to_dict()[name]
    assert alias not in config.to_dict()


def test_audio_token_id_is_audio_token_index():
    config = GraniteSpeechConfig(audio_token_id=7)
    assert config.audio_token_index == config.audio_token_id == config.to_dict()["audio_token_index"] == 7
    config.audio_token_id = 8
    assert config.audio_token_index == 8


def test_derived_widths():
    assert GraniteSpeechEncoderConfig(hidden_dim=100, num_heads=3).dim_head == 33
    assert GraniteConfig(hidden_size=64, num_attention_heads=4).attention_head_dim == 16
    assert GraniteConfig(hidden_size=64, num_attention_heads=4, head_dim=32).attention_head_dim == 32
    assert GraniteConfig(num_attention_heads=8).num_key_value_heads == 8
    assert GraniteSpeechPlusConfig(**PLUS).encoder_config.output_width == 36


def test_equality_and_copies():
    config = GraniteSpeechConfig(**SMALL, note=1)
    for again in (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        GraniteSpeechConfig.from_dict(json.loads(config.to_json_string())),
    ):
        assert again == config and again is not config
    again.text_config.hidden_size = 32
    assert again != config
    assert GraniteSpeechEncoderConfig() != GraniteSpeechPlusEncoderConfig()
    with pytest.raises(TypeError):
        hash(config)


def test_validate_checks_later_changes():
    config = GraniteSpeechConfig(**SMALL)
    config.text_config.num_key_value_heads = 3
    with pytest.raises(ConfigError, match="num_key_value_heads = 3"):
        config.validate()
    config.text_config.num_key_value_heads, config.text_config.rope_parameters = 2, None
    with pytest.raises(ConfigError, match="rope_parameters"):
        config.validate()


# --- unknown keys ----------------------------------------------------------------------------------------------------------------

METHODS = ["to_dict", "from_dict", "validate", "save_pretrained", "attribute_map", "_extra", "_derive", "__class__", "output_width"]
ARGUMENTS = ["self", "cls", "args", "kwargs", ""]
UNKNOWN = {"note": {"nested": [1, None, "x"]}} | {name: number for number, name in enumerate(METHODS + ARGUMENTS)}


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keys_survive(name, tmp_path):
    cls = getattr(granite_speech, name)
    config = cls(**UNKNOWN)
    assert config.note == UNKNOWN["note"]
    for again in (config, cls.from_dict(config.to_dict()), cls(**config.to_dict()), copy.deepcopy(config)):
        assert {key: again.to_dict()[key] for key in UNKNOWN} == UNKNOWN
        again.validate()
    config.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert loaded == config and type(loaded) is cls
    assert {key: json.loads((tmp_path / "config.json").read_text())[key] for key in UNKNOWN} == UNKNOWN


def test_unknown_keys_of_the_parts_survive():
    config = GraniteSpeechConfig(**{part: dict(UNKNOWN) for part in PARTS})
    again = GraniteSpeechConfig.from_dict(config.to_dict())
    for part in PARTS:
        assert {key: getattr(again, part).to_dict()[key] for key in UNKNOWN} == UNKNOWN


def test_an_unknown_key_can_be_changed_and_a_missing_one_is_named():
    config = GraniteConfig(note=1)
    config.note = 2
    assert config.to_dict()["note"] == 2
    with pytest.raises(AttributeError, match="GraniteConfig has no attribute 'nothing'"):
        _ = config.nothing


# --- rotary parameters, 4.x and 5.x ----------------------------------------------------------------------------------------------


ROTARY = [  # keys of 4.x, and their equivalent in 5.x in addition to rope_type "default" and rope_theta 10,000
    ({}, {}),
    ({"rope_theta": 5e6}, {"rope_theta": 5e6}),
    ({"rope_theta": 5e6, "rope_scaling": None}, {"rope_theta": 5e6}),
    ({"rope_theta": 3e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "rope_theta": 3e4, "factor": 2.0}),
    ({"rope_theta": 3e4, "rope_scaling": {"rope_type": "linear", "factor": 4}}, {"rope_type": "linear", "rope_theta": 3e4, "factor": 4}),
    ({"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 4}}, {"rope_type": "linear", "factor": 4}),
]


@pytest.mark.parametrize("earlier, later", ROTARY)
def test_both_forms_of_rotary_parameters_mean_the_same(earlier, later):
    later = {"rope_type": "default", "rope_theta": 10000.0} | later
    config, same_again = GraniteConfig(**earlier), GraniteConfig(rope_parameters=later)
    names = ("rope_type", "rope_theta", "factor")
    for one in (config, same_again, GraniteConfig(**config.to_dict()), transformers.GraniteConfig(**copy.deepcopy(earlier))):
        assert {name: one.rope_parameters[name] for name in names if name in one.rope_parameters} == later
    assert config.rope_theta == later["rope_theta"]
    both = config.to_dict()
    assert both["rope_theta"] == later["rope_theta"], "4.x reads it there, and assumes 10,000 if it is missing"
    assert (both["rope_scaling"] or {}).get("factor") == later.get("factor")


# --- refused values --------------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
NO_SIZES = [0, -1, True, 1.5, "8", [8], {}, 1 << 41, 10**400, 10**5000]
NO_RATES = [1.0, -0.1, NAN, None, "0.1", True]
NO_NUMBERS = [INF, -INF, NAN, 10**400, None, "0.5", False]
NO_BOOLEANS = [None, 0, 1, "true", []]
BAD = {  # fields: values that each of them must refuse
    GraniteConfig: {
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads": [*NO_SIZES, None],
        "num_key_value_heads max_position_embeddings head_dim": NO_SIZES,
        "hidden_size": [4097],
        "num_key_value_heads": [5],
        "head_dim": [7],
        "hidden_act": ["sigmoid", None, ["silu"], 3],
        "use_cache tie_word_embeddings attention_bias mlp_bias": NO_BOOLEANS,
        "initializer_range rms_norm_eps": [*NO_NUMBERS, -1],
        "pad_token_id bos_token_id eos_token_id": [1.5, "<s>", True, {"id": 2}, [[2]], -2],
        "attention_dropout": NO_RATES,
        "embedding_multiplier residual_multiplier attention_multiplier logits_scaling": NO_NUMBERS,
        "logits_scaling": [0, -8],
        "rope_parameters": ["linear", [1], False, {"rope_theta": -1}, {"rope_theta": NAN}, {"partial_rotary_factor": 0.5}],
        "rope_scaling": [2.0, {"type": "linear"}, {"type": "linear", "factor": 0}],
        "rope_theta": ["10000", None],
    },
    GraniteSpeechEncoderConfig: {
        "input_dim num_layers hidden_dim feedforward_mult num_heads output_dim context_size max_pos_emb": [*NO_SIZES, None],
        "conv_kernel_size conv_expansion_factor": [*NO_SIZES, None],
        "dim_head": NO_SIZES,
        "context_size": [513],
        "dropout": NO_RATES,
    },
    GraniteSpeechPlusEncoderConfig: {"cat_hidden_layers": [5, "3", [10], [-1], [3, 3], [True], [[3]], {"3": 3}]},
    Blip2QFormerConfig: {
        "hidden_size num_hidden_layers num_attention_heads intermediate_size": [*NO_SIZES, None],
        "cross_attention_frequency encoder_hidden_size": [*NO_SIZES, None],
        "hidden_size": [769],
        "hidden_act": ["mish"],
        "hidden_dropout_prob attention_probs_dropout_prob": NO_RATES,
        "initializer_range layer_norm_eps": [*NO_NUMBERS, -1],
        "use_qformer_text_input": [True, *NO_BOOLEANS],
    },
    GraniteSpeechConfig: {
        "text_config encoder_config projector_config": [[1], "granite", 7, True, GraniteSpeechPlusEncoderConfig()],
        "downsample_rate window_size": [*NO_SIZES, None, 4],
        "audio_token_index": [-1, None, 1.0],
        "initializer_range": [INF],
        "has_lora_adapter tie_word_embeddings": NO_BOOLEANS,
    },
}
BAD_VALUES = [
    (cls, name, value) for cls, table in BAD.items() for names, values in table.items() for name in names.split() for value in values
]
# If a value only contradicts another, the error may name the other one.
PARTNERS = {
    "num_key_value_heads": "num_attention_heads",
    "window_size": "downsample_rate",
    "rope_theta": "rope_parameters",
    "rope_scaling": "rope_parameters",
}


@pytest.mark.parametrize(
    "cls, name, value", BAD_VALUES, ids=[f"{cls.__name__}-{name}-{number}" for number, (cls, name, _) in enumerate(BAD_VALUES)]
)
def test_bad_values_are_refused_by_name(cls, name, value):
    begin = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        cls(**{name: value})
    assert time.perf_counter() - begin < 0.5
    message = str(caught.value)
    assert f"{cls.__name__}.{name} = " in message or f"{cls.__name__}.{PARTNERS.get(name)} = " in message
    assert len(message) < 500 and caught.value.remedy


def test_the_table_of_bad_values_is_long():
    assert len(BAD_VALUES) >= 60


@pytest.mark.parametrize(
    "part, name", [("text_config", "vocab_size"), ("encoder_config", "num_layers"), ("projector_config", "hidden_size")]
)
def test_bad_values_of_parts_are_refused(part, name):
    with pytest.raises(ConfigError, match=f"Config.{name} = 0; expected an integer from 1"):
        GraniteSpeechConfig(**{part: {name: 0}})


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "llama3", "longrope", None, 3, ["linear"]])
def test_other_rotary_scalings_are_refused_by_name(kind):
    with pytest.raises(UnsupportedError, match="rope_type") as caught:
        GraniteConfig(rope_parameters={"rope_type": kind, "factor": 2.0})
    assert repr(kind) in str(caught.value)


def test_mismatched_widths_are_refused():
    values = SMALL | {"projector_config": SMALL["projector_config"] | {"encoder_hidden_size": 13}}
    with pytest.raises(ConfigError, match="encoder_hidden_size = 13; expected 12"):
        GraniteSpeechConfig(**values)
    with pytest.raises(ConfigError, match="encoder_hidden_size = 12; expected 36"):
        GraniteSpeechPlusConfig(**PLUS | {"projector_config": SMALL["projector_config"]})
    with pytest.raises(ConfigError, match="head_dim = 7; expected an even head width"):
        GraniteConfig(head_dim=7)


def test_wrong_model_types_are_refused():
    with pytest.raises(ConfigError, match="model_type 'llama' for GraniteConfig"):
        GraniteSpeechConfig(text_config={"model_type": "llama"})
    with pytest.raises(ConfigError, match="model_type 'granite_speech_plus' for GraniteSpeechConfig"):
        GraniteSpeechConfig(model_type="granite_speech_plus")
    assert GraniteSpeechPlusEncoderConfig(model_type="granite_speech_encoder").model_type == "granite_speech_plus_encoder"


FAMILIES = {name: "non-autoregressive" for name in ("granite_speech_nar", "nar", "granite_nar_speech")}
OTHERS = ["whisper", "GRANITE_SPEECH", "", ["granite_speech"], {"a": 1}, 7, True]


@pytest.mark.parametrize("model_type", [*FAMILIES, *OTHERS], ids=str)
@pytest.mark.parametrize("more", [{}, {"auto_map": {"AutoModel": "modeling.Model"}}], ids=["plain", "auto_map"])
def test_other_families_are_refused_by_name(model_type, more):
    with pytest.raises(UnsupportedError) as caught:
        config_from_dict({"model_type": model_type, **more})
    known = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    assert (known or repr(model_type)) in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    written(tmp_path, SMALL | {"model_type": "granite_speech", "auto_map": {"AutoConfig": "configuration.Config"}})
    with pytest.warns(UserWarning, match=r"auto_map.*is not run") as caught:
        config = GraniteSpeechConfig.from_pretrained(tmp_path)
    assert config == GraniteSpeechConfig(**SMALL) and len(caught) == 1
    assert "auto_map" not in config.to_dict()


def test_files_of_another_configuration_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="without model_type"):
        config_from_dict({})
    with pytest.raises(ConfigError, match=r"'granite_speech'; expected 'granite_speech_plus'\. Load it with GraniteSpeechConfig"):
        GraniteSpeechPlusConfig.from_pretrained(written(tmp_path, SMALL | {"model_type": "granite_speech"}))
    with pytest.raises(GraniteSpeechError):
        GraniteSpeechConfig.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "granite_speech", "window_size": 1' + "0" * 5000 + "}")
    with pytest.raises(GraniteSpeechError):
        GraniteSpeechConfig.from_pretrained(tmp_path)


# --- arbitrary values ------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-3, 70), st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), 1e308, 2**63, 0.5, 1 << 17]))
WORDS = st.one_of(
    st.text(max_size=5), st.sampled_from(["rope_type", "linear", "default", "granite", "granite_speech", "self", "model_type"])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=5,
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_arbitrary_values_build_or_are_refused(name, data):
    cls = getattr(granite_speech, name)
    more = ["rope_theta", "rope_scaling", "head_dim", "cat_hidden_layers", "model_type", *cls.attribute_map]
    known = [one.name for one in dataclasses.fields(cls)] + more
    values = data.draw(st.dictionaries(st.one_of(st.sampled_from(known), WORDS), JSON, max_size=3))
    for part in PARTS:
        if isinstance(values.get(part), dict):
            values[part] |= data.draw(st.dictionaries(st.sampled_from(["hidden_size", "num_layers", *more]), JSON, max_size=2))
    try:
        config = cls(**values)
    except GraniteSpeechError:
        return
    config.validate()
    assert cls.from_dict(config.to_dict()).to_dict().keys() == config.to_dict().keys()


@settings(max_examples=60, deadline=None)
@given(values=st.dictionaries(st.one_of(st.sampled_from(["model_type", "auto_map", *PARTS]), WORDS), JSON, max_size=4))
def test_arbitrary_files_are_read_or_refused(values):
    try:
        config_from_dict(values)
    except GraniteSpeechError as error:
        assert len(str(error)) < 600
