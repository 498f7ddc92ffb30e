"""A model of this package whose parameters are those of a live model of transformers.

The live model is the only source of truth. Before a part runs here, every module of it is looked at again: parameters that were
replaced, adapters of peft that were added, switched or merged, and training modes are taken over. What this package could not compute in
the same way is named, and the part then runs as transformers wrote it.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from granite_speech.config import GraniteSpeechConfig
from granite_speech.model import GraniteForCausalLM, GraniteSpeechForConditionalGeneration
from granite_speech.modules.activations import Activation
from granite_speech.modules.adapter import Lora, LoraLinear
from granite_speech.modules.conformer import GraniteSpeechConformerAttention, GraniteSpeechConformerDepthWiseConv1d
from granite_speech.modules.ctc_conformer import GraniteSpeech5EncoderAttention, GraniteSpeech5EncoderFeedForward
from granite_speech.modules.ctc_encoder import GraniteSpeech5Encoder
from granite_speech.modules.decoder_layers import GraniteAttention, GraniteDecoderLayer, GraniteRMSNorm
from granite_speech.modules.encoder import GraniteSpeechCTCEncoder
from granite_speech.modules.int8_weight import PointwiseConv1d
from granite_speech.modules.language_model import GraniteModel
from granite_speech.modules.projector import Blip2QFormerMultiHeadAttention, Blip2QFormerOutput, GraniteSpeechEncoderProjector
from granite_speech.modules.rotary import GraniteRotaryEmbedding
from granite_speech.modules.rows import Rows

__all__ = ["Follower", "NotFollowedError", "Replacement", "Twin", "check_code", "in_use", "is_known_code", "is_own", "usual_device"]

# Numbers that the live model has taken from its configuration, by class here.
_NUMBERS: dict[type, tuple[str, ...]] = {
    GraniteModel: ("embedding_multiplier",),
    GraniteDecoderLayer: ("residual_multiplier",),
    GraniteAttention: ("scaling",),
    GraniteRMSNorm: ("variance_epsilon",),
    GraniteSpeech5EncoderFeedForward: ("activation_dropout",),
    nn.LayerNorm: ("eps",),
    nn.BatchNorm1d: ("eps", "momentum"),
    nn.Dropout: ("p",),
}

_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")
# Numbers that both have from the configuration, and that must still be equal.
_EQUAL: dict[type, tuple[str, ...]] = {
    GraniteSpeechCTCEncoder: ("num_layers",),
    GraniteSpeechConformerAttention: ("num_heads", "dim_head", "context_size", "max_pos_emb"),
    GraniteSpeechConformerDepthWiseConv1d: ("padding",),
    GraniteSpeechEncoderProjector: ("window_size", "downsample_rate", "num_queries"),
    Blip2QFormerMultiHeadAttention: ("num_attention_heads",),
    GraniteAttention: ("head_dim", "layer_idx"),
    nn.Conv1d: _CONVOLUTION,
    PointwiseConv1d: _CONVOLUTION,
    nn.Embedding: ("max_norm",),
    nn.GLU: ("dim",),
}

# Classes of transformers that have another name than here.
_NAMES: dict[type, tuple[str, ...]] = {
    Blip2QFormerOutput: ("Blip2QFormerSelfOutput", "Blip2QFormerOutput"),
}

# Functions of transformers that compute the same attention.
_ATTENTION = frozenset([None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"])

# Rotary embeddings whose frequencies do not depend on the prompt.
_FIXED_FREQUENCIES = frozenset(["default", "linear", "llama3"])


class NotFollowedError(Exception):
    """Why a part of the live model cannot run here at the moment."""


class Replacement:
    """A method that takes the place of a module's own, on the instance.

    A copy of the module, or one that was pickled, has its own method back.

    Args:
        module: whose method is replaced.
        name: of the method.
        function: called with the module's own method, then the arguments of the call.
    """

    def __init__(self, module: nn.Module, name: str, function: Any):
        self.module, self.name, self._function = module, name, function
        self.__wrapped__ = self.own  # so that inspect.signature shows the method's own

    @property
    def own(self) -> Any:
        """The method of the module's class, which may be another one tomorrow."""
        return MethodType(getattr(type(self.module), self.name), self.module)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(self.own, *arguments, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.name)  # a copy of the module has nothing on its instance when this is called

    def undo(self) -> None:
        """Take the replacement off the module. Somebody who has kept it, or wrapped it, calls the module's own method from now on."""
        self._function = lambda own, *arguments, **options: own(*arguments, **options)
        if vars(self.module).get(self.name) is self:
            del vars(self.module)[self.name]


