"""transformers' Trainer for the bundled checkpoint's model, whichever way a user came to the model."""

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from granite_speech import accelerate
from tests.support.speech_dataset import Collator, speech
from tests.support.two_libraries import library

__all__ = ["DOORS", "build", "keep_statistics", "losses", "make_trainer"]

DOORS = ("ours", "accelerated")
_ARGUMENTS = {Trainer: TrainingArguments, Seq2SeqTrainer: Seq2SeqTrainingArguments}


def build(door: str, *, adapter: bool = False) -> Any:
    """A model of the bundled checkpoint, all of which is trained.

    Args:
        door: "ours", "theirs" for transformers' class, or "accelerated" for that given to `accelerate`.
        adapter: keep the checkpoint's own adapter.
    """
    lib = library("granite_speech" if door == "ours" else "transformers")
    model = lib.new_model() if adapter else lib.new_bare_model()
    model.requires_grad_(True)
    if door != "ours":
        # transformers 5.17 does not say that its cache is no prediction, and `predict` then fails.
        model.config.keys_to_ignore_at_inference = ["past_key_values"]
    return accelerate(model) if door == "accelerated" else model


def keep_statistics(model: Any) -> Any:
    """Keep BatchNorm in evaluation mode. Otherwise the examples of a batch would influence each other."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval().train = lambda mode=True, module=module: module
    return model


def make_trainer(model: Any, folder: Path, *, kind: type = Trainer, **options: Any) -> Any:
    """A Trainer with batches of two clips of half a second, whose every step is logged.

    Args:
        folder: for checkpoints.
        kind: Trainer or Seq2SeqTrainer.
        options: of the Trainer or of its arguments.
    """
    objects = {name: options.pop(name) for name in list(options) if name in signature(Trainer).parameters}
    processor = library("granite_speech").processor
    rows = speech(4, samples=8000)
    data = {"train_dataset": rows, "eval_dataset": rows, "data_collator": Collator(processor, lengths=False)}
    defaults = {"max_steps": 2, "learning_rate": 1e-4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    defaults |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    arguments = _ARGUMENTS[kind](str(folder), **defaults | {"remove_unused_columns": False} | options)
    return kind(model=model, args=arguments, **{"processing_class": processor} | data | objects)


def losses(trainer: Any) -> list[float]:
    """The logged losses, one for each step."""
    return [one["loss"] for one in trainer.state.log_history if "loss" in one]
