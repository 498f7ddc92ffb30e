"""`accelerate`: a live model of transformers runs with this package's operations, and stays the same object.

Nothing of the model moves: modules, parameters, hooks and names are those that transformers made. On the instance of the encoder, the
projector and the language model's norms, `forward` is replaced, and on the model `generate`. They run here whenever that gives what
transformers' code would, and as transformers wrote them otherwise.
"""

import inspect
import warnings
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Self, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from granite_speech.checkpoints.weight_names import EMBEDDING, HEAD, canonical_keys
from granite_speech.config import GraniteSpeechConfig
from granite_speech.config_files import config_from_dict
from granite_speech.errors import InputError
from granite_speech.interop.follow import (
    Follower,
    NotFollowedError,
    Replacement,
    Twin,
    check_code,
    in_use,
    is_known_code,
    is_own,
    usual_device,
)
from granite_speech.interop.generate import generated
from granite_speech.interop.transcribe import TranscriptionTwin
from granite_speech.modules.decoder_layers import GraniteRMSNorm
from granite_speech.modules.packing import Segments
from granite_speech.transcription.live_models import ACCELERATION

__all__ = ["AccelerationWarning", "accelerate", "acceleration_of", "restore"]

Model = TypeVar("Model", bound=nn.Module)


class AccelerationWarning(UserWarning):
    """A part of an accelerated model runs as transformers wrote it, and why."""


def accelerate(model: Model) -> Model:
    """Make a live model of transformers fast, in place.

        model = granite_speech.accelerate(model)

    Encoder, projector and the language model's norms run with this package's operations, in training too, and `generate` with its
    captured decode step where the options allow. What the model computes stays the same: a batch of clips of unequal lengths gives
    what transformers gives, padding included, and logits are divided by `logits_scaling` only if this version of transformers does so.
    Only dropout in training draws other numbers for the same seed.

    Anything that this package cannot compute in the same way runs as transformers wrote it: options of `generate` that it does
    not have, modules with hooks, adapters other than plain LoRA, quantized layers. If that makes a whole part slow, an
    `AccelerationWarning` gives the reason, once. Weights, adapters and modes may change at any time; they are looked at before each use.

    `Transcriber(accelerate(model), processor)` transcribes recordings of any length with it.

    As a context manager, `with accelerate(model): …`, it undoes itself at the end of the block.

    Args:
        model: a `GraniteSpeechForConditionalGeneration` or `GraniteSpeechPlusForConditionalGeneration` of transformers 4.56 to 5.23, or a
            peft model around one.

    Returns:
        The same object. A copy of it, or one that was pickled, is not accelerated.

    Raises:
        InputError: another object.
        ConfigError: a configuration that this package cannot build a model from.
    """
    acceleration = acceleration_of(model)
    if acceleration is None:
        live = _speech_model(model)
        acceleration = vars(live)[ACCELERATION] = Acceleration(live)
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


def acceleration_of(model: Any) -> "Acceleration | None":
    """What `accelerate` put into a model; None if it is not accelerated."""
    return vars(_speech_model(model)).get(ACCELERATION)


def _speech_model(model: Any) -> nn.Module:
    """transformers' model, which peft may have wrapped."""
    is_wrapped = callable(getattr(model, "get_base_model", None)) and type(model).__module__.startswith("peft.")
    live = model.get_base_model() if is_wrapped else model
    kinds = {f"{one.__module__}.{one.__name__}" for one in type(live).__mro__}
    stems = [("granite_speech", "GraniteSpeech"), ("granite_speech_plus", "GraniteSpeechPlus")]
    if kinds.isdisjoint(f"transformers.models.{file}.modeling_{file}.{name}ForConditionalGeneration" for file, name in stems):
        is_ours = type(live).__module__.startswith("granite_speech.")
        remedy = "Use it as it is: a model of this package is fast already" if is_ours else "Pass what from_pretrained returns"
        raise InputError(
            got=f"a {type(model).__module__}.{type(model).__qualname__}",
            expected="transformers' GraniteSpeechForConditionalGeneration, or a peft model around one",
            remedy=remedy,
        )
    return live


