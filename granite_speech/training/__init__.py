"""Training: a general loop and its parts, and fine-tuning, which is built from them.

    from granite_speech.training import FinetuneOptions, finetune

    finetune("train.jsonl", "ibm-granite/granite-speech-3.3-2b", "tuned", FinetuneOptions(epochs=1), validation="held-out.jsonl")

The same parts build other recipes: `prepare` selects what trains, `SpeechData`, `CTCData` and `TextData` make packed batches,
`ctc_loss`, `ctc_head_loss`, `speech_loss` and `text_loss` compute a loss, and `Trainer` runs the loop. `augment` varies recordings. Names
are imported on first use, so the command line can read the options without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "augmentation": ("augment",),
    "batches": ("Batch", "BatchSource", "plan_batches"),
    "ctc_data": ("CTCData",),
    "data": ("SpeechData", "TextData"),
    "dialogue": ("Dialogue",),
    "evaluation": ("best_path_transcripts", "ctc_transcripts", "transcripts", "word_error_rate"),
    "finetuning": ("FinetuneReport", "finetune"),
    "losses": ("LossValue", "ctc_head_loss", "ctc_loss", "label_loss", "speech_loss", "text_loss"),
    "manifest": ("Utterance", "read_manifest"),
    "optimizer": ("ParameterGroup", "learning_rate", "parameter_groups"),
    "options": ("PARTS", "FinetuneOptions", "TrainerOptions"),
    "preparation": ("attach_fresh_adapter", "prepare"),
    "trainer": ("Trainer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:  # for type checkers and editors; at run time __getattr__ does this
    from granite_speech.training.augmentation import augment as augment
    from granite_speech.training.batches import Batch as Batch
    from granite_speech.training.batches import BatchSource as BatchSource
    from granite_speech.training.batches import plan_batches as plan_batches
    from granite_speech.training.ctc_data import CTCData as CTCData
    from granite_speech.training.data import SpeechData as SpeechData
    from granite_speech.training.data import TextData as TextData
    from granite_speech.training.dialogue import Dialogue as Dialogue
    from granite_speech.training.evaluation import best_path_transcripts as best_path_transcripts
    from granite_speech.training.evaluation import ctc_transcripts as ctc_transcripts
    from granite_speech.training.evaluation import transcripts as transcripts
    from granite_speech.training.evaluation import word_error_rate as word_error_rate
    from granite_speech.training.finetuning import FinetuneReport as FinetuneReport
    from granite_speech.training.finetuning import finetune as finetune
    from granite_speech.training.losses import LossValue as LossValue
    from granite_speech.training.losses import ctc_head_loss as ctc_head_loss
    from granite_speech.training.losses import ctc_loss as ctc_loss
    from granite_speech.training.losses import label_loss as label_loss
    from granite_speech.training.losses import speech_loss as speech_loss
    from granite_speech.training.losses import text_loss as text_loss
    from granite_speech.training.manifest import Utterance as Utterance
    from granite_speech.training.manifest import read_manifest as read_manifest
    from granite_speech.training.optimizer import ParameterGroup as ParameterGroup
    from granite_speech.training.optimizer import learning_rate as learning_rate
    from granite_speech.training.optimizer import parameter_groups as parameter_groups
    from granite_speech.training.options import PARTS as PARTS
    from granite_speech.training.options import FinetuneOptions as FinetuneOptions
    from granite_speech.training.options import TrainerOptions as TrainerOptions
    from granite_speech.training.preparation import attach_fresh_adapter as attach_fresh_adapter
    from granite_speech.training.preparation import prepare as prepare
    from granite_speech.training.trainer import Trainer as Trainer


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
