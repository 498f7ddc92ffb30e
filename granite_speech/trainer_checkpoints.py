"""Checkpoints of transformers' Trainer, for the models of this package.

The Trainer calls `save_pretrained` only of transformers' own models, and writes the bare state dict of others, which fails if the head
is tied. When it resumes, or goes back to its best checkpoint, it reads model.safetensors; it reads an adapter only if peft has wrapped
the model. Both gaps are closed in the Trainer's own module, once a Trainer is given a model of this package. Nothing here imports it.
"""

import sys
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Any

from granite_speech.adapters.tensors import from_folder
from granite_speech.errors import CheckpointError
from granite_speech.saving import Saving

__all__ = ["complete_trainer"]


def complete_trainer() -> None:
    """Let the Trainer save and load models of this package like its own. Without a Trainer, or the second time, this does nothing."""
    module = sys.modules.get("transformers.trainer")
    theirs = getattr(module, "PreTrainedModel", None)
    if theirs is None or isinstance(theirs, UnionType):
        return
    module.PreTrainedModel = theirs | Saving  # it asks for isinstance(model, PreTrainedModel)
    _complete_loading(module.Trainer)


def _complete_loading(trainer_class: Any) -> None:
    load, load_best = trainer_class._load_from_checkpoint, trainer_class._load_best_model

    @wraps(load)
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load(self, resume_from_checkpoint, model)
        _load_adapter(self.model, Path(resume_from_checkpoint))

    @wraps(load_best)
    def _load_best_model(self) -> None:
        load_best(self)
        _load_adapter(self.model, Path(self.state.best_model_checkpoint))

    trainer_class._load_from_checkpoint, trainer_class._load_best_model = _load_from_checkpoint, _load_best_model


def _load_adapter(model: Any, folder: Path) -> None:
    """Load a checkpoint's adapter into the one that the model has of its own, which was saved next to model.safetensors."""
    if not isinstance(model, Saving) or model.adapter_config is None:
        return
    _, tensors = from_folder(folder, {})
    if unknown := model.load_state_dict(tensors, strict=False).unexpected_keys:
        raise CheckpointError(
            got=f"an adapter in {str(folder)!r} with {', '.join(unknown[:3])}",
            expected="matrices of the model's active adapter",
            remedy="Activate the adapter that was trained, or resume from another checkpoint",
        )
