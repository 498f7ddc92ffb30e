"""Configurations of TurboCTC with transformers' names, parameters and defaults, validated when they are built.

Source: transformers 5.23, `granite_speech5`. `config` says what holds for all configurations.
"""

from typing import Any, ClassVar

from granite_speech.config_base import Config, configuration
from granite_speech.config_values import activation_name, boolean, checked, integer, number, optional

__all__ = ["GraniteSpeech5CTCConfig", "GraniteSpeech5EncoderConfig"]

# As generous as those of `config`.
_WIDTH, _LAYERS, _HEADS = integer(1, 1 << 17), integer(1, 1024), integer(1, 1024)
_RATE = number(0.0, 1.0, open_high=True)
_VOCABULARY = integer(1, 1 << 24)
_REDUCTIONS = ("mean", "sum", "none")


@configuration
class GraniteSpeech5EncoderConfig(Config):
    """The conformer encoder, with the CTC vocabulary that its middle layer predicts.

    Args:
        vocab_size: CTC entries.
        hidden_size: width of the blocks.
        intermediate_size: inner width of the feed-forwards.
        num_hidden_layers: conformer blocks; after block `num_hidden_layers // 2 - 1`, counted from 0, the CTC head's softmax is fed back.
        num_attention_heads: attention heads.
        num_key_value_heads: as many as `num_attention_heads`, or None.
        num_mel_bins: mel bands. A frame has four times as many features: two mel frames, each with its delta.
        head_dim: width of a head; `hidden_size // num_attention_heads` if None.
        hidden_act: of the feed-forwards; the convolution module's is always SiLU.
        max_position_embeddings: largest relative distance that has an embedding; at least `context_size`.
        context_size: frames per attention block.
        conv_kernel_size: taps of the depthwise convolution.
        conv_expansion_factor: inner width of the convolution module, as a multiple of `hidden_size`.
        subsample_layers: numbers, from 0, of the blocks that halve the frames; [0, 1] if None. A number beyond the last block names none.
        attention_bias: whether the feed-forwards have biases. (q, k and v have none, and o always has one.)
        attention_dropout, activation_dropout: while training.
        initializer_range: standard deviation of random weights.
    """

    model_type: ClassVar[str] = "granite_speech5_encoder"

    vocab_size: int = checked(16384, _VOCABULARY)
    hidden_size: int = checked(1024, _WIDTH)
    intermediate_size: int = checked(4096, integer(1, 1 << 20))
    num_hidden_layers: int = checked(16, _LAYERS)
    num_attention_heads: int = checked(8, _HEADS)
    num_key_value_heads: int | None = checked(None, _HEADS)
    num_mel_bins: int = checked(80, _WIDTH)
    head_dim: int | None = checked(None, integer(1, 4096))
    hidden_act: str = checked("silu", activation_name)
    max_position_embeddings: int = checked(512, integer(1, 1 << 20))
    context_size: int = checked(128, integer(1, 1 << 16))
    conv_kernel_size: int = checked(7, integer(1, 4096))
    conv_expansion_factor: int = checked(2, integer(1, 64))
    subsample_layers: list[int] | None = None
    attention_bias: bool = checked(True, boolean)
    attention_dropout: float = checked(0.0, _RATE)
    activation_dropout: float = checked(0.0, _RATE)
    initializer_range: float = checked(0.02, number(0.0, 1e3))

    def _derive(self) -> None:
        if self.head_dim is None and _WIDTH(self.hidden_size) is None and _HEADS(self.num_attention_heads) is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.subsample_layers is None:
            self.subsample_layers = [0, 1]
        elif isinstance(self.subsample_layers, tuple):
            self.subsample_layers = list(self.subsample_layers)

    def _validate_together(self) -> None:
        if self.context_size > self.max_position_embeddings:
            distance = f"max_position_embeddings = {self.max_position_embeddings}, the largest distance that has an embedding"
            self.refuse("context_size", f"at most {distance}")
        if self.num_key_value_heads != self.num_attention_heads:
            self.refuse("num_key_value_heads", f"num_attention_heads = {self.num_attention_heads}: each head has its own keys and values")
        number_of_layer = integer(0)
        if not isinstance(self.subsample_layers, list) or any(number_of_layer(one) for one in self.subsample_layers):
            self.refuse("subsample_layers", "a list of layer numbers, counted from 0")

    @property
    def subsamplings(self) -> int:
        """How many blocks halve the frames."""
        return len({one for one in self.subsample_layers if one < self.num_hidden_layers})


@configuration
class GraniteSpeech5CTCConfig(Config):
    """The whole model: the encoder with a CTC head.

    Args:
        vocab_size: CTC entries, as many as the encoder's.
        ctc_loss_reduction: "mean", "sum" or "none", of `torch.nn.CTCLoss`.
        ctc_zero_infinity: whether a clip too short for its labels counts as 0 in the loss, not as infinity.
        encoder_config: `GraniteSpeech5EncoderConfig`, or its dictionary; defaults if None.
        pad_token_id: the blank.
        tie_word_embeddings: the head's weight is that of the encoder's `out`.
    """

    model_type: ClassVar[str] = "granite_speech5_ctc"
    sub_configs: ClassVar[dict[str, type[Config]]] = {"encoder_config": GraniteSpeech5EncoderConfig}

    vocab_size: int = checked(16384, _VOCABULARY)
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = checked(True, boolean)
    encoder_config: GraniteSpeech5EncoderConfig = None
    pad_token_id: int | None = checked(0, optional(integer(0)))
    tie_word_embeddings: bool = checked(True, boolean)

    def _current_names(self, given: dict[str, Any]) -> dict[str, Any]:
        # transformers writes it, and takes the encoder's when it reads the file.
        return {name: value for name, value in given.items() if name != "initializer_range"}

    def _derive(self) -> None:
        if self.encoder_config is None:
            self.encoder_config = GraniteSpeech5EncoderConfig()

    def _validate_together(self) -> None:
        encoder = self.encoder_config
        if not isinstance(encoder, GraniteSpeech5EncoderConfig):
            self.refuse("encoder_config", "a GraniteSpeech5EncoderConfig, its dictionary, or None")
        encoder.validate()
        if self.ctc_loss_reduction not in _REDUCTIONS:
            self.refuse("ctc_loss_reduction", f"one of {', '.join(_REDUCTIONS)}")
        if encoder.vocab_size != self.vocab_size:
            self.refuse("vocab_size", f"{encoder.vocab_size}, the encoder's: both predict the same entries")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            self.refuse("pad_token_id", f"an entry of the vocabulary, below {self.vocab_size}: it is CTC's blank")

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"initializer_range": self.initializer_range}

    @property
    def initializer_range(self) -> float:
        """The encoder's."""
        return self.encoder_config.initializer_range

    @initializer_range.setter
    def initializer_range(self, value: float) -> None:
        self.encoder_config.initializer_range = value