class Acceleration:
    """What `accelerate` put into a model.

    Args:
        live: transformers' model.
    """

    def __init__(self, live: nn.Module):
        self.live, self._calls, self._warned = live, 0, set()
        self._roots: list[nn.Module] = []
        # Up to transformers 5.9, the model has a language model with a head; from 5.10 on, a model without, and a head.
        has_inner = isinstance(getattr(live, "model", None), nn.Module)
        speech, text = (live.model, live) if has_inner else (live, live.language_model)
        self.text, self._divides = text, any(map(_divides_logits, (live, text)))
        self._decoder = (speech, "language_model") if has_inner else (text, "model")
        self.whole = list({id(one): one for one in (live, speech, text)}.values())
        self.speech, self._replaced = speech, WeakSet[Replacement]()  # weak: a module that was taken out of the model can be freed
        self.twin, self._follower = self.new_twin()
        self._transcription = TranscriptionTwin()
        self._replace(in_use(speech.encoder), "forward", self._encode)
        self._replace(in_use(speech.projector), "forward", self._project)
        for module in speech.language_model.modules():
            if type(module).__name__ == "GraniteRMSNorm" and is_known_code(type(module).forward):
                self._replace(module, "forward", partial(_normalize, module))
        self._replace(live, "load_state_dict", self._load_state_dict)
        self._replace(live, "generate", partial(generated, self, live))
        if not has_inner:
            self._replace(text, "generate", partial(generated, self, text))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # in a copy of the model, whose methods are its own, also if peft's model around it was copied

    def _replace(self, module: nn.Module, name: str, function: Any) -> None:
        if name in vars(module) and not is_own(module, name):
            return  # somebody else's, which may do anything
        for one in (Replacement(module, name, function), Replacement(module, "_replicate_for_data_parallel", _replica)):
            vars(module)[one.name] = one
            self._replaced.add(one)

    def new_twin(self) -> tuple[Twin, Follower]:
        """A twin of the live model, and what makes it follow."""
        twin = Twin(_config_of(self.live))
        parts = {
            "encoder": (twin.encoder, self.speech, "encoder"),
            "projector": (twin.projector, self.speech, "projector"),
            "language_model": (twin.decoder, *self._decoder),
            "lm_head": (twin.lm_head, self.text, "lm_head"),
        }
        return twin, Follower(parts)

    def add(self, model: nn.Module) -> None:
        """Count one more call of `accelerate`, and let this object begin a with block."""
        self._calls += 1
        if not isinstance(model, _WithBlock):
            model.__class__ = _with_block(type(model))
            self._roots.append(model)

    def leave(self) -> None:
        """The end of a with block: an accelerated model that was given to `accelerate` again is accelerated still."""
        self._calls -= 1
        if self._calls == 0:
            self.remove()

    def remove(self) -> None:
        for one in list(self._replaced):
            one.undo()
        for model in self._roots:
            model.__class__ = _without_block(type(model))
        vars(self.live).pop(ACCELERATION, None)

    def runs(self, part: str, called: nn.Module | None = None) -> bool:
        """Whether a part can run here now. It then has the live parameters.

        Args:
            part: its name.
            called: transformers' module if it is being called: hooks on it run anyway, and it may be in training mode.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        try:
            trains = self._follower.follow(part, called)
            if trains and called is None:
                raise NotFollowedError(f"a module of the {part} is in training mode")
        except NotFollowedError as reason:
            self._warn(f"the {part}", str(reason))
            return False
        return True

    def encodes(self) -> bool:
        """Whether `generate` can run encoder and projector here."""
        return self.runs("encoder") and self.runs("projector")

    def generates(self) -> bool:
        """Whether `generate` can run the language model here."""
        try:
            for one in self.whole:
                check_code(one, type(one).__name__)
            for part in ("language_model", "lm_head"):
                if self._follower.follow(part, None):
                    raise NotFollowedError(f"a module of the {part} is in training mode")
        except NotFollowedError as reason:
            self._warn("generate", str(reason))
            return False
        self.twin.config.audio_token_index = self.speech.config.audio_token_index
        self.twin.config.text_config.vocab_size = self.twin.lm_head.weight.shape[0]  # captured prompts have room for as many logits
        self.twin.config.text_config.logits_scaling = self.text.config.logits_scaling if self._divides else 1.0
        return True

    def transcribing(self) -> Twin:
        """The model that a `Transcriber` runs, which is now as the live model is. See `TranscriptionTwin.follow`."""
        return self._transcription.follow(self)

    def _warn(self, what: str, reason: str) -> None:
        if (what, reason) not in self._warned:
            self._warned.add((what, reason))
            warnings.warn(f"accelerate: {what} runs as transformers wrote it, because {reason}.", AccelerationWarning, stacklevel=4)

    def _encode(self, own: Any, *arguments: Any, **options: Any) -> Any:
        encoder, x = own.__self__, arguments[0] if len(arguments) == 1 else None
        if not arguments and "hidden_states" in options:
            x = options["hidden_states"]
        config = encoder.config
        asked = options | {name: options.get(name, getattr(config, name, False)) for name in ("output_hidden_states", "output_attentions")}
        is_plain = all(value is None or value is False for name, value in asked.items() if name not in ("return_dict", "hidden_states"))
        if not (is_plain and _is_batch(x) and self.runs("encoder", encoder)):
            return own(*arguments, **options)
        if encoder.training:
            self.twin.runtime.clear()  # training needs the memory of pages and graphs
        with usual_device():
            clips = Segments.of_batch(x)
            states = clips.pad(self.twin.encoder.encode(clips.pack(x), clips), x.shape[1])
        if not _mentions(own, "BaseModelOutputWithPooling"):
            return states  # transformers 4
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        output = BaseModelOutputWithPooling(last_hidden_state=states)
        return output if options.get("return_dict", getattr(config, "return_dict", True)) is not False else output.to_tuple()

    def _project(self, own: Any, *arguments: Any, **options: Any) -> Tensor:
        x = arguments[0] if len(arguments) == 1 and not options else None
        return self.twin.projector(x) if _is_batch(x) and self.runs("projector", own.__self__) else own(*arguments, **options)

    def _load_state_dict(self, own: Any, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Accept the names of saved files too: Trainer loads a checkpoint by them when it resumes, and transformers skips them all."""
        if not isinstance(state_dict, Mapping):
            return own(state_dict, strict, assign)
        mine = self.live.state_dict()
        foreign = {name: tensor for name, tensor in state_dict.items() if name not in mine}
        if foreign:
            names, here = canonical_keys(foreign), {canonical: name for name, canonical in canonical_keys(mine).items()}
            state_dict = {here.get(names.get(name, name), name): tensor for name, tensor in state_dict.items()}
            if self.live.get_output_embeddings().weight is self.live.get_input_embeddings().weight:
                # A file has a tied weight under one of its names.
                tied = [here[name] for name in (EMBEDDING, HEAD)]
                state_dict |= dict.fromkeys(tied, next((state_dict[name] for name in tied if name in state_dict), mine[tied[0]]))
        return own(state_dict, strict, assign)