class _LayersDecide:
    """In transformers an adapter is on or off for a whole model, so the layers alone decide, not the rows."""

    def rows_with_audio(self, rows: Rows, cache: Any, is_audio: Tensor | None) -> list[bool]:
        return [True] * len(rows.segments.lengths)


class _TwinLanguageModel(_LayersDecide, GraniteForCausalLM):
    """The language model of a `Twin`."""


class Twin(_LayersDecide, GraniteSpeechForConditionalGeneration):
    """A model without parameters of its own; a `Follower` gives it those of another model.

    Args:
        config: of the other model.
    """

    adapts_embeddings = True

    def __init__(self, config: GraniteSpeechConfig):
        with torch.device("meta"):
            super().__init__(config)
            self.language_model = _TwinLanguageModel(self.config.text_config, tied=False)
        self.eval()


class Follower:
    """Makes modules of a twin compute what the live ones do.

    Args:
        pairs: for each part by name, the twin's module, and the live module that holds the live one with its name there, which
            may be another one tomorrow.
    """

    def __init__(self, pairs: dict[str, tuple[nn.Module, nn.Module, str]]):
        self._pairs = pairs

    def follow(self, part: str, called: nn.Module | None, adapters_on: bool = False) -> bool:
        """Take over everything that may have changed in a part.

        Args:
            part: its name.
            called: transformers' module if it is being called, so that hooks on it, not inside it, run anyway.
            adapters_on: use adapters that are switched off too.

        Returns:
            Whether a module of the part is in training mode and computes something else in it.

        Raises:
            NotFollowedError: something in the part that this package does not compute in the same way.
        """
        if every_module._has_any_global_hook():
            raise NotFollowedError("there is a hook on all modules")
        ours, owner, name = self._pairs[part]
        given = owner._modules[name]
        if called is not None and in_use(given) is not called:
            raise NotFollowedError(f"another {part} has taken its place")
        return _follow(ours, given, part, called is not None, adapters_on)


def _follow(ours: nn.Module, given: nn.Module, path: str, is_called: bool, adapters_on: bool) -> bool:
    """Take over a module and all modules inside it. Returns whether a mode of training changes what they compute."""
    theirs = in_use(given)
    if isinstance(ours, LoraLinear):
        theirs = _follow_adapters(ours, theirs, path, adapters_on)
    _check_kind(ours, theirs, path)
    if not is_called:
        check_code(theirs, path)
    own = ours.__dict__
    own["training"] = theirs.training
    if isinstance(ours, LoraLinear):
        own["training"] = any(one.dropout for one in ours.adapters.values())  # which alone depends on the mode
    trains = own["training"] and _has_two_modes(ours, theirs)
    for table in ("_parameters", "_buffers"):
        mine, tensors = own[table], theirs.__dict__[table]
        for name in mine:
            tensor = tensors.get(name)
            if tensor is None and mine[name] is not None:
                raise NotFollowedError(f"{path} has no {name}")
            if type(tensor) is not nn.Parameter and is_traceable_wrapper_subclass(tensor):
                raise NotFollowedError(f"{path}.{name} is a {type(tensor).__name__}")  # sharded or quantized
            mine[name] = tensor
    _follow_numbers(ours, theirs, path)
    mine = own["_modules"]
    if not isinstance(ours, LoraLinear):  # whose children are adapters
        for name, child in mine.items():
            if child is not None and theirs._modules.get(name) is None:
                raise NotFollowedError(f"{path} has no {name}")
    for name, child in theirs._modules.items():
        if child is None:
            continue
        if mine.get(name) is not None:
            trains |= _follow(mine[name], child, f"{path}.{name}", False, adapters_on)
        elif type(child) is nn.Dropout and hasattr(ours, "attention_dropout"):
            check_code(child, f"{path}.{name}")
            ours.attention_dropout = child.p
        else:
            raise NotFollowedError(f"{path}.{name} is a {type(child).__name__}")
    return trains


