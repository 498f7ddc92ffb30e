"""Checkpoint folders of about 1 GB in float32 with random weights: parts of released models, in the released widths."""

from pathlib import Path
from typing import Any

import torch

from bench import shapes
from bench.turns import torch_dtype

__all__ = ["decoder", "load", "title", "whole", "write"]

_TINY_ENCODER = {"num_layers": 1, "hidden_dim": 64, "num_heads": 2, "output_dim": 16}
_TINY_PROJECTOR = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "encoder_hidden_size": 64}


def decoder(name: str, part: int) -> dict[str, Any]:
    """Configuration of a released language model with one in `part` of its layers and of its vocabulary, and next to no encoder."""
    return whole(name, part) | {"encoder_config": _TINY_ENCODER, "projector_config": _TINY_PROJECTOR}


def whole(name: str, part: int) -> dict[str, Any]:
    """Configuration of a released model with one in `part` of its layers and of its vocabulary, and one layer of its projector."""
    values = shapes.configuration(name)
    encoder, text = values["encoder_config"], values["text_config"]
    encoder["num_layers"] //= part
    values["projector_config"]["num_hidden_layers"] = 1
    text["num_hidden_layers"] //= part
    text["vocab_size"] //= part
    text["eos_token_id"] = None  # so that every answer is as long as it may be
    values["audio_token_index"] = text["vocab_size"] - 1
    return values


def title(name: str, part: int) -> str:
    """Of such a model in a table."""
    return f"1/{part} of the layers and tokens of {name}"


def write(folder: Path, configuration: dict[str, Any]) -> int:
    """Write a checkpoint in float32, as transformers does; returns the bytes of its weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GraniteSpeechConfig(**configuration, has_lora_adapter=False)
    model = transformers.GraniteSpeechForConditionalGeneration(config)
    model.save_pretrained(folder)
    return sum(4 * weight.numel() for weight in model.parameters())


def load(system: str, folder: Path) -> Any:
    """The model of a system of `bench.turns`, in evaluation mode."""
    owner, _, name = system.partition(" ")
    if owner == "ours":
        from granite_speech import GraniteSpeechForConditionalGeneration

        quantize = "int8" if name == "int8" else None
        return GraniteSpeechForConditionalGeneration.from_pretrained(folder, dtype=torch_dtype(system), quantize=quantize).eval()
    import transformers

    return transformers.GraniteSpeechForConditionalGeneration.from_pretrained(folder, dtype=torch_dtype(system)).eval()
