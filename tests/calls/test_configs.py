"""Configurations, as users write and change them, here and in transformers."""

import copy
import inspect
import json
import pickle
from dataclasses import fields

import pytest
import torch

import granite_speech
from granite_speech import AutoConfig, ConfigError, GraniteSpeechConfig, InputError
from tests.support.two_libraries import Call, comparison

SMALL = {
    "text_config": {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 50},
    "encoder_config": {"hidden_dim": 12, "num_layers": 4, "num_heads": 2},
    "projector_config": {"hidden_size": 24, "num_attention_heads": 3, "encoder_hidden_size": 12},
}
COMMON = ("architectures", "output_hidden_states", "output_attentions", "return_dict", "dtype", "chunk_size_feed_forward")
MORE = ("is_encoder_decoder", "id2label", "label2id", "problem_type", "num_labels", "name_or_path", "_name_or_path", "use_return_dict")


def small(lib, **values):
    return lib.GraniteSpeechConfig(**copy.deepcopy(SMALL), **values)


def bundled(lib, **options):
    return lib.GraniteSpeechConfig.from_pretrained(lib.folder, **options)


def changed(config, **values):
    for name, value in values.items():
        setattr(config, name, value)
    return config


def saved(lib, config):
    folder = lib.new_folder()
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    return written, type(config).from_pretrained(str(folder))


def parts(config):
    return config.text_config.hidden_size, config.encoder_config.hidden_dim, config.projector_config.hidden_size, config.window_size


def output(lib, kind=None, **attributes):
    """What `forward` returns after the configuration was changed; `text_config` is the language model's part."""
    model = lib.new_model()
    for name, value in attributes.items():
        part, _, attribute = name.rpartition("__")
        setattr(getattr(model.config, part) if part else model.config, attribute, value)
    return (model.model if kind == "headless" else model)(**lib.inputs)


def fields_of(result, *names):
    return [getattr(result, name) is not None for name in names]


def values(config):
    return {name: getattr(config, name) for name in COMMON + MORE}


