"""The released models' shapes, and inputs of these shapes with random values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from granite_speech import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig

__all__ = ["AFTER", "BEFORE", "CLIP_SECONDS", "RELEASED", "build", "configuration", "default_dtype", "request"]

CLIP_SECONDS = 10
FRAMES_A_SECOND = 50
# Tokens of the text around the audio.
BEFORE, AFTER = 30, 15

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


# The arguments of GraniteSpeechConfig, here and in transformers.
RELEASED: dict[str, dict[str, Any]] = {
    "3.3-2b": _model({"output_dim": 256}, _text(2048, 32, 8, 8192, 49160, 1 / 64, 8.0), tied=True, index=49159),
    "3.3-8b": _model({"output_dim": 256}, _text(4096, 32, 8, 12800, 49160, 1 / 128, 16.0), tied=True, index=49159),
    "4.1-2b": _model({"output_dim": 348}, _text(2048, 16, 4, 4096, 100353, 1 / 128, 8.0), tied=False),
    "4.1-2b-plus": _model(
        {"output_dim": 348, "cat_hidden_layers": [3]}, _text(2048, 16, 4, 4096, 100353, 1 / 128, 8.0), tied=False, width=2048
    ),
}
# The released adapter's rank, alpha and layers.
_RANK, _ALPHA, _ADAPTED = 64, 32, ("q_proj", "v_proj")


def build(
    name: str, *, adapter: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16, layers: int | None = None
) -> GraniteSpeechForConditionalGeneration:
    """A model of a released shape, built on the device with random weights.

    Args:
        name: a key of RELEASED.
        adapter: attach one like the released 3.3 models'.
        device, dtype: of the weights.
        layers: blocks of the encoder and of the language model; None: the released numbers.
    """
    config = GraniteSpeechConfig(**configuration(name, layers))
    with default_dtype(dtype), device:
        model = GraniteSpeechForConditionalGeneration(config).eval()
        if adapter:
            blocks = [f"language_model.model.layers.{layer}.self_attn" for layer in range(config.text_config.num_hidden_layers)]
            adapted = [f"{block}.{projection}" for block in blocks for projection in _ADAPTED]
            attach_adapter(model, AdapterConfig.plain(_RANK, _ALPHA, list(_ADAPTED)), adapted)
    return model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this dtype, so that a model is never in memory in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def configuration(name: str, layers: int | None = None) -> dict[str, Any]:
    """A copy of RELEASED[name], with another number of layers if that is given."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in RELEASED[name].items()}
    if layers is not None:
        values["encoder_config"]["num_layers"] = values["text_config"]["num_hidden_layers"] = layers
    return values


def request(name: str, clips: int) -> dict[str, torch.Tensor]:
    """Inputs of `generate` on the CPU: prompts around random features of 10 s clips."""
    frames = CLIP_SECONDS * FRAMES_A_SECOND
    rng, index = torch.Generator().manual_seed(1), RELEASED[name]["audio_token_index"]
    highest = min(index, RELEASED[name]["text_config"]["vocab_size"])
    before, after = (torch.randint(0, highest, (clips, count), generator=rng) for count in (BEFORE, AFTER))
    audio = torch.full((clips, -(-frames // 15) * 3), index)
    ids = torch.cat((before, audio, after), dim=1)
    features = torch.randn(clips, frames, 160, generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": features}
