"""The released models, built on the meta device, have the parameter names and shapes of transformers."""

import pytest
import torch
import transformers

from bench.shapes import RELEASED, configuration
from granite_speech import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration, GraniteSpeechPlusConfig
from granite_speech.checkpoints.weight_names import canonical_keys


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_those_of_transformers(name):
    values = RELEASED[name]
    kind = "GraniteSpeechPlus" if "plus" in name else "GraniteSpeech"
    with torch.device("meta"):
        reference_config = getattr(transformers, f"{kind}Config")(**configuration(name))
        reference = getattr(transformers, f"{kind}ForConditionalGeneration")(reference_config)
        ours = GraniteSpeechForConditionalGeneration((GraniteSpeechPlusConfig if "plus" in name else GraniteSpeechConfig)(**values))
    theirs = reference.state_dict()
    names = canonical_keys(theirs)
    assert {key: tuple(one.shape) for key, one in ours.state_dict().items()} == {
        names[key]: tuple(one.shape) for key, one in theirs.items()
    }
    assert [tuple(one.shape) for one in ours.parameters()] == [tuple(one.shape) for one in reference.parameters()]
    assert all(one.is_meta for one in ours.parameters())
