"""What a `Transcriber` accepts as model and processor: those of this package, and live ones of transformers, which is not imported.

A model of transformers has to be accelerated. `granite_speech.accelerate` then leaves an object on it, which gives a model of this package
that computes what the live one does now.
"""

from tempfile import TemporaryDirectory
from typing import Any

from granite_speech.errors import CheckpointError, InputError, UnsupportedError
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.model_ctc import GraniteSpeech5ForCTC

__all__ = ["ACCELERATION", "check_model", "is_accelerated", "own_processor", "running_model"]

# The attribute of an accelerated model, which peft's wrappers pass on. Its `transcribing()` returns the model to run.
ACCELERATION = "_granite_speech_acceleration"


def is_accelerated(model: Any) -> bool:
    return getattr(model, ACCELERATION, None) is not None


def running_model(model: Any) -> Any:
    """The model of this package to run: the given one, or one that follows an accelerated model and is now as that is.

    Raises:
        InputError: as `check_model`; also an accelerated model in training mode.
        UnsupportedError: as `check_model`; also an accelerated model with hooks, adapters other than plain LoRA, or quantized layers.
    """
    check_model(model)
    return getattr(model, ACCELERATION).transcribing() if is_accelerated(model) else model


def check_model(model: Any) -> None:
    """Refuse what is not a model of this package, nor an accelerated one of transformers. peft may have wrapped either.

    Raises:
        InputError: something else.
        UnsupportedError: a model of peft that adds tokens of its own to each prompt.
    """
    is_wrapped = type(model).__module__.startswith("peft.") and callable(getattr(model, "get_base_model", None))
    adapter = getattr(model, "active_peft_config", None) if is_wrapped else None
    if getattr(adapter, "is_prompt_learning", False):
        raise UnsupportedError(
            got=f"a {type(model).__name__} with an adapter of type {adapter.peft_type.value}",
            expected="adapters of layers, such as LoRA",
            remedy="Call its own generate",
        )
    inner = model.get_base_model() if is_wrapped else model
    inner = getattr(inner, "_orig_mod", inner)  # of torch.compile
    if is_accelerated(inner) or isinstance(inner, GraniteSpeechForConditionalGeneration | GraniteSpeech5ForCTC):
        return
    names = ("GraniteSpeechForConditionalGeneration", "GraniteSpeechPlusForConditionalGeneration", "GraniteSpeech5ForCTC")
    is_known = _is_of_transformers(inner, *names)
    raise InputError(
        got=f"a {_name(model)} that is not accelerated" if is_known else f"{_name(model)} in place of a model",
        expected="a GraniteSpeechForConditionalGeneration or GraniteSpeech5ForCTC, of this package or accelerated",
        remedy="Call granite_speech.accelerate(model) first" if is_known else "Use Transcriber.from_pretrained with a folder or hub id",
    )


def own_processor(processor: Any) -> GraniteSpeechProcessor | GraniteSpeech5Processor:
    """A processor of this package: the given one, or a new one with the files of one of transformers.

    Raises:
        InputError: something else, or files that this package cannot read.
    """
    if isinstance(processor, GraniteSpeechProcessor | GraniteSpeech5Processor):
        return processor
    kinds = (GraniteSpeechProcessor, GraniteSpeech5Processor)
    kind = next((one for one in kinds if _is_of_transformers(processor, one.__name__)), None)
    if kind is None:
        raise InputError(
            got=f"{_name(processor)} in place of a processor",
            expected="a GraniteSpeechProcessor or GraniteSpeech5Processor of this package or of transformers",
            remedy="Use AutoProcessor.from_pretrained or GraniteSpeechProcessor.from_pretrained with the checkpoint's folder or hub id",
        )
    with TemporaryDirectory(prefix="granite-speech-processor-") as folder:
        processor.save_pretrained(folder)
        try:
            own = kind.from_pretrained(folder)
        except (CheckpointError, UnsupportedError) as error:
            raise InputError(
                got=f"a processor of transformers that saves {error.got}",
                expected=error.expected,
                remedy=f"Use this package's {kind.__name__}.from_pretrained with the checkpoint's folder or hub id",
            ) from error
    own.tokenizer.name_or_path = processor.tokenizer.name_or_path  # not that of a folder that does not exist any more
    return own


def _is_of_transformers(one: Any, *names: str) -> bool:
    return any(kind.__module__.startswith("transformers.") and kind.__name__ in names for kind in type(one).__mro__)


def _name(one: Any) -> str:
    kind = type(one)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
