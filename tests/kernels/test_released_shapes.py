"""The released models, built on the meta device, have the parameter names and shapes of transformers."""

import pytest
import torch
import transformers

from granite_speech import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration, GraniteSpeechPlusConfig
from granite_speech.checkpoints.weight_names import canonical_keys

_ENCODER = {"num_layers": 16}
_PROJECTOR = {"hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 4096}
_MULTIPLIERS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22}


def _text(hidden, heads, kv_heads, ffn, vocabulary, attention_multiplier, logits_scaling):
    return _MULTIPLIERS | {
        "hidden_size": hidden,
        "num_hidden_layers": 40,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "attention_multiplier": attention_multiplier,
        "logits_scaling": logits_scaling,
    }


def _model(encoder, text, tied, width=1024, index=100352):
    return {
        "encoder_config": _ENCODER | encoder,
        "projector_config": _PROJECTOR | {"encoder_hidden_size": width},
        "text_config": text,
        "tie_word_embeddings": tied,
        "audio_token_index": index,
    }


RELEASED = {
    "3.3-2b": _model({"output_dim": 256}, _text(2048, 32, 8, 8192, 49160, 1 / 64, 8.0), tied=True, index=49159),
    "3.3-8b": _model({"output_dim": 256}, _text(4096, 32, 8, 12800, 49160, 1 / 128, 16.0), tied=True, index=49159),
    "4.1-2b": _model({"output_dim": 348}, _text(2048, 16, 4, 4096, 100353, 1 / 128, 8.0), tied=False),
    "4.1-2b-plus": _model(
        {"output_dim": 348, "cat_hidden_layers": [3]}, _text(2048, 16, 4, 4096, 100353, 1 / 128, 8.0), tied=False, width=2048
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_those_of_transformers(name):
    values = RELEASED[name]
    kind = "GraniteSpeechPlus" if "plus" in name else "GraniteSpeech"
    with torch.device("meta"):
        reference_config = getattr(transformers, f"{kind}Config")(
            **{key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
        )
        reference = getattr(transformers, f"{kind}ForConditionalGeneration")(reference_config)
        ours = GraniteSpeechForConditionalGeneration((GraniteSpeechPlusConfig if "plus" in name else GraniteSpeechConfig)(**values))
    theirs = reference.state_dict()
    names = canonical_keys(theirs)
    assert {key: tuple(one.shape) for key, one in ours.state_dict().items()} == {
        names[key]: tuple(one.shape) for key, one in theirs.items()
    }
    assert [tuple(one.shape) for one in ours.parameters()] == [tuple(one.shape) for one in reference.parameters()]
    assert all(one.is_meta for one in ours.parameters())