def _has_two_modes(ours: nn.Module, theirs: nn.Module) -> bool:
    """Whether a module computes something else in training mode."""
    if isinstance(ours, nn.BatchNorm1d | LoraLinear):
        return True
    return any(bool(getattr(theirs, name, 0.0)) for name in ("attention_dropout", "activation_dropout", "p"))


def _follow_numbers(ours: nn.Module, theirs: nn.Module, path: str) -> None:
    kind = type(ours)
    for name in _NUMBERS.get(kind, ()):
        ours.__dict__[name] = getattr(theirs, name)
    for name in _EQUAL.get(kind, ()):
        if getattr(theirs, name) != getattr(ours, name):
            raise NotFollowedError(f"{name} of {path} was changed")
    if kind is GraniteSpeechConformerAttention and theirs.scale != ours.dim_head**-0.5:
        raise NotFollowedError(f"scale of {path} was changed")
    if kind is GraniteSpeech5EncoderAttention:
        _follow_speech5_attention(ours, theirs, path)
    if kind is GraniteSpeech5Encoder and set(theirs.config.subsample_layers) != set(ours.config.subsample_layers):
        raise NotFollowedError(f"subsample_layers of {path} was changed")
    if kind is GraniteSpeech5Encoder and theirs.config.num_hidden_layers != len(ours.layers):
        raise NotFollowedError(f"num_hidden_layers of {path} was changed")
    if kind in (GraniteAttention, Blip2QFormerMultiHeadAttention):
        _check_attention(kind, theirs, path)
        ours.attention_dropout = getattr(theirs, "attention_dropout", 0.0)  # a module inside it, if it is not a number
    if kind is GraniteRotaryEmbedding:
        _follow_rotary(ours, theirs, path)


def _follow_speech5_attention(ours: GraniteSpeech5EncoderAttention, theirs: nn.Module, path: str) -> None:
    """Check the numbers that transformers reads from the configuration in each call, too."""
    heads = theirs.config.num_attention_heads
    given = {"num_attention_heads": heads, "head_dim": theirs.head_dim, "context_size": theirs.context_size, "scaling": theirs.scaling}
    expected = (ours.num_heads, ours.dim_head, ours.context_size, ours.dim_head**-0.5)
    for (name, value), usual in zip(given.items(), expected, strict=True):
        if value != usual:
            raise NotFollowedError(f"{name} of {path} was changed")
    if theirs.training and theirs.attention_dropout:
        raise NotFollowedError(f"{path} has attention_dropout in training mode")
    _check_attention(type(ours), theirs, path)
    ours.attention_dropout = theirs.attention_dropout


def _check_attention(kind: type, theirs: nn.Module, path: str) -> None:
    """Refuse attention that is not the usual one: transformers calls a function that the configuration names."""
    if getattr(theirs, "is_causal", kind is GraniteAttention) != (kind is GraniteAttention):
        raise NotFollowedError(f"is_causal of {path} was changed")
    name = getattr(theirs.config, "_attn_implementation", None)
    if name not in _ATTENTION:
        raise NotFollowedError(f"{path} computes attention with {name!r}")


def _check_kind(ours: nn.Module, theirs: nn.Module, path: str) -> None:
    """Refuse a module of another class than transformers makes at this place."""
    kind, own = type(theirs), type(ours)
    name = kind.__name__.replace("SpeechPlus", "Speech")
    if kind is own:
        is_known = True
    elif isinstance(ours, Activation):
        from transformers.activations import ACT2FN

        is_known = kind is type(ACT2FN[ours.name])
    elif isinstance(ours, LoraLinear):
        is_known = kind is nn.Linear
    elif isinstance(ours, PointwiseConv1d):
        is_known = kind is nn.Conv1d
    else:
        is_known = name in _NAMES.get(own, (own.__name__,)) and kind.__module__.startswith("transformers.models.")
    if not is_known:
        raise NotFollowedError(f"{path} is a {kind.__module__}.{kind.__qualname__}")
    if not is_known_code(kind.forward):
        raise NotFollowedError(f"the forward of {kind.__name__} was replaced")


