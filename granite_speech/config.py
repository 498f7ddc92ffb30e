"""Configurations with transformers' names, parameters and defaults, validated when they are built.

Sources: the transformers 4.56.2 page of Granite Speech; transformers 5.17 for later additions (`granite_speech_plus`,
`rope_parameters`, a top-level `tie_word_embeddings`, `dim_head` derived from `hidden_dim`). An unknown key is kept as an
attribute and written back, so that a file survives a round trip. A known key with a value that no model can be built from
raises `ConfigError` before anything is allocated.
"""

from typing import Any, ClassVar

from granite_speech.config_base import Config, configuration
from granite_speech.config_values import activation_name, boolean, checked, integer, number, optional, shown
from granite_speech.errors import ConfigError, UnsupportedError

__all__ = [
    "TASKS",
    "Blip2QFormerConfig",
    "GraniteConfig",
    "GraniteSpeechConfig",
    "GraniteSpeechEncoderConfig",
    "GraniteSpeechPlusConfig",
    "GraniteSpeechPlusEncoderConfig",
]

# What a checkpoint with audio is asked for.
TASKS = ("transcribe", "translate")

# Generous limits: several times those of any released or announced model, and far too small to exhaust a machine by accident.
_WIDTH, _LAYERS, _HEADS = integer(1, 1 << 17), integer(1, 1024), integer(1, 1024)
_RATE = number(0.0, 1.0, open_high=True)
_SCALAR, _POSITIVE = number(-1e6, 1e6), number(0.0, 1e6, open_low=True)
_VOCABULARY = integer(1, 1 << 24)


@configuration
class GraniteSpeechEncoderConfig(Config):
    """The conformer CTC encoder.

    Args:
        input_dim: features per frame (two stacked log-mel frames of 80).
        num_layers: conformer blocks; after block `num_layers // 2` the CTC head's softmax is fed back.
        hidden_dim: width of the blocks.
        feedforward_mult: inner width of the feed-forwards, as a multiple of `hidden_dim`.
        num_heads: attention heads.
        dim_head: width of a head; `hidden_dim // num_heads` if None.
        output_dim: size of the CTC vocabulary.
        context_size: frames per attention block.
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
    cat_hidden_layers: ClassVar[None] = None  # used only by `granite_speech_plus`; in other files a key of this name has no effect

    input_dim: int = checked(160, _WIDTH)
    num_layers: int = checked(10, _LAYERS)
    hidden_dim: int = checked(1024, _WIDTH)
    feedforward_mult: int = checked(4, integer(1, 64))
    num_heads: int = checked(8, _HEADS)
    dim_head: int | None = checked(None, integer(1, 4096))
    output_dim: int = checked(42, _VOCABULARY)
    context_size: int = checked(200, integer(1, 1 << 16))
    max_pos_emb: int = checked(512, integer(1, 1 << 20))
    dropout: float = checked(0.1, _RATE)
    conv_kernel_size: int = checked(15, integer(1, 4096))
    conv_expansion_factor: int = checked(2, integer(1, 64))

    def _derive(self) -> None:
        if self.dim_head is None and _WIDTH(self.hidden_dim) is None and _HEADS(self.num_heads) is None:
            self.dim_head = self.hidden_dim // self.num_heads

    def _validate_together(self) -> None:
        if self.context_size > self.max_pos_emb:
            self.refuse("context_size", f"at most max_pos_emb = {self.max_pos_emb}, the largest distance that has an embedding")

    @property
    def output_width(self) -> int:
        """Features per frame of the projector's input."""
        return self.hidden_dim * (1 + len(self.cat_hidden_layers or ()))