CALLS = {
    # building
    "the defaults of the common attributes": Call(lambda lib: values(lib.GraniteSpeechConfig())),
    "the common attributes of a file": Call(lambda lib: values(lib.AutoConfig.from_pretrained(lib.folder))),
    "the common attributes of the parts": Call(lambda lib: [values(lib.GraniteConfig()), values(lib.GraniteSpeechEncoderConfig())]),
    "parts as dictionaries": Call(lambda lib: parts(small(lib, window_size=10))),
    "parts as objects": Call(
        lambda lib: parts(
            lib.GraniteSpeechConfig(
                text_config=lib.GraniteConfig(hidden_size=64),
                encoder_config=lib.GraniteSpeechEncoderConfig(hidden_dim=24),
                projector_config=lib.Blip2QFormerConfig(hidden_size=48, encoder_hidden_size=24),
            )
        )
    ),
    "labels": Call(lambda lib: (lambda c: (c.num_labels, c.id2label, c.label2id))(lib.GraniteConfig(num_labels=3))),
    "labels by number in text": Call(lambda lib: lib.GraniteConfig(id2label={"0": "a", "1": "b", "2": "c"}).id2label),
    "a dtype by name": Call(lambda lib: [small(lib, dtype="bfloat16").dtype, small(lib, torch_dtype="float16").torch_dtype]),
    "a dtype as such": Call(lambda lib: small(lib, dtype=torch.float16).to_dict()["dtype"]),
    "an unknown key": Call(lambda lib: [small(lib, note=[1, "x"]).note, small(lib, note=1).to_dict()["note"]]),
    "attention": Call(
        lambda lib: (lambda c: [c._attn_implementation, c.text_config._attn_implementation])(small(lib, attn_implementation="eager"))
    ),
    "no attention chosen": Call(lambda lib: lib.GraniteSpeechConfig()._attn_implementation),
    "by the name of the type": Call(lambda lib: parts(lib.AutoConfig.for_model("granite_speech", **copy.deepcopy(SMALL)))),
    "the type of a part": Call(lambda lib: lib.AutoConfig.for_model("granite", hidden_size=64).hidden_size),
    "names of other models": Call(
        lambda lib: (lambda c: [c.hidden_size, c.num_hidden_layers, c.num_mel_bins])(lib.GraniteSpeechEncoderConfig(num_layers=3))
    ),
    "what a trainer ignores": Call(lambda lib: lib.GraniteConfig().keys_to_ignore_at_inference),
    "what a trainer of the whole model ignores": Call(
        lambda lib: lib.GraniteSpeechConfig().keys_to_ignore_at_inference,
        differs="transformers ignores nothing, so that its Trainer.predict fails on the cache",
    ),
    # reading files
    "a folder": Call(lambda lib: parts(bundled(lib))),
    "a JSON file": Call(lambda lib: parts(lib.AutoConfig.from_pretrained(lib.folder + "/config.json"))),
    "the hub's options": Call(
        lambda lib: parts(bundled(lib, cache_dir=None, force_download=False, local_files_only=True, token=None, revision="main"))
    ),
    "remote code": Call(lambda lib: parts(lib.AutoConfig.from_pretrained(lib.folder, trust_remote_code=True, code_revision=None))),
    "a changed value": Call(lambda lib: bundled(lib, has_lora_adapter=False, window_size=10).to_dict()["window_size"]),
    "another name of a changed value": Call(lambda lib: bundled(lib, audio_token_id=7).audio_token_index),
    "a changed value of a part": Call(
        lambda lib: (lambda c: [c.attention_dropout, c.hidden_size])(bundled(lib, text_config={"attention_dropout": 0.1}).text_config)
    ),
    "a changed common value": Call(
        lambda lib: [bundled(lib, output_hidden_states=True).output_hidden_states, bundled(lib, dtype=torch.float16).dtype]
    ),
    "the unused options": Call(
        lambda lib: (lambda pair: [pair[0].window_size, pair[1]])(bundled(lib, foo=1, window_size=10, return_unused_kwargs=True))
    ),
    "an unknown option": Call(lambda lib: bundled(lib, windowsize=10), refused=InputError, differs="transformers ignores it silently"),
    "a part of a folder": Call(
        lambda lib: [
            lib.GraniteSpeechEncoderConfig.from_pretrained(lib.folder).hidden_dim,
            lib.GraniteConfig.from_pretrained(lib.folder).hidden_size,
            lib.Blip2QFormerConfig.from_pretrained(lib.folder).hidden_size,
        ]
    ),
    "the dictionary of a folder": Call(lambda lib: lib.GraniteSpeechConfig.get_config_dict(lib.folder)[0]),
    "a file by itself": Call(lambda lib: parts(lib.GraniteSpeechConfig.from_json_file(lib.folder + "/config.json"))),
    "a dictionary": Call(lambda lib: parts(lib.GraniteSpeechConfig.from_dict(bundled(lib).to_dict()))),
    "a dictionary and changes": Call(lambda lib: lib.GraniteSpeechConfig.from_dict(copy.deepcopy(SMALL), window_size=20).window_size),
    # changing
    "attributes only transformers uses": Call(
        lambda lib: (lambda c: [c.use_cache, c.pad_token_id, c._attn_implementation, c.to_dict()["pad_token_id"]])(
            changed(bundled(lib), use_cache=False, pad_token_id=5, _attn_implementation="eager")
        )
    ),
    "attributes of a part": Call(
        lambda lib: (lambda c: [c.pad_token_id, c.use_cache, c.note])(
            changed(bundled(lib).text_config, pad_token_id=5, use_cache=False, note=[1])
        )
    ),
    "a new dtype": Call(lambda lib: changed(bundled(lib), dtype=torch.bfloat16).to_dict()["dtype"]),
    "update": Call(lambda lib: (lambda c: (c.update({"window_size": 20, "note": 1}), c.window_size, c.note)[1:])(bundled(lib))),
    "update from a string": Call(
        lambda lib: (lambda c: (c.update_from_string("window_size=10,has_lora_adapter=false"), c.window_size, c.has_lora_adapter)[1:])(
            bundled(lib)
        )
    ),
    "the language model's part": Call(
        lambda lib: (lambda c: [c.get_text_config().hidden_size, c.get_text_config(decoder=True).hidden_size])(bundled(lib))
    ),
    "the language model's part of a part": Call(lambda lib: lib.GraniteConfig(hidden_size=64).get_text_config().hidden_size),
    "copies": Call(
        lambda lib: (lambda c: [copy.deepcopy(c) == c, pickle.loads(pickle.dumps(c)) == c, c == lib.GraniteSpeechConfig()])(small(lib))
    ),
    "is a name in it": Call(lambda lib: [name in small(lib, note=1) for name in ("window_size", "note", "architectures", "nothing")]),
    "attributes that are not there": Call(lambda lib: [hasattr(small(lib), name) for name in ("nothing", "hidden_size", "audio_token_id")]),
    "an attribute is removed": Call(lambda lib: (lambda c: (delattr(c, "note"), hasattr(c, "note"))[1])(small(lib, note=1))),
    # in a model
    "hidden states of the language model": Call(
        lambda lib: [one.shape for one in output(lib, text_config__output_hidden_states=True).hidden_states]
    ),
    "attentions of the language model": Call(
        lambda lib: output(lib, _attn_implementation="eager", text_config__output_attentions=True).attentions[0]
    ),
    "hidden states of the whole": Call(
        lambda lib: fields_of(output(lib, output_hidden_states=True), "hidden_states", "attentions", "past_key_values")
    ),
    "no cache of the language model": Call(lambda lib: fields_of(output(lib, text_config__use_cache=False), "past_key_values", "logits")),
    "a cache of the whole": Call(lambda lib: fields_of(output(lib, use_cache=False), "past_key_values", "logits")),
    "a tuple": Call(lambda lib: output(lib, "headless", return_dict=False)[0]),
    "a tuple of the whole": Call(
        lambda lib: isinstance(output(lib, return_dict=False), tuple), differs="transformers fails: its inner model returns a tuple too"
    ),
    # writing files
    "what is written": Call(lambda lib: saved(lib, changed(bundled(lib), note=1, architectures=["A"], dtype="float16"))[0]),
    "a saved configuration": Call(lambda lib: parts(saved(lib, small(lib, window_size=20))[1])),
    "a saved part": Call(lambda lib: saved(lib, lib.GraniteConfig(hidden_size=64, rope_theta=5e5))[0]["rope_parameters"]),
    "text": Call(lambda lib: json.loads(bundled(lib).to_json_string())),
    "text of every value": Call(lambda lib: json.loads(small(lib).to_json_string(use_diff=False))["return_dict"]),
    "a JSON file written": Call(
        lambda lib: (lambda path: (bundled(lib).to_json_file(path), json.loads(path.read_text())["window_size"])[1])(
            lib.new_folder() / "other.json"
        )
    ),
    "the difference from the defaults": Call(lambda lib: small(lib, problem_type="regression").to_diff_dict()),
    "printed": Call(lambda lib: str(small(lib)).partition("{")[0]),
}

