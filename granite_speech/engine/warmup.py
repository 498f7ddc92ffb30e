"""Requests of a given size, for compiling and capturing what real ones will need."""

from typing import Any

import torch

from granite_speech.modules.prompts import ModelInputs

__all__ = ["FRAMES_A_SECOND", "silence"]

FRAMES_A_SECOND = 50


def silence(model: Any, rows: int, seconds: float, text_tokens: int) -> ModelInputs:
    """Prompts on the model's device, each with a clip of silence and this many tokens of text.

    The language model on its own gets the text alone.
    """
    if not hasattr(model, "encoder"):
        return ModelInputs(input_ids=torch.zeros(rows, text_tokens, dtype=torch.int64, device=model.device), use_cache=True)
    frames, config = max(1, round(seconds * FRAMES_A_SECOND)), model.config
    ids = torch.zeros(rows, text_tokens + model.projector.tokens(frames), dtype=torch.int64)
    ids[:, text_tokens // 2 : ids.shape[1] - (text_tokens - text_tokens // 2)] = config.audio_token_index
    return ModelInputs(
        input_ids=ids.to(model.device),
        input_features=torch.zeros(rows, frames, config.encoder_config.input_dim, dtype=model.dtype, device=model.device),
        input_features_lengths=[frames] * rows,
        use_cache=True,
    )
