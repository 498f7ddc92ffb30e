"""Models of transformers for the tests of `accelerate`, and what they compute."""

import tempfile
from functools import cache
from typing import Any

import torch
import transformers

import granite_speech
from tests.support.reference_models import AUDIO_TOKEN, SPECS, Spec, features

__all__ = ["HAS_INNER_MODEL", "LIVE_SPECS", "batch", "bundled", "language_model", "speech"]

HAS_INNER_MODEL = int(transformers.__version__.partition(".")[0]) >= 5
# transformers 4.56 has no model of this kind.
LIVE_SPECS = [spec for spec in SPECS if HAS_INNER_MODEL or not spec.is_plus]


def speech(model: Any) -> Any:
    """The module that holds encoder and projector."""
    return model.model if HAS_INNER_MODEL else model


def language_model(model: Any) -> Any:
    """The language model without its head."""
    return model.model.language_model if HAS_INNER_MODEL else model.language_model.model


def batch(spec: Spec, *, frames: tuple[int, ...] = (61, 40, 12), seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of `forward` for clips of unequal lengths: features padded on the right, prompts on the left."""
    clips = [features(count, seed=seed + number)[0] for number, count in enumerate(frames)]
    counts = [spec.audio_tokens(count) for count in frames]
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.cat((torch.randint(0, 117, (4,), generator=rng), torch.full((one,), AUDIO_TOKEN))) for one in counts]
    rows = [torch.cat((row, torch.randint(0, 117, (3 + number,), generator=rng))) for number, row in enumerate(rows)]
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=117) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "input_features": torch.nn.utils.rnn.pad_sequence(clips, batch_first=True),
        "input_features_mask": torch.arange(max(counts)) < torch.tensor(counts)[:, None],
    }


@cache
def _bundled_folder() -> tempfile.TemporaryDirectory:
    """A saved copy: transformers 4 needs its path in the adapter's file."""
    folder = tempfile.TemporaryDirectory(prefix="bundled-")
    granite_speech.GraniteSpeechForConditionalGeneration.from_pretrained("embedded").save_pretrained(folder.name)
    return folder


def bundled(**options: Any) -> Any:
    """The bundled checkpoint in transformers."""
    return transformers.GraniteSpeechForConditionalGeneration.from_pretrained(_bundled_folder().name, **options).eval()