test_configs = comparison(CALLS)


NAMES = [name for name in granite_speech.__all__ if name.endswith("Config") and not name.startswith(("Auto", "Generation"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_constructor_shows_its_parameters(name):
    cls = getattr(granite_speech, name)
    for callable_ in (cls, cls.__init__):
        shown = inspect.signature(callable_).parameters
        assert {"dtype", "output_hidden_states", "architectures"} <= shown.keys()
        assert all(shown[one.name].default == one.default for one in fields(cls))


def test_setting_a_part_to_a_dictionary_builds_it():
    config = GraniteSpeechConfig(**SMALL)
    config.text_config = {"hidden_size": 32, "num_attention_heads": 2}
    assert config.text_config.hidden_size == 32
    config.validate()


def test_values_set_later_are_saved(tmp_path):
    config = GraniteSpeechConfig(**SMALL)
    config.use_cache, config.text_config.note, config._attn_implementation = False, "x", "sdpa"
    config.save_pretrained(tmp_path)
    again = GraniteSpeechConfig.from_pretrained(tmp_path)
    assert again.use_cache is False and again.text_config.note == "x" and again == config
    assert "attn" not in (tmp_path / "config.json").read_text()


def test_a_rotary_base_can_be_changed_by_its_earlier_name():
    config = AutoConfig.from_pretrained("embedded", text_config={"rope_theta": 5e5})
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    config.text_config.rope_scaling = {"type": "linear", "factor": 2.0}
    assert config.text_config.rope_parameters == {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"windowsize": 8}, InputError, r"unknown option 'windowsize'.*Did you mean 'window_size'"),
        ({"attention_dropout": 0.1}, InputError, r"value of text_config; .*Pass text_config=\{'attention_dropout': 0\.1\}"),
        ({"window_size": 0}, ConfigError, "window_size = 0"),
        ({"text_config": {"hidden_size": 0}}, ConfigError, "hidden_size = 0"),
        ({"trust_remote_cod": True}, InputError, "Did you mean 'trust_remote_code'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        AutoConfig.from_pretrained("embedded", **options)


def test_bad_updates_are_refused():
    config = GraniteSpeechConfig(**SMALL)
    for text in ("nothing=1", "window_size=x", "has_lora_adapter=maybe", "text_config=1", "window_size"):
        with pytest.raises(InputError, match=r"expected name=value"):
            config.update_from_string(text)
    with pytest.raises(ConfigError, match="window_size = 7"):
        config.update({"window_size": 7})
    with pytest.raises(InputError, match="a list as a configuration"):
        GraniteSpeechConfig.from_dict([1])
