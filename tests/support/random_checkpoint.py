"""A small checkpoint with random weights, an adapter and a tokenizer: every part of a real one, with meaningless answers.

python -m tests.support.random_checkpoint FOLDER
"""

import sys
from pathlib import Path

import torch

from granite_speech import GraniteSpeechConfig, GraniteSpeechFeatureExtractor, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from tests.support.small_tokenizer import write_tokenizer

__all__ = ["write_checkpoint"]


def write_checkpoint(folder: str | Path, *, seed: int = 0) -> GraniteSpeechForConditionalGeneration:
    """Write a whole checkpoint folder; the same seed writes the same bytes."""
    folder = Path(folder)
    vocab_size, audio_token_index = write_tokenizer(folder)
    tokenizer = GraniteSpeechTokenizer.from_folder(folder)
    config = GraniteSpeechConfig(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab_size,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 1 / 32,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        encoder_config={"num_layers": 4, "hidden_dim": 96, "num_heads": 4, "output_dim": 64},
        projector_config={
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "encoder_hidden_size": 96,
            "cross_attention_frequency": 1,
        },
        audio_token_index=audio_token_index,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = GraniteSpeechForConditionalGeneration(config)
    layers = range(config.text_config.num_hidden_layers)
    modules = [f"language_model.model.layers.{layer}.self_attn.{name}" for layer in layers for name in ("q_proj", "v_proj")]
    model.adapter_config = AdapterConfig.plain(8, 16, ["q_proj", "v_proj"])
    attach_adapter(model, model.adapter_config, modules)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that every part affects the logits, and different recordings give different answers.
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed_tokens" in name else 2.0 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    extractor = GraniteSpeechFeatureExtractor(projector_window_size=config.window_size, projector_downsample_rate=config.downsample_rate)
    GraniteSpeechProcessor(extractor, tokenizer).save_pretrained(folder)
    return model.eval()


if __name__ == "__main__":
    write_checkpoint(sys.argv[1])
