"""A model small enough for Triton's interpreter, with every part of a released one, and a batch of different rows for it."""

import torch

from granite_speech import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig

__all__ = ["LAYER_OPERATIONS", "attentive", "batch", "small_model"]

# The operations that modules call, and name in what they print.
LAYER_OPERATIONS = ("block_attention", "depthwise_conv", "lora_linear", "paged_attention")

AUDIO = 90


def small_model(seed: int = 0) -> GraniteSpeechForConditionalGeneration:
    """Float32, in evaluation mode, without dropout, with a non-zero adapter and random BatchNorm statistics."""
    config = GraniteSpeechConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 96,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 1 / 8,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "eos_token_id": 95,
            "pad_token_id": 94,
            "bos_token_id": 93,
        },
        encoder_config={
            "num_layers": 2,
            "hidden_dim": 32,
            "num_heads": 2,
            "dim_head": 16,
            "context_size": 20,
            "max_pos_emb": 24,
            "conv_kernel_size": 7,
            "output_dim": 16,
            "dropout": 0.0,
        },
        projector_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 1,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        audio_token_index=AUDIO,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = GraniteSpeechForConditionalGeneration(config)
    model.adapter_config = AdapterConfig.plain(4, 8, ["q_proj", "v_proj"])
    modules = [f"language_model.model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
    attach_adapter(model, model.adapter_config, modules)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed_tokens" in name else 1.5 / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def attentive(model: GraniteSpeechForConditionalGeneration) -> GraniteSpeechForConditionalGeneration:
    """The same model with layers whose output is as large as the embeddings. Otherwise its next token depends on the newest one
    almost alone, and wrong keys, positions or adapters rarely change it."""
    for layer in model.language_model.model.layers:
        layer.self_attn.o_proj.weight.mul_(30)
        layer.mlp.down_proj.weight.mul_(30)
    return model


def batch(model: GraniteSpeechForConditionalGeneration) -> dict[str, object]:
    """Three rows: clips of 50 and 23 frames, which end within a block, a window and a page, and one row without audio."""
    rng = torch.Generator().manual_seed(1)
    lengths = [50, 23]
    clips = torch.randn(2, 50, model.config.encoder_config.input_dim, generator=rng)
    counts = [model.model.projector.tokens(frames) for frames in lengths] + [0]
    rows = [torch.cat((text(3 + row, rng), torch.full((count,), AUDIO), text(5, rng))) for row, count in enumerate(counts)]
    width = max(map(len, rows))
    ids, mask = torch.full((3, width), 94), torch.zeros(3, width, dtype=torch.int64)
    for row, one in enumerate(rows):
        ids[row, width - len(one) :], mask[row, width - len(one) :] = one, 1
    return {"input_ids": ids, "attention_mask": mask, "input_features": clips, "input_features_lengths": lengths}


def text(tokens: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randint(0, AUDIO, (tokens,), generator=rng)
