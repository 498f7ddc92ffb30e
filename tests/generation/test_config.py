"""`GenerationConfig`: built, changed, saved and loaded, alone and with a model."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers

from granite_speech import (
    CheckpointError,
    CheckpointNotFoundError,
    GenerationConfig,
    GraniteSpeechForConditionalGeneration,
    InputError,
)
from tests.support.small_models import small_model

IDS = torch.tensor([[3, 4, 5, 3, 4]])


@pytest.fixture
def model() -> GraniteSpeechForConditionalGeneration:
    return copy.deepcopy(small_model())


def test_a_model_without_a_file_has_the_token_ids_of_its_configuration(model):
    text = model.config.text_config
    assert model.generation_config is model.generation_config
    assert model.generation_config.eos_token_id == text.eos_token_id and model.generation_config._from_model_config
    assert model.generation_config.max_new_tokens is None


def test_it_is_changed_assigned_and_copied_with_the_model(model):
    model.generation_config.max_new_tokens = 3
    other = copy.deepcopy(model)
    other.generation_config.max_new_tokens = 4
    assert [one.generate(IDS, eos_token_id=[]).shape[1] for one in (model, other)] == [8, 9]
    for config in ({"max_new_tokens": 2}, transformers.GenerationConfig(max_new_tokens=2), GenerationConfig(max_new_tokens=2)):
        model.generation_config = config
        assert isinstance(model.generation_config, GenerationConfig) and model.generation_config == GenerationConfig(max_new_tokens=2)
        assert model.model.generation_config is model.generation_config
        assert model.generate(IDS).shape[1] == 7
    with pytest.raises(InputError, match="generation_config of type int"):
        model.generation_config = 3


def test_it_is_saved_and_loaded_with_the_model(model, tmp_path):
    model.generation_config.update(max_new_tokens=3, eos_token_id=[1, 2], temperature=0.5)
    model.generation_config.languages = ["en"]
    model.save_pretrained(tmp_path)
    loaded = [
        kind.from_pretrained(tmp_path).generation_config
        for kind in (GraniteSpeechForConditionalGeneration, transformers.GraniteSpeechForConditionalGeneration)
    ]
    assert loaded[0] == model.generation_config
    assert [one.eos_token_id for one in loaded] == [[1, 2]] * 2
    assert loaded[0].languages == ["en"]
    read = GenerationConfig.from_pretrained(tmp_path, max_new_tokens=5, eos_token_id=None)
    assert (read.max_new_tokens, read.eos_token_id, read.temperature) == (5, None, 0.5)


def test_values_that_json_does_not_have(tmp_path):
    config = GenerationConfig(
        sequence_bias={(1, 2): 3.0}, eos_token_id=torch.tensor([1]), pad_token_id=np.int64(3), suppress_tokens={4}, dtype=torch.bfloat16
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "sequence_bias": [[[1, 2], 3.0]],
        "eos_token_id": [1],
        "pad_token_id": 3,
        "suppress_tokens": [4],
        "dtype": "bfloat16",
    }
    again = GenerationConfig.from_pretrained(tmp_path)
    assert torch.equal(*(small_model().generate(IDS, one, max_new_tokens=5) for one in (config, again)))
    with pytest.raises(InputError, match="function"):
        GenerationConfig(callback=lambda: None).save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == again, "a failed save leaves the file"


def test_update_returns_what_it_did_not_set():
    config = GenerationConfig(top_k=3)
    assert config.update(top_k=4, nonsense=5) == {"nonsense": 5} and config.top_k == 4
    assert config.update(defaults_only=True, top_k=9, top_p=0.5) == {"top_k": 9} and (config.top_k, config.top_p) == (4, 0.5)
    assert config.update(allow_custom_entries=True, nonsense=5) == {} and config.nonsense == 5


def test_a_models_configuration_without_attributes_of_its_own(model):
    assert GenerationConfig.from_model_config(model.config.to_dict()) == GenerationConfig.from_model_config(model.config)
    assert not hasattr(GenerationConfig.from_model_config(model.config), "encoder_config")


def test_validation():
    GenerationConfig(max_new_tokens=3).validate(strict=True)
    with pytest.raises(InputError, match="num_return_sequences=3"):
        GenerationConfig(num_return_sequences=3).validate()
    with pytest.warns(UserWarning, match="temperature"):
        GenerationConfig(temperature=0.5).validate()
    with pytest.raises(InputError, match="temperature"):
        GenerationConfig(temperature=0.5).validate(strict=True)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True}, {"num_beams": 1}])
def test_the_method(options):
    assert GenerationConfig(**options).get_generation_mode() == transformers.GenerationConfig(**options).get_generation_mode()


def test_missing_files_and_bad_folders(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="generation_config"):
        GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError):
        GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="which is a file"):
        GenerationConfig().save_pretrained(tmp_path / "generation_config.json")


def test_inputs_for_a_loop_of_ones_own(model):
    """The loop of transformers, with the model's own arguments for each step, gives the ids of `generate`."""
    expected = model.generate(IDS, max_new_tokens=4, eos_token_id=[])
    ids, cache = IDS, None
    with torch.no_grad():
        for step in range(4):
            inputs = model.prepare_inputs_for_generation(
                ids, None if step == 0 else 1, past_key_values=cache, is_first_iteration=step == 0, use_cache=True, labels=ids
            )
            output = model(**inputs)
            ids, cache = torch.cat((ids, output.logits[:, -1].argmax(-1, keepdim=True)), dim=1), output.past_key_values
    assert torch.equal(ids, expected)
    embeddings, features = torch.zeros(1, 5, 4), torch.zeros(1, 20, 160)
    first = model.prepare_inputs_for_generation(IDS, inputs_embeds=embeddings, is_first_iteration=True)
    assert first["input_ids"] is None and first["inputs_embeds"].shape == (1, 5, 4)
    assert "input_features" in model.prepare_inputs_for_generation(IDS, input_features=features, is_first_iteration=True)
    assert "input_features" not in model.prepare_inputs_for_generation(IDS, input_features=features)