def _config_of(live: nn.Module) -> GraniteSpeechConfig:
    """The configuration without its rotary embedding, whose frequencies are taken from the live model."""
    values = live.config.to_dict()
    values["text_config"] = {
        name: value for name, value in values["text_config"].items() if name not in ("rope_parameters", "rope_scaling")
    }
    return config_from_dict(values)


def _normalize(norm: nn.Module, own: Any, hidden_states: Tensor) -> Tensor:
    return GraniteRMSNorm.forward(norm, hidden_states)


def _replica(own: Any) -> nn.Module:
    """What `nn.DataParallel` runs on another device: a module that shares the dictionary of this one, but has other weights."""
    replica = own()
    for name in [name for name, one in vars(replica).items() if isinstance(one, Replacement)]:
        del vars(replica)[name]
    return replica


def _is_batch(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 3 and x.numel() > 0


def _mentions(method: Any, name: str) -> bool:
    """Whether a method's code uses a name; decorators are looked through."""
    return name in inspect.unwrap(method).__code__.co_names


def _divides_logits(module: nn.Module) -> bool:
    return _mentions(type(module).forward, "logits_scaling")


class _WithBlock:
    """What the class of an accelerated model has in addition: the with statement looks for its methods on the class."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        acceleration = acceleration_of(self)
        if acceleration is not None:
            acceleration.leave()

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        state = {name: one for name, one in vars(self).items() if name != ACCELERATION and not isinstance(one, Replacement)}
        return object.__new__, (_without_block(type(self)),), state


def _without_block(kind: type) -> type:
    """The class of which `_with_block` made this one; itself if somebody has set another class since."""
    return kind.__bases__[1] if kind.__bases__[0] is _WithBlock else kind


@cache
def _with_block(kind: type) -> type:
    """A class that differs from `kind` only by `_WithBlock`, and has its name."""
    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (_WithBlock, kind), same)
