"""Padding of features that are already computed, as a collator does it: `GraniteSpeechFeatureExtractor.pad`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from granite_speech.errors import InputError
from granite_speech.inputs.padding import round_up
from granite_speech.inputs.text_options import UNLIMITED, padding_and_limit

__all__ = ["pad_features"]

_NAME = "input_features"


def pad_features(
    features: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    padding: bool | str,
    max_length: int | None,
    truncation: bool,
    pad_to_multiple_of: int | None,
    attention_mask: bool,
    *,
    left: bool,
    filler: float,
) -> tuple[dict[str, Any], str]:
    """input_features of several clips, each `(frames, …)`, with one number of frames. Other entries are collected.

    Args:
        features: one dictionary of lists, or a list of dictionaries.
        padding, max_length, truncation, pad_to_multiple_of: as in `GraniteSpeechFeatureExtractor.pad`.
        attention_mask: whether to add one.
        left: whether to pad on the left.
        filler: the padding's value.

    Returns:
        Arrays or lists of them, and the form of the input: "pt" or "np".

    Raises:
        InputError: no input_features, or no max_length where one is needed.
    """
    if isinstance(features, list | tuple) and features and all(isinstance(one, Mapping) and _NAME in one for one in features):
        features = {name: [one[name] for one in features] for name in features[0]}
    if not isinstance(features, Mapping) or _NAME not in features or not len(features[_NAME]):
        got = f"a dictionary of {sorted(features)}" if isinstance(features, Mapping) else f"a {type(features).__name__}"
        raise InputError(got=got, expected="input_features of at least one clip", remedy="Pass the feature extractor's results")
    is_tensor = isinstance(features[_NAME], torch.Tensor) or isinstance(features[_NAME][0], torch.Tensor)
    clips = [np.asarray(one.detach().cpu() if isinstance(one, torch.Tensor) else one) for one in features[_NAME]]
    padding, length = padding_and_limit(padding, max_length, UNLIMITED, cut=truncation)
    if max_length is None and (truncation or padding == "max_length"):
        raise InputError(got="truncation or padding to max_length without one", expected="max_length in frames", remedy="Pass max_length")
    if truncation:
        clips = [clip[: round_up(length, pad_to_multiple_of)] for clip in clips]
    target = 0 if padding is None else round_up(length if padding == "max_length" else max(map(len, clips)), pad_to_multiple_of)
    result = {**features, _NAME: [_padded(clip, target, left, filler) for clip in clips]}
    if attention_mask:
        result["attention_mask"] = [_padded(np.ones(len(clip), dtype=np.int32), target, left, 0) for clip in clips]
    if padding is not None or len({len(clip) for clip in clips}) == 1:
        result = {name: np.stack(value) if name in (_NAME, "attention_mask") and _fits(value) else value for name, value in result.items()}
    return result, "pt" if is_tensor else "np"


def _padded(clip: np.ndarray, target: int, left: bool, filler: float) -> np.ndarray:
    missing = max(0, target - len(clip))
    width = (missing, 0) if left else (0, missing)
    return np.pad(clip, [width, *[(0, 0)] * (clip.ndim - 1)], constant_values=filler)


def _fits(rows: Sequence[np.ndarray]) -> bool:
    return len({row.shape for row in rows}) == 1
