"""A small checkpoint with random weights, an adapter and a tokenizer: every part of a real one, with meaningless answers.

python -m tests.support.random_checkpoint FOLDER
"""

import sys
from pathlib import Path

import torch

from granite_speech import (
    GraniteSpeechConfig,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechPlusConfig,
    GraniteSpeechPlusForConditionalGeneration,
    GraniteSpeechProcessor,
)
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from tests.support.small_tokenizer import write_tokenizer

__all__ = ["PLUS_TEMPLATE", "write_checkpoint"]

# As that of plus: with roles, and an answer that may have a beginning.
PLUS_TEMPLATE = (
    "{% for one in messages %}<|start_of_role|>{{ one.role }}<|end_of_role|>{{ one.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{{ prefix_text or '' }}{% endif %}"
)


def write_checkpoint(folder: str | Path, *, seed: int = 0, is_plus: bool = False) -> GraniteSpeechForConditionalGeneration:
    """Write a whole checkpoint folder; the same seed writes the same bytes.

    Args:
        is_plus: with the type and the chat template of plus, and a context so short that answers end soon.
    """
    folder = Path(folder)
    vocab_size, audio_token_index = write_tokenizer(folder)
    tokenizer = GraniteSpeechTokenizer.from_folder(folder)
    plus = {"max_position_embeddings": 768} if is_plus else {}
    earlier = {"cat_hidden_layers": [1]} if is_plus else {}
    config = (GraniteSpeechPlusConfig if is_plus else GraniteSpeechConfig)(
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
            **plus,
        },
        encoder_config={"num_layers": 4, "hidden_dim": 96, "num_heads": 4, "output_dim": 64, **earlier},
        projector_config={
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "encoder_hidden_size": 96 * (1 + is_plus),
            "cross_attention_frequency": 1,
        },
        audio_token_index=audio_token_index,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = (GraniteSpeechPlusForConditionalGeneration if is_plus else GraniteSpeechForConditionalGeneration)(config)
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
    template = {"chat_template": PLUS_TEMPLATE} if is_plus else {}
    GraniteSpeechProcessor(extractor, tokenizer, **template).save_pretrained(folder)
    return model.eval()


if __name__ == "__main__":
    write_checkpoint(sys.argv[1])