def _follow_rotary(ours: GraniteRotaryEmbedding, theirs: nn.Module, path: str) -> None:
    if theirs.rope_type not in _FIXED_FREQUENCIES:
        raise NotFollowedError(f"{path} is of type {theirs.rope_type!r}")
    if theirs.attention_scaling != 1:
        raise NotFollowedError(f"{path} scales attention by {theirs.attention_scaling}")
    ours.use_frequencies(theirs.inv_freq)


def usual_device() -> AbstractContextManager:
    """A block in which new tensors are on the CPU unless they say otherwise: `torch.set_default_device` is for the live model."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@cache
def _is_pefts(kind: type) -> bool:
    return kind.__module__.startswith("peft.")


def in_use(module: nn.Module) -> nn.Module:
    """The module that runs; of peft's wrapper for modules_to_save, the one that it passes its input to."""
    if not _is_pefts(type(module)) or not hasattr(module, "modules_to_save"):
        return module
    active = module.active_adapters
    if module.disable_adapters or not active:
        return module.original_module
    return module.modules_to_save[active[0]]


def check_code(module: nn.Module, path: str) -> None:
    """Refuse a module with which somebody's own Python code runs."""
    own = module.__dict__
    if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        raise NotFollowedError(f"there is a hook on {path}")
    for hook in own["_forward_hooks"].values():
        # transformers' own, which do nothing unless a call asks for hidden states or attentions.
        if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
            raise NotFollowedError(f"there is a hook on {path}")
    if not is_own(module, "forward"):
        raise NotFollowedError(f"the forward of {path} was replaced")
    if own.get("gradient_checkpointing") and module.training:
        raise NotFollowedError(f"{path} uses gradient checkpointing")


@cache
def is_known_code(function: Any) -> bool:
    """Whether a function is of torch or transformers: where it was written, not its __module__, which functools.wraps copies."""
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] in ("torch", "transformers")


def is_own(module: nn.Module, name: str) -> bool:
    """Whether a method is that of the module's class, or a `Replacement` of it."""
    method = vars(module).get(name)
    if method is None or isinstance(method, Replacement):
        return method is None or method.module is module
    # A copy of an accelerated module has its class's method on the instance.
    return getattr(method, "__self__", None) is module and method.__func__ is getattr(type(module), name)


def _follow_adapters(ours: LoraLinear, layer: nn.Module, path: str, adapters_on: bool) -> nn.Module:
    """Make `ours` have the adapters that peft applies now, if the layer is one of peft's. Returns the linear layer in it."""
    if not _is_pefts(type(layer)):
        if ours.adapters:
            ours.adapters = {}
            ours.activate([])
        return layer
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if kind != "peft.tuners.lora.layer.Linear":
        raise NotFollowedError(f"{path} is a {kind}")
    check_code(layer, path)
    is_off = layer.disable_adapters and not adapters_on
    if layer.merged and is_off:
        raise NotFollowedError(f"{path} has a merged adapter that is switched off")
    applies = not layer.merged and not is_off
    names = [name for name in layer.active_adapters if name in layer.lora_A] if applies else []
    adapters = {name: _adapter(layer, name, path) for name in names}
    if adapters != ours.adapters:  # modules are equal only to themselves
        ours.adapters = adapters
        ours.activate(names)
    return layer.base_layer


def _adapter(layer: nn.Module, name: str, path: str) -> Lora:
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    plain = type(a) is type(b) is nn.Linear and a.bias is b.bias is None and not layer.use_dora.get(name)
    if not plain or name in getattr(layer, "lora_variant", {}) or getattr(layer, "fan_in_fan_out", False):
        raise NotFollowedError(f"the adapter {name!r} of {path} is not plain LoRA")
    for one in (a, b, dropout):
        check_code(one, f"{path}, adapter {name!r}")
    return Lora(a, b, layer.scaling[name], dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0)