@configuration
class GraniteSpeechPlusEncoderConfig(GraniteSpeechEncoderConfig):
    """`GraniteSpeechEncoderConfig`, and the layers whose outputs are concatenated before the last one's for the projector.

    Args:
        cat_hidden_layers: block numbers counted from 1; 0 is the input projection's output.
    """

    model_type: ClassVar[str] = "granite_speech_plus_encoder"
    earlier_model_types: ClassVar[tuple[str, ...]] = ("granite_speech_encoder",)

    cat_hidden_layers: list[int] | None = None

    def _validate_together(self) -> None:
        super()._validate_together()
        layers = self.cat_hidden_layers
        if layers is None:
            return
        inside = integer(0, self.num_layers - 1)
        if not isinstance(layers, list | tuple) or any(inside(one) for one in layers) or len(set(layers)) != len(layers):
            self.refuse("cat_hidden_layers", f"a list of different layer numbers from 0 to {self.num_layers - 1}")


@configuration
class Blip2QFormerConfig(Config):
    """The projector's Q-Former: BERT layers over the queries, with cross-attention in every `cross_attention_frequency`-th.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps: of the layers.
        hidden_dropout_prob, attention_probs_dropout_prob: while training.
        cross_attention_frequency: layers 0, f, 2 f … attend to the audio.
        encoder_hidden_size: width of the audio frames. Its default of 1408, which fits no speech encoder of this family, counts
            as not set: such a model can be built, as in transformers, and refuses audio.
        use_qformer_text_input: Granite Speech has no text in its Q-Former; True is refused.
        vocab_size, max_position_embeddings, initializer_range, pad_token_id: kept and not used.
    """

    model_type: ClassVar[str] = "blip_2_qformer"
    ENCODER_HIDDEN_SIZE_NOT_SET: ClassVar[int] = 1408

    vocab_size: int = 30522
    hidden_size: int = checked(768, _WIDTH)
    num_hidden_layers: int = checked(12, _LAYERS)
    num_attention_heads: int = checked(12, _HEADS)
    intermediate_size: int = checked(3072, integer(1, 1 << 20))
    hidden_act: str = checked("gelu", activation_name)
    hidden_dropout_prob: float = checked(0.1, _RATE)
    attention_probs_dropout_prob: float = checked(0.1, _RATE)
    max_position_embeddings: int = 512
    initializer_range: float = checked(0.02, number(0.0, 1e3))
    layer_norm_eps: float = checked(1e-12, number(0.0, 1.0, open_low=True))
    pad_token_id: int | None = 0
    cross_attention_frequency: int = checked(2, integer(1, 1024))
    encoder_hidden_size: int = checked(1408, integer(1, 1 << 20))
    use_qformer_text_input: bool = checked(False, boolean)

    def _validate_together(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            self.refuse("hidden_size", f"a multiple of num_attention_heads = {self.num_attention_heads}")
        if self.use_qformer_text_input:
            self.refuse("use_qformer_text_input", "false", "Granite Speech's projector takes only audio; a text Q-Former is another model")


@configuration
class GraniteConfig(Config):
    """The Granite language model: Llama with four multipliers.

    Args:
        num_key_value_heads: `num_attention_heads` if None.
        head_dim: `hidden_size // num_attention_heads` if None.
        rope_parameters: {"rope_type": "default" or "linear", "rope_theta": base, "factor": for "linear"}; `rope_theta` and
            `rope_scaling` of 4.x files are converted.
        embedding_multiplier: factor of the embeddings.
        attention_multiplier: scale of the attention scores, in place of 1/sqrt(head_dim).
        residual_multiplier: factor of every residual branch.
        logits_scaling: divisor of the logits.
    """

    model_type: ClassVar[str] = "granite"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = checked(32000, _VOCABULARY)
    hidden_size: int = checked(4096, _WIDTH)
    intermediate_size: int = checked(11008, integer(1, 1 << 20))
    num_hidden_layers: int = checked(32, _LAYERS)
    num_attention_heads: int = checked(32, _HEADS)
    num_key_value_heads: int | None = checked(None, _HEADS)
    hidden_act: str = checked("silu", activation_name)
    max_position_embeddings: int = checked(2048, integer(1, 1 << 40))
    initializer_range: float = checked(0.02, number(0.0, 1e3))
    rms_norm_eps: float = checked(1e-6, number(0.0, 1.0, open_low=True))
    use_cache: bool = checked(True, boolean)
    pad_token_id: int | None = checked(None, optional(integer(-1, 1 << 40)))
    bos_token_id: int | None = checked(1, optional(integer(-1, 1 << 40)))
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = checked(False, boolean)
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = checked(False, boolean)
    attention_dropout: float = checked(0.0, _RATE)
    mlp_bias: bool = checked(False, boolean)
    embedding_multiplier: float = checked(1.0, _SCALAR)
    logits_scaling: float = checked(1.0, _POSITIVE)
    residual_multiplier: float = checked(1.0, _SCALAR)
    attention_multiplier: float = checked(1.0, _SCALAR)

    def _current_names(self, given: dict[str, Any]) -> dict[str, Any]:
        # 4.x files have rope_theta and an optional rope_scaling.
        theta = given.pop("rope_theta", 10000.0)
        ropes = {name: given.pop(name, None) for name in ("rope_parameters", "rope_scaling")}
        for name, value in ropes.items():
            if value is not None and not isinstance(value, dict):
                raise ConfigError(got=f"GraniteConfig.{name} = {shown(value)}", expected="an object", remedy="Correct it in config.json")
        rope = dict(ropes["rope_parameters"] or ropes["rope_scaling"] or {})
        rope.setdefault("rope_type", rope.pop("type", None) or "default")
        rope.setdefault("rope_theta", theta)
        return given | {"rope_parameters": rope}

    def _derive(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def _validate_together(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            self.refuse("num_attention_heads", f"a multiple of num_key_value_heads = {self.num_key_value_heads}")
        given = getattr(self, "head_dim", None)
        if given is not None and integer(2, 4096)(given):
            self.refuse("head_dim", "an even integer from 2 to 4096")
        if given is None and self.hidden_size % self.num_attention_heads:
            self.refuse("hidden_size", f"a multiple of num_attention_heads = {self.num_attention_heads}, or a head_dim")
        if self.attention_head_dim % 2:
            name = "hidden_size" if given is None else "head_dim"
            self.refuse(name, f"an even head width (here {self.attention_head_dim}): rotary embeddings rotate pairs")
        self._validate_rope()
        tokens = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if any(optional(integer(-1, 1 << 40))(token) for token in tokens):
            self.refuse("eos_token_id", "a token id, a list of token ids, or null")

    def _validate_rope(self) -> None:
        rope = self.rope_parameters
        if not isinstance(rope, dict) or not rope.keys() >= {"rope_type", "rope_theta"}:
            self.refuse("rope_parameters", "an object with rope_type and rope_theta")
        if rope["rope_type"] not in ("default", "linear"):
            raise UnsupportedError(
                got=f"rope_type {shown(rope['rope_type'])}",
                expected="'default' or 'linear', which Granite Speech uses",
                remedy="Use transformers for this checkpoint, or request support for this kind of rotary scaling",
            )
        if number(0.0, 1e15, open_low=True)(rope["rope_theta"]):
            self.refuse("rope_parameters", "a positive rope_theta")
        if rope["rope_type"] == "linear" and number(0.0, 1e6, open_low=True)(rope.get("factor")):
            self.refuse("rope_parameters", "a positive factor with rope_type 'linear'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            self.refuse("rope_parameters", "partial_rotary_factor 1.0: Granite rotates whole heads")

    def to_dict(self) -> dict[str, Any]:
        # Both forms: transformers 4.x reads rope_theta and rope_scaling, and assumes 10,000 if rope_theta is missing.
        rope = self.rope_parameters
        scaling = None if rope["rope_type"] == "default" else {"rope_type": rope["rope_type"], "factor": rope["factor"]}
        return super().to_dict() | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, under its 4.x name."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = self.rope_parameters | {"rope_theta": value}

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """`rope_parameters`, under its 4.x name. Set without a `rope_theta`, it keeps the earlier one."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        rope = dict(value or {})
        rope.setdefault("rope_type", rope.pop("type", None) or "default")
        self.rope_parameters = {"rope_theta": self.rope_theta} | rope

    @property
    def attention_head_dim(self) -> int:
        """Width of a head, given or derived."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads


def _window_seconds(value: Any) -> str | None:
    """The check of `window_seconds`."""
    values = value if isinstance(value, dict) else dict.fromkeys(TASKS, value)
    wrong = not values.keys() <= set(TASKS) or any(optional(_POSITIVE)(one) for one in values.values())
    return f"a number of seconds above 0, or one for each of {' and '.join(TASKS)}" if wrong else None


@configuration
class GraniteSpeechConfig(Config):
    """The whole model.

    Args:
        text_config: `GraniteConfig`, or its dictionary; defaults if None.
        encoder_config: `GraniteSpeechEncoderConfig`, or its dictionary; defaults if None.
        projector_config: `Blip2QFormerConfig`, or its dictionary; defaults if None.
        audio_token_index: the token id that marks the place of an audio vector; it may lie outside the vocabulary.
        initializer_range: standard deviation of random weights.
        has_lora_adapter: the checkpoint has an adapter for requests with audio.
        downsample_rate, window_size: the projector turns `window_size` frames into `window_size // downsample_rate` vectors;
            the rate must divide the size.
        tie_word_embeddings: the head's weight is the embedding's. 4.x files have this in `text_config`; when a checkpoint is
            loaded, its weights decide.
        window_seconds: the longest recording that the checkpoint answers well at once, in seconds: a number, or
            {"transcribe": …, "translate": …}. The releases do not have it; see `granite_speech.inputs.requests.window_limit`.
    """

    model_type: ClassVar[str] = "granite_speech"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"audio_token_id": "audio_token_index"}
    sub_configs: ClassVar[dict[str, type[Config]]] = {
        "text_config": GraniteConfig,
        "encoder_config": GraniteSpeechEncoderConfig,
        "projector_config": Blip2QFormerConfig,
    }

    text_config: GraniteConfig = None
    encoder_config: GraniteSpeechEncoderConfig = None
    projector_config: Blip2QFormerConfig = None
    audio_token_index: int = checked(49155, integer(0, 1 << 40))
    initializer_range: float = checked(0.02, number(0.0, 1e3))
    has_lora_adapter: bool = checked(True, boolean)
    downsample_rate: int = checked(5, integer(1, 1 << 16))
    window_size: int = checked(15, integer(1, 1 << 16))
    tie_word_embeddings: bool = checked(True, boolean)

    def _derive(self) -> None:
        for name, kind in self.sub_configs.items():
            if getattr(self, name) is None:
                setattr(self, name, kind())

    def _validate_together(self) -> None:
        for name, kind in self.sub_configs.items():
            part = getattr(self, name)
            if not isinstance(part, kind) or part.model_type != kind.model_type:
                self.refuse(name, f"a {kind.__name__}, its dictionary, or None")
            part.validate()
        expected = _window_seconds(self._extra.get("window_seconds"))
        if expected:
            self.refuse("window_seconds", expected)
        if self.window_size % self.downsample_rate:
            self.refuse("downsample_rate", f"a divisor of window_size = {self.window_size}")
        width, given = self.encoder_config.output_width, self.projector_config.encoder_hidden_size
        if given not in (width, Blip2QFormerConfig.ENCODER_HIDDEN_SIZE_NOT_SET):
            self.projector_config.refuse("encoder_hidden_size", f"{width}, the width of the encoder's output")


@configuration
class GraniteSpeechPlusConfig(GraniteSpeechConfig):
    """`GraniteSpeechConfig` of a model whose projector also gets earlier layers of the encoder (4.1-2b-plus)."""

    model_type: ClassVar[str] = "granite_speech_plus"
    sub_configs: ClassVar[dict[str, type[Config]]] = GraniteSpeechConfig.sub_configs | {"encoder_config": GraniteSpeechPlusEncoderConfig}
