"""`accelerate`: a live model of transformers runs with this package's operations, and stays the same object.

Nothing of the model moves: modules, parameters, hooks and names are those that transformers made. On the instance of the encoder, the
projector and the language model's norms, or of the whole CTC model, `forward` is replaced, and on the model `generate`. They run here
whenever that gives what transformers' code would, and as transformers wrote them otherwise.
"""

from typing import Any, TypeVar

from torch import nn

from granite_speech.errors import InputError
from granite_speech.interop.acceleration import Acceleration, AccelerationWarning
from granite_speech.interop.ctc import CTCAcceleration
from granite_speech.interop.speech import SpeechAcceleration
from granite_speech.transcription.live_models import ACCELERATION

__all__ = ["AccelerationWarning", "accelerate", "acceleration_of", "restore"]

Model = TypeVar("Model", bound=nn.Module)

# transformers' classes, by the name of their file.
_FAMILIES: dict[str, tuple[str, type[Acceleration]]] = {
    "granite_speech": ("GraniteSpeechForConditionalGeneration", SpeechAcceleration),
    "granite_speech_plus": ("GraniteSpeechPlusForConditionalGeneration", SpeechAcceleration),
    "granite_speech5": ("GraniteSpeech5ForCTC", CTCAcceleration),
}


def accelerate(model: Model) -> Model:
    """Make a live model of transformers fast, in place.

        model = granite_speech.accelerate(model)

    Encoder, projector and the language model's norms run with this package's operations, in training too, and `generate` with its
    captured decode step where the options allow. What the model computes stays the same: a batch of clips of unequal lengths gives
    what transformers gives, padding included, and logits are divided by `logits_scaling` only if this version of transformers does so.
    Only dropout in training draws other numbers for the same seed.

    A `GraniteSpeech5ForCTC` runs packed. Its outputs are zero beyond a clip's end, where transformers' have values without meaning. While
    its BatchNorm is in training mode, a batch with padding runs as transformers wrote it, because the padding counts in its statistics.

    Anything that this package cannot compute in the same way runs as transformers wrote it: options of `generate` that it does
    not have, modules with hooks, adapters other than plain LoRA, quantized layers. If that makes a whole part slow, an
    `AccelerationWarning` gives the reason, once. Weights, adapters and modes may change at any time; they are looked at before each use.

    `Transcriber(accelerate(model), processor)` transcribes recordings of any length with it.

    As a context manager, `with accelerate(model): …`, it undoes itself at the end of the block.

    Args:
        model: a `GraniteSpeechForConditionalGeneration` or `GraniteSpeechPlusForConditionalGeneration` of transformers 4.56 to 5.23, a
            `GraniteSpeech5ForCTC` of 5.23, or a peft model around one.

    Returns:
        The same object. A copy of it, or one that was pickled, is not accelerated.

    Raises:
        InputError: another object.
        ConfigError: a configuration that this package cannot build a model from.
    """
    live, family = _live_model(model)
    acceleration = vars(live).get(ACCELERATION)
    if acceleration is None:
        acceleration = vars(live)[ACCELERATION] = family(live)
    acceleration.add(model)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, however often it was called. A model that is not accelerated stays as it is.

    Args:
        model: the model, or a peft model around it.

    Returns:
        The same object, as transformers made it.

    Raises:
        InputError: an object that `accelerate` refuses.
    """
    acceleration = acceleration_of(model)
    if acceleration is not None:
        acceleration.remove()
    return model


def acceleration_of(model: Any) -> Acceleration | None:
    """What `accelerate` put into a model; None if it is not accelerated."""
    return vars(_live_model(model)[0]).get(ACCELERATION)


def _live_model(model: Any) -> tuple[nn.Module, type[Acceleration]]:
    """transformers' model, which peft may have wrapped, and what accelerates its family."""
    is_wrapped = callable(getattr(model, "get_base_model", None)) and type(model).__module__.startswith("peft.")
    live = model.get_base_model() if is_wrapped else model
    kinds = {f"{one.__module__}.{one.__name__}" for one in type(live).__mro__}
    for file, (name, family) in _FAMILIES.items():
        if f"transformers.models.{file}.modeling_{file}.{name}" in kinds:
            return live, family
    is_ours = type(live).__module__.startswith("granite_speech.")
    raise InputError(
        got=f"a {type(model).__module__}.{type(model).__qualname__}",
        expected="transformers' GraniteSpeechForConditionalGeneration or GraniteSpeech5ForCTC, or a peft model around one",
        remedy="Use it as it is: a model of this package is fast already" if is_ours else "Pass what from_pretrained returns",
    )
