"""Small TurboCTC models of dissimilar shapes, made by transformers, and batches for them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from granite_speech.model_ctc import GraniteSpeech5ForCTC

__all__ = ["LENGTHS", "SPECS", "CTCSpec", "build_ours", "build_reference", "labels", "padded"]

LENGTHS = (61, 38, 1, 44)


@dataclass(frozen=True)
class CTCSpec:
    """One checkpoint: configuration values that differ from `_BASE`."""

    name: str
    encoder: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Keyword arguments of either package's configuration class."""
        encoder = _BASE | self.encoder
        return {"encoder_config": encoder, "vocab_size": encoder["vocab_size"]} | self.top


_BASE: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_mel_bins": 5,
    "context_size": 8,
    "max_position_embeddings": 11,
}

SPECS = (
    CTCSpec("two subsampling layers, as released"),
    CTCSpec(
        "none, no biases in the feed-forwards, gelu, two different heads",
        {
            "subsample_layers": [],
            "num_hidden_layers": 3,
            "attention_bias": False,
            "conv_kernel_size": 5,
            "context_size": 13,
            "max_position_embeddings": 13,
            "head_dim": 10,
            "conv_expansion_factor": 3,
            "hidden_act": "gelu",
        },
        {"tie_word_embeddings": False},
    ),
    CTCSpec(
        "one in the middle, kernel of one frame, one head, another blank, a sum of losses",
        {"subsample_layers": [1], "num_hidden_layers": 5, "conv_kernel_size": 1, "num_attention_heads": 1, "context_size": 7},
        {"pad_token_id": 4, "ctc_loss_reduction": "sum"},
    ),
    CTCSpec(
        "the first and the last, a kernel longer than most clips, one block for everything",
        {"subsample_layers": [0, 2], "num_hidden_layers": 3, "conv_kernel_size": 21, "context_size": 64, "max_position_embeddings": 70},
    ),
    CTCSpec("one layer, which halves, and no middle", {"subsample_layers": [0], "num_hidden_layers": 1, "conv_kernel_size": 3}),
)


def build_reference(spec: CTCSpec, *, seed: int = 0) -> torch.nn.Module:
    """transformers' model of that configuration with random weights and running statistics, in evaluation mode."""
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in spec.config().items()}
    model = transformers.GraniteSpeech5ForCTC(transformers.GraniteSpeech5CTCConfig(**values))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in [*model.named_parameters(), *model.named_buffers()]:
            if "running_var" in name:
                one.uniform_(0.5, 2.0, generator=rng)
            elif one.is_floating_point():
                one.normal_(std=1.5 / one.shape[-1] ** 0.5 if one.dim() > 1 else 0.2, generator=rng)
                one.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def build_ours(reference: torch.nn.Module, folder: Path, **options: Any) -> GraniteSpeech5ForCTC:
    """The same model of this package, by way of a folder."""
    reference.save_pretrained(folder)
    return GraniteSpeech5ForCTC.from_pretrained(folder, **options)


def padded(model: torch.nn.Module, lengths: tuple[int, ...] = LENGTHS, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """`input_features` with noise in the padding, and `attention_mask`."""
    width = 4 * model.config.encoder_config.num_mel_bins
    features = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(seed))
    return {"input_features": features, "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()}


def labels(model: torch.nn.Module) -> torch.Tensor:
    """For `LENGTHS`: repeats, both paddings, a clip without labels, and one with more labels than frames."""
    blank = model.config.pad_token_id
    return torch.tensor([[7, 7, 9, 2, 11], [3, 1, -100, -100, -100], [8, blank, blank, blank, blank], [blank] * 5])
