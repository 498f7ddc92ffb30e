"""Small, different checkpoints made by transformers and peft, whose results the parity tests compare with."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from safetensors.torch import save_file

from granite_speech.checkpoints.weight_names import canonical_keys, is_lora

__all__ = ["SPECS", "Spec", "build_reference", "clip_inputs", "features", "prompt", "scale_logits", "set_adapter", "write_released_layout"]

AUDIO_TOKEN = 119


@dataclass(frozen=True)
class Spec:
    """One checkpoint: configuration values that differ from `_BASE`, and its adapter."""

    name: str
    encoder: dict[str, Any] = field(default_factory=dict)
    projector: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None

    @property
    def is_plus(self) -> bool:
        return "cat_hidden_layers" in self.encoder

    def config(self) -> dict[str, Any]:
        """Keyword arguments of either package's configuration class."""
        encoder = _BASE["encoder"] | self.encoder
        width = encoder["hidden_dim"] * (1 + len(encoder.get("cat_hidden_layers") or ()))
        return {
            "encoder_config": encoder,
            "projector_config": _BASE["projector"] | {"encoder_hidden_size": width} | self.projector,
            "text_config": _BASE["text"] | self.text,
            "audio_token_index": AUDIO_TOKEN,
            "has_lora_adapter": self.lora is not None,
        } | self.top

    def audio_tokens(self, frames: int) -> int:
        window, rate = self.top.get("window_size", 15), self.top.get("downsample_rate", 5)
        return -(-frames // window) * (window // rate)


_BASE: dict[str, dict[str, Any]] = {
    "encoder": {"num_layers": 4, "hidden_dim": 32, "num_heads": 2, "output_dim": 12, "context_size": 20, "max_pos_emb": 24},
    "projector": {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40},
    "text": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 120,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 1 / 12,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "eos_token_id": 118,
        "pad_token_id": 117,
    },
}

SPECS = (
    Spec(
        "odd layers, even kernel, a context of 13",
        encoder={"num_layers": 5, "context_size": 13, "conv_kernel_size": 4, "dim_head": 10, "conv_expansion_factor": 3},
        projector={"num_hidden_layers": 3},
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ),
    Spec(
        "one KV head, untied, biases, adapters on other projections",
        encoder={"conv_kernel_size": 31, "context_size": 24, "max_pos_emb": 24, "feedforward_mult": 2},
        projector={"cross_attention_frequency": 1, "hidden_act": "gelu_new"},
        text={"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3, "rope_theta": 500.0},
        top={"tie_word_embeddings": False, "window_size": 6, "downsample_rate": 3},
        lora={
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["k_proj", "o_proj", "gate_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.k_proj": 7},
            "alpha_pattern": {"down_proj": 11},
        },
    ),
    Spec(
        "one encoder layer, head_dim, an adapter whose suffix also names the encoder's feed-forwards",
        encoder={"num_layers": 1, "conv_kernel_size": 1, "context_size": 7, "max_pos_emb": 9, "num_heads": 4},
        projector={"num_hidden_layers": 1, "num_attention_heads": 2},
        text={"head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_act": "gelu"},
        top={"window_size": 4, "downsample_rate": 1},
        lora={"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["up_proj"]},
    ),
    Spec(
        "plus: earlier layers and the last, the middle one included",
        encoder={"num_layers": 4, "cat_hidden_layers": [3, 0, 2], "conv_kernel_size": 8},
        projector={"cross_attention_frequency": 2, "num_hidden_layers": 4},
        top={"tie_word_embeddings": False},
    ),
    Spec(
        "one window for everything, linear rotary scaling, no adapter",
        encoder={"num_layers": 3, "num_heads": 1, "context_size": 50, "max_pos_emb": 50},
        projector={"cross_attention_frequency": 3, "num_hidden_layers": 4},
        text={"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, "num_key_value_heads": 4},
        top={"window_size": 45, "downsample_rate": 9},
    ),
)


def build_reference(spec: Spec, *, seed: int = 0) -> torch.nn.Module:
    """transformers' model of that configuration with random weights, running statistics and adapter, in evaluation mode."""
    kind = "GraniteSpeechPlus" if spec.is_plus else "GraniteSpeech"
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in spec.config().items()}
    config = getattr(transformers, f"{kind}Config")(**values)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    if spec.lora is not None:
        model.add_adapter(LoraConfig(**spec.lora))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in [*model.named_parameters(), *model.named_buffers()]:
            if "running_var" in name:
                one.uniform_(0.5, 2.0, generator=rng)
            elif one.is_floating_point() and "inv_freq" not in name:
                spread = 0.5 if "embed_tokens" in name or "lm_head" in name else 1.5 / one.shape[-1] ** 0.5 if one.dim() > 1 else 0.2
                one.normal_(std=spread, generator=rng)
                one.add_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def scale_logits(model: torch.nn.Module) -> None:
    """Divide the reference's logits by `logits_scaling`, as in training.

    transformers does so up to 5.9. From 5.10 on `GraniteSpeechForConditionalGeneration` has its own head and omits the division,
    which `GraniteForCausalLM` keeps.
    """
    if not hasattr(model, "lm_head"):
        return
    scaling = model.config.text_config.logits_scaling
    model.lm_head.register_forward_hook(lambda module, arguments, output: output / scaling)


def set_adapter(model: torch.nn.Module, on: bool) -> None:
    """Switch the adapter of the whole reference model on or off."""
    if getattr(model, "_hf_peft_config_loaded", False):
        model.enable_adapters() if on else model.disable_adapters()


def write_released_layout(model: torch.nn.Module, folder: Path) -> Path:
    """Write the reference in the layout of the released folders: plain base weights, and the adapter in two separate files."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = canonical_keys(state)
    tensors = {names[key]: tensor for key, tensor in state.items() if key in names}
    if model.lm_head.weight is model.model.language_model.embed_tokens.weight:
        del tensors["language_model.lm_head.weight"]
    lora = {name: tensors.pop(name) for name in list(tensors) if is_lora(name)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    if lora:
        save_file({f"base_model.model.{name}": tensor for name, tensor in lora.items()}, folder / "adapter_model.safetensors")
        config = next(iter(model.peft_config.values())).to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        (folder / "adapter_config.json").write_text(json.dumps(plain, default=str))
    return folder


def features(frames: int, *, seed: int = 1) -> torch.Tensor:
    """`(1, frames, 160)` random features of one clip."""
    return torch.randn(1, frames, 160, generator=torch.Generator().manual_seed(seed))


def prompt(audio_tokens: int, *, before: int = 4, after: int = 5, seed: int = 2) -> torch.Tensor:
    """`(1, tokens)`: random text around one clip's audio tokens."""
    text = torch.randint(0, 117, (1, before + after), generator=torch.Generator().manual_seed(seed))
    return torch.cat((text[:, :before], torch.full((1, audio_tokens), AUDIO_TOKEN), text[:, before:]), dim=1)


def clip_inputs(spec: Spec, frames: int, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of `forward` for one prompt with one clip."""
    return {"input_ids": prompt(spec.audio_tokens(frames), seed=seed + 100), "input_features": features(frames, seed=seed)}
