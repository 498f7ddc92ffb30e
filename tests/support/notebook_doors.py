"""The ways in which a user runs a notebook that was written for transformers, each of which must give the same results.

@pytest.mark.parametrize("door", DOORS[1:])
def test_it(door):
    assert notebook(Door(door)) == notebook(Door("transformers"))
"""

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import granite_speech
from granite_speech import load_audio
from tests.support.paths import ROOT

__all__ = ["DOORS", "Door", "clip", "released_parts"]

DOORS = ("transformers", "import changed", "accelerated")


class Door:
    """A package whose classes a notebook imports, and what it does with a model after loading it.

    Args:
        name: one of DOORS.
    """

    def __init__(self, name: str):
        self.name = name
        self._package = importlib.import_module("granite_speech" if name == "import changed" else "transformers")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._package, name)

    def loaded(self, model: nn.Module) -> nn.Module:
        """The model, after the line that a user of this door adds to the notebook."""
        if self.name != "accelerated":
            return model
        same = granite_speech.accelerate(model)
        assert same is model
        return same


def clip(number: int) -> np.ndarray:
    """`(samples,)` float64 at 16 kHz, as soundfile and datasets return it: one of the recordings in tests/speech."""
    return load_audio(ROOT / f"tests/speech/{number:02}.flac").numpy().astype(np.float64)


def released_parts(model: nn.Module) -> Any:
    """What has the parts of a model as attributes, with the names of the released checkpoints, which the notebooks use.

    In transformers 5.10 and later they are attributes of `model.model`, and no part generates by itself. The notebooks do not run
    there as they are: the language model with its head is put together here from the same modules.
    """
    if hasattr(model, "encoder"):
        return model
    with torch.device("meta"):
        language_model = transformers.GraniteForCausalLM(model.config.text_config)
    language_model.model, language_model.lm_head = model.model.language_model, model.lm_head
    return SimpleNamespace(encoder=model.model.encoder, projector=model.model.projector, language_model=language_model.eval())
