"""Configurations under transformers' names, with its parameters and defaults, validated when they are built.

Sources: the transformers 4.56.2 page of Granite Speech; transformers 5.17 for what came later (`granite_speech_plus`,
`rope_parameters`, a top-level `tie_word_embeddings`, `dim_head` that follows from `hidden_dim`). A key that is not known
here is kept as an attribute and written back, so that a file survives a round trip; a known key with a value that no
model can be built from raises `ConfigError` before anything is allocated.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from granite_speech.errors import ConfigError, UnsupportedError

__all__ = [
    "Blip2QFormerConfig",
    "GraniteConfig",
    "GraniteSpeechConfig",
    "GraniteSpeechEncoderConfig",
    "GraniteSpeechPlusConfig",
    "GraniteSpeechPlusEncoderConfig",
    "config_from_dict",
]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh")


def _integer(low: int, high: int) -> Callable[[Any], str | None]:
    """A check that says what was expected, or None where the value is right. bool is no integer here."""

    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"an integer from {low} to {high}"

    return check


def _number(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        # Infinities and NaN fall outside any limits; math.isfinite would overflow on a very large integer.
        right = isinstance(value, int | float) and not isinstance(value, bool)
        right = right and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        return None if right else f"a finite number {'above' if open_low else 'from'} {low:g} {'below' if open_high else 'to'} {high:g}"

    return check


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _activation(value: Any) -> str | None:
    return None if value in ACTIVATIONS else f"one of {', '.join(ACTIVATIONS)}"


def _shown(value: Any) -> str:
    """A value as an error quotes it: cut short, and by its type where Python does not print it (integers of thousands of digits)."""
    try:
        return f"{value!r:.100}"
    except ValueError:
        return f"a very long {type(value).__name__}"


def _optional(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    return lambda value: None if value is None else check(value)


# Generous limits: several times what any released or announced model uses, and far below what exhausts a machine by accident.
_WIDTH, _LAYERS, _HEADS = _integer(1, 1 << 17), _integer(1, 1024), _integer(1, 1024)
_RATE = _number(0.0, 1.0, open_high=True)
_SCALAR, _POSITIVE = _number(-1e6, 1e6), _number(0.0, 1e6, open_low=True)
_VOCABULARY = _integer(1, 1 << 24)


def _checked(default: Any, check: Callable[[Any], str | None]) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(init=False, eq=False)
class _Config:
    """What the configurations share: keyword construction, checks, unknown keys, dictionaries and files."""

    model_type: ClassVar[str]
    earlier_model_types: ClassVar[tuple[str, ...]] = ()  # read, and never written
    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, /, *args: Any, **kwargs: Any):
        names = [one.name for one in fields(self)]
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__} takes at most {len(names)} positional values, got {len(args)}")
        given = dict(zip(names, args, strict=False)) | {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        model_type = given.pop("model_type", self.model_type)
        if model_type not in (self.model_type, *self.earlier_model_types):
            raise ConfigError(
                got=f"model_type {_shown(model_type)} for {type(self).__name__}",
                expected=f"{self.model_type!r}",
                remedy="Use the configuration class of that model type, or correct config.json",
            )
        for one in fields(self):
            setattr(self, one.name, given.pop(one.name, one.default))
        self._extra = given  # apart from the attributes, so that a key named like a method cannot take its place
        self._derive()
        self.validate()

    def _derive(self) -> None:
        """Fill values that follow from others."""

    def validate(self) -> None:
        """Raise ConfigError for the first value that no model can be built from."""
        for one in fields(self):
            check = one.metadata.get("check")
            expected = check(getattr(self, one.name)) if check else None
            if expected:
                self._refuse(one.name, expected)
        self._validate_together()

    def _validate_together(self) -> None:
        """Checks that look at several values."""

    def _refuse(self, name: str, expected: str, remedy: str = "") -> None:
        raise ConfigError(
            got=f"{type(self).__name__}.{name} = {_shown(getattr(self, name))}",
            expected=expected,
            remedy=remedy or f"Correct {name!r} in config.json or in the call",
        )

    def __getattr__(self, name: str) -> Any:
        # Called only for what is no attribute: another model's name for a field, or an unknown key.
        if name in type(self).attribute_map:
            return getattr(self, type(self).attribute_map[name])
        extra = self.__dict__.get("_extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_extra", {}):
            self._extra[name] = value
        else:
            object.__setattr__(self, type(self).attribute_map.get(name, name), value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values, unknown keys included."""
        values = {one.name: getattr(self, one.name) for one in fields(self)} | self._extra
        plain = {name: value.to_dict() if isinstance(value, _Config) else value for name, value in values.items()}
        return plain | {"model_type": self.model_type}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "_Config":
        """Build from the contents of a config.json."""
        return cls(**values)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> "_Config":
        """Read `config.json` of a folder or hub id.

        Args:
            name_or_path: a folder, or a hub id such as "ibm-granite/granite-speech-3.3-2b".
            hub: revision, cache_dir, local_files_only and token, as in `GraniteSpeechForConditionalGeneration.from_pretrained`.
        """
        from granite_speech.checkpoint import load_json, resolve

        config = config_from_dict(load_json(resolve(name_or_path, **hub) / "config.json"))
        if not isinstance(config, cls):
            raise ConfigError(
                got=f"a config.json of model_type {config.model_type!r}",
                expected=f"{cls.model_type!r}",
                remedy=f"Load it with {type(config).__name__}",
            )
        return config

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` into a folder, which is made if it is not there."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.to_json_string())


@dataclass(init=False, eq=False)
class GraniteSpeechEncoderConfig(_Config):
    """The conformer CTC encoder.

    Args:
        input_dim: features of a frame (two stacked log-mel frames of 80).
        num_layers: conformer blocks; after block `num_layers // 2` the CTC head's softmax is fed back.
        hidden_dim: width of the blocks.
        feedforward_mult: inner width of the feed-forwards, as a multiple of `hidden_dim`.
        num_heads: attention heads.
        dim_head: width of a head; `hidden_dim // num_heads` where None.
        output_dim: size of the CTC vocabulary.
        context_size: frames of an attention block.
        max_pos_emb: largest relative distance that has an embedding; at least `context_size`.
        dropout: of feed-forwards, attention output and convolution module, while training.
        conv_kernel_size: taps of the depthwise convolution.
        conv_expansion_factor: inner width of the convolution module, as a multiple of `hidden_dim`.
    """

    model_type: ClassVar[str] = "granite_speech_encoder"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_mel_bins": "input_dim",
    }

    input_dim: int = _checked(160, _WIDTH)
    num_layers: int = _checked(10, _LAYERS)
    hidden_dim: int = _checked(1024, _WIDTH)
    feedforward_mult: int = _checked(4, _integer(1, 64))
    num_heads: int = _checked(8, _HEADS)
    dim_head: int | None = _checked(None, _integer(1, 4096))
    output_dim: int = _checked(42, _VOCABULARY)
    context_size: int = _checked(200, _integer(1, 1 << 16))
    max_pos_emb: int = _checked(512, _integer(1, 1 << 20))
    dropout: float = _checked(0.1, _RATE)
    conv_kernel_size: int = _checked(15, _integer(1, 4096))
    conv_expansion_factor: int = _checked(2, _integer(1, 64))

    def _derive(self) -> None:
        if self.dim_head is None and _WIDTH(self.hidden_dim) is None and _HEADS(self.num_heads) is None:
            self.dim_head = self.hidden_dim // self.num_heads

    def _validate_together(self) -> None:
        if self.context_size > self.max_pos_emb:
            self._refuse("context_size", f"at most max_pos_emb = {self.max_pos_emb}, the largest distance that has an embedding")
        layers = getattr(self, "cat_hidden_layers", None)
        if layers is None:
            return
        inside = _integer(0, self.num_layers - 1)
        if not isinstance(layers, list | tuple) or any(inside(one) for one in layers) or len(set(layers)) != len(layers):
            self._refuse("cat_hidden_layers", f"a list of different layer numbers from 0 to {self.num_layers - 1}")

    @property
    def output_width(self) -> int:
        """Features of a frame that the projector sees."""
        return self.hidden_dim * (1 + len(getattr(self, "cat_hidden_layers", None) or ()))


@dataclass(init=False, eq=False)
class GraniteSpeechPlusEncoderConfig(GraniteSpeechEncoderConfig):
    """`GraniteSpeechEncoderConfig` and the layers whose outputs stand before the last one's in what the projector sees.

    Args:
        cat_hidden_layers: block numbers counted from 1; 0 is the input projection's output.
    """

    model_type: ClassVar[str] = "granite_speech_plus_encoder"
    earlier_model_types: ClassVar[tuple[str, ...]] = ("granite_speech_encoder",)

    cat_hidden_layers: list[int] | None = None


@dataclass(init=False, eq=False)
class Blip2QFormerConfig(_Config):
    """The projector's Q-Former: BERT layers over the queries, with cross-attention in every `cross_attention_frequency`-th.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps: of the layers.
        hidden_dropout_prob, attention_probs_dropout_prob: while training.
        cross_attention_frequency: layers 0, f, 2 f … look at the audio.
        encoder_hidden_size: width of the audio frames. At its default of 1408, which fits no speech encoder of this family, it is
            taken as not set: such a model can be built, as in transformers, and refuses audio.
        use_qformer_text_input: text in the Q-Former is no part of Granite Speech; True is refused.
        vocab_size, max_position_embeddings, initializer_range, pad_token_id: carried along.
    """

    model_type: ClassVar[str] = "blip_2_qformer"
    ENCODER_HIDDEN_SIZE_NOT_SET: ClassVar[int] = 1408

    vocab_size: int = 30522
    hidden_size: int = _checked(768, _WIDTH)
    num_hidden_layers: int = _checked(12, _LAYERS)
    num_attention_heads: int = _checked(12, _HEADS)
    intermediate_size: int = _checked(3072, _integer(1, 1 << 20))
    hidden_act: str = _checked("gelu", _activation)
    hidden_dropout_prob: float = _checked(0.1, _RATE)
    attention_probs_dropout_prob: float = _checked(0.1, _RATE)
    max_position_embeddings: int = 512
    initializer_range: float = _checked(0.02, _number(0.0, 1e3))
    layer_norm_eps: float = _checked(1e-12, _number(0.0, 1.0, open_low=True))
    pad_token_id: int | None = 0
    cross_attention_frequency: int = _checked(2, _integer(1, 1024))
    encoder_hidden_size: int = _checked(1408, _integer(1, 1 << 20))
    use_qformer_text_input: bool = _checked(False, _boolean)

    def _validate_together(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            self._refuse("hidden_size", f"a multiple of num_attention_heads = {self.num_attention_heads}")
        if self.use_qformer_text_input:
            self._refuse(
                "use_qformer_text_input", "false", "Granite Speech's projector reads audio alone; a text Q-Former is another model"
            )


@dataclass(init=False, eq=False)
class GraniteConfig(_Config):
    """The Granite language model: Llama with four multipliers.

    Args:
        num_key_value_heads: `num_attention_heads` where None.
        head_dim: `hidden_size // num_attention_heads` where None.
        rope_parameters: {"rope_type": "default" or "linear", "rope_theta": base, "factor": for "linear"}; 4.x files have
            `rope_theta` and `rope_scaling` instead, which are taken over.
        embedding_multiplier: embeddings are multiplied by it.
        attention_multiplier: scale of the attention scores, in place of 1/sqrt(head_dim).
        residual_multiplier: every residual branch is multiplied by it.
        logits_scaling: logits are divided by it.
    """

    model_type: ClassVar[str] = "granite"

    vocab_size: int = _checked(32000, _VOCABULARY)
    hidden_size: int = _checked(4096, _WIDTH)
    intermediate_size: int = _checked(11008, _integer(1, 1 << 20))
    num_hidden_layers: int = _checked(32, _LAYERS)
    num_attention_heads: int = _checked(32, _HEADS)
    num_key_value_heads: int | None = _checked(None, _HEADS)
    hidden_act: str = _checked("silu", _activation)
    max_position_embeddings: int = _checked(2048, _integer(1, 1 << 40))
    initializer_range: float = _checked(0.02, _number(0.0, 1e3))
    rms_norm_eps: float = _checked(1e-6, _number(0.0, 1.0, open_low=True))
    use_cache: bool = _checked(True, _boolean)
    pad_token_id: int | None = _checked(None, _optional(_integer(-1, 1 << 40)))
    bos_token_id: int | None = _checked(1, _optional(_integer(-1, 1 << 40)))
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = _checked(False, _boolean)
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = _checked(False, _boolean)
    attention_dropout: float = _checked(0.0, _RATE)
    mlp_bias: bool = _checked(False, _boolean)
    embedding_multiplier: float = _checked(1.0, _SCALAR)
    logits_scaling: float = _checked(1.0, _POSITIVE)
    residual_multiplier: float = _checked(1.0, _SCALAR)
    attention_multiplier: float = _checked(1.0, _SCALAR)

    def __init__(self, /, *args: Any, **kwargs: Any):
        # 4.x files: rope_theta beside an optional rope_scaling. One form from here on: rope_parameters.
        theta = kwargs.pop("rope_theta", 10000.0)
        given = {name: kwargs.pop(name, None) for name in ("rope_parameters", "rope_scaling")}
        for name, value in given.items():
            if value is not None and not isinstance(value, dict):
                raise ConfigError(got=f"GraniteConfig.{name} = {_shown(value)}", expected="an object", remedy="Correct it in config.json")
        rope = dict(given["rope_parameters"] or given["rope_scaling"] or {})
        rope.setdefault("rope_type", rope.pop("type", None) or "default")
        rope.setdefault("rope_theta", theta)
        super().__init__(*args, rope_parameters=rope, **kwargs)

    def _derive(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def _validate_together(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            self._refuse("num_attention_heads", f"a multiple of num_key_value_heads = {self.num_key_value_heads}")
        given = getattr(self, "head_dim", None)
        if given is not None and _integer(2, 4096)(given):
            self._refuse("head_dim", "an even integer from 2 to 4096")
        if given is None and self.hidden_size % self.num_attention_heads:
            self._refuse("hidden_size", f"a multiple of num_attention_heads = {self.num_attention_heads}, or a head_dim")
        if self.attention_head_dim % 2:
            name = "hidden_size" if given is None else "head_dim"
            self._refuse(name, f"an even width for a head (here {self.attention_head_dim}): rotary embeddings turn pairs")
        self._validate_rope()
        tokens = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if any(_optional(_integer(-1, 1 << 40))(token) for token in tokens):
            self._refuse("eos_token_id", "a token id, a list of token ids, or null")

    def _validate_rope(self) -> None:
        rope = self.rope_parameters
        if not isinstance(rope, dict) or not rope.keys() >= {"rope_type", "rope_theta"}:
            self._refuse("rope_parameters", "an object with rope_type and rope_theta")
        if rope["rope_type"] not in ("default", "linear"):
            raise UnsupportedError(
                got=f"rope_type {_shown(rope['rope_type'])}",
                expected="'default' or 'linear', which are what Granite Speech uses",
                remedy="Use transformers for this checkpoint, or ask for this kind of rotary scaling",
            )
        if _number(0.0, 1e15, open_low=True)(rope["rope_theta"]):
            self._refuse("rope_parameters", "a positive rope_theta")
        if rope["rope_type"] == "linear" and _number(0.0, 1e6, open_low=True)(rope.get("factor")):
            self._refuse("rope_parameters", "a positive factor beside rope_type 'linear'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            self._refuse("rope_parameters", "partial_rotary_factor 1.0: Granite turns whole heads")

    def to_dict(self) -> dict[str, Any]:
        # Both forms: transformers 4.x reads rope_theta and rope_scaling, and would take 10,000 for a missing base.
        rope = self.rope_parameters
        scaling = None if rope["rope_type"] == "default" else {"rope_type": rope["rope_type"], "factor": rope["factor"]}
        return super().to_dict() | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, under its 4.x name."""
        return self.rope_parameters["rope_theta"]

    @property
    def attention_head_dim(self) -> int:
        """Width of a head, given or derived."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads


@dataclass(init=False, eq=False)
class GraniteSpeechConfig(_Config):
    """The whole model.

    Args:
        text_config: `GraniteConfig`, or its dictionary; defaults where None.
        encoder_config: `GraniteSpeechEncoderConfig`, or its dictionary; defaults where None.
        projector_config: `Blip2QFormerConfig`, or its dictionary; defaults where None.
        audio_token_index: the token id that stands for an audio vector; it may lie outside the vocabulary.
        initializer_range: carried along.
        has_lora_adapter: the checkpoint has an adapter for requests with audio.
        downsample_rate, window_size: the projector makes `window_size // downsample_rate` vectors of `window_size` frames;
            the first must divide the second.
        tie_word_embeddings: the head's weight is the embedding's. 4.x files say so in `text_config`; in a checkpoint the
            weights that are there decide.
    """

    model_type: ClassVar[str] = "granite_speech"
    attribute_map: ClassVar[dict[str, str]] = {"audio_token_id": "audio_token_index"}
    encoder_class: ClassVar[type[GraniteSpeechEncoderConfig]] = GraniteSpeechEncoderConfig

    text_config: GraniteConfig = None
    encoder_config: GraniteSpeechEncoderConfig = None
    projector_config: Blip2QFormerConfig = None
    audio_token_index: int = _checked(49155, _integer(0, 1 << 40))
    initializer_range: float = _checked(0.02, _number(0.0, 1e3))
    has_lora_adapter: bool = _checked(True, _boolean)
    downsample_rate: int = _checked(5, _integer(1, 1 << 16))
    window_size: int = _checked(15, _integer(1, 1 << 16))
    tie_word_embeddings: bool = _checked(True, _boolean)

    def _derive(self) -> None:
        self.text_config = self._nested("text_config", GraniteConfig)
        self.encoder_config = self._nested("encoder_config", self.encoder_class)
        self.projector_config = self._nested("projector_config", Blip2QFormerConfig)

    def _nested(self, name: str, kind: type[_Config]) -> _Config:
        value = getattr(self, name)
        if value is None or isinstance(value, dict):
            return kind(**(value or {}))
        if not isinstance(value, kind) or value.model_type != kind.model_type:
            self._refuse(name, f"a {kind.__name__}, its dictionary, or None")
        return value

    def _validate_together(self) -> None:
        for part in (self.text_config, self.encoder_config, self.projector_config):
            part.validate()
        if self.window_size % self.downsample_rate:
            self._refuse("downsample_rate", f"a divisor of window_size = {self.window_size}")
        width, given = self.encoder_config.output_width, self.projector_config.encoder_hidden_size
        if given not in (width, Blip2QFormerConfig.ENCODER_HIDDEN_SIZE_NOT_SET):
            self.projector_config._refuse("encoder_hidden_size", f"{width}, the width of the encoder's output")


@dataclass(init=False, eq=False)
class GraniteSpeechPlusConfig(GraniteSpeechConfig):
    """`GraniteSpeechConfig` of a model whose projector also sees earlier layers of the encoder (4.1-2b-plus)."""

    model_type: ClassVar[str] = "granite_speech_plus"
    encoder_class: ClassVar[type[GraniteSpeechEncoderConfig]] = GraniteSpeechPlusEncoderConfig


_WHOLE = (GraniteSpeechConfig, GraniteSpeechPlusConfig)
_PARTS = (GraniteSpeechEncoderConfig, GraniteSpeechPlusEncoderConfig, Blip2QFormerConfig, GraniteConfig)
_KNOWN = {cls.model_type: cls for cls in (*_WHOLE, *_PARTS)}
_OTHER_FAMILIES = {
    "granite_speech_nar": "a non-autoregressive checkpoint (granite-speech-4.1-2b-nar)",
    "granite_speech5_ctc": "a TurboCTC checkpoint (granite-speech-5.0-470m-turboctc)",
}


def config_from_dict(values: dict[str, Any]) -> _Config:
    """The configuration that a config.json stands for, by its `model_type`.

    Raises:
        UnsupportedError: another model family, named; or a folder that asks for code of its own.
        ConfigError: no `model_type`, or a value that no model can be built from.
    """
    model_type = values.get("model_type")
    name = model_type if isinstance(model_type, str) else ""
    other = _OTHER_FAMILIES.get("granite_speech_nar" if "nar" in name.split("_") else name)
    # Another family is named before its auto_map is refused: taking that out of the file would not help.
    if "auto_map" in values and other is None:
        raise UnsupportedError(
            got=f"a config.json with auto_map, which asks to run code from the checkpoint ({_shown(values['auto_map'])})",
            expected="a plain granite_speech checkpoint",
            remedy="Remove auto_map from config.json if the folder holds one; code from a checkpoint is never run",
        )
    if name in _KNOWN:
        return _KNOWN[name].from_dict(values)
    if model_type is None:
        raise ConfigError(got="a config.json without model_type", expected="'granite_speech'", remedy="Check that the folder is a model's")
    raise UnsupportedError(
        got=f"model_type {_shown(model_type)}" + (f", {other}" if other else ""),
        expected="'granite_speech' or 'granite_speech_plus'",
        remedy="Run this checkpoint with the code its model card names",
    )
