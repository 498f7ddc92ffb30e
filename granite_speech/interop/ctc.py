"""`accelerate` for TurboCTC, the encoder with a CTC head and no language model.

The calls that users make run packed: `forward`, with labels too, `generate`, and the encoder's `forward`. transformers' own code serves
those that ask for something else, such as hidden states, and calls the encoder that is replaced here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.config_files import config_from_dict
from granite_speech.errors import GraniteSpeechError
from granite_speech.interop.acceleration import Acceleration, is_batch, is_traced
from granite_speech.interop.follow import Follower, NotFollowedError, check_code, in_use, is_known_code, usual_device
from granite_speech.interop.generate import is_customised
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.modules.ctc_masks import mask_of
from granite_speech.modules.packing import Segments
from granite_speech.modules.transfers import on_device

__all__ = ["CTCAcceleration"]

# Parameters of transformers' methods, in their order.
_ENCODER = ("input_features", "attention_mask", "output_attention_mask")
_FORWARD = ("input_features", "attention_mask", "labels")
_GENERATE = ("input_features", "attention_mask", "return_dict_in_generate", "compile_config")
# Options that change nothing in what is computed: transformers' CTC loss does not use the number of items.
_WITHOUT_EFFECT = ("num_items_in_batch", "return_dict")
# Options that are served only if they ask for nothing.
_RECORDED = ("output_hidden_states", "output_attentions")


class CTCTwin(GraniteSpeech5ForCTC):
    """A model without parameters of its own; a `Follower` gives it those of another model.

    Args:
        config: of the other model.
    """

    def __init__(self, config: GraniteSpeech5CTCConfig):
        with torch.device("meta"):
            super().__init__(config)
        self.eval()


class CTCAcceleration(Acceleration):
    """What `accelerate` put into a `GraniteSpeech5ForCTC` of transformers."""

    parts = ("encoder", "ctc_head")

    def _replace_methods(self) -> None:
        self._replace(in_use(self.live.encoder), "forward", self._encode)
        self._replace(self.live, "forward", self._forward)
        self._replace(self.live, "generate", self._generate)

    def new_twin(self) -> tuple[CTCTwin, Follower]:
        twin = CTCTwin(config_from_dict(self.live.config.to_dict()))
        return twin, Follower({part: (getattr(twin, part), self.live, part) for part in self.parts})

    @property
    def head(self) -> nn.Module:
        return self.live.ctc_head

    def prepare_transcripts(self, twin: CTCTwin) -> None:
        twin.config.pad_token_id = self.live.config.pad_token_id
        twin.config.vocab_size = twin.config.encoder_config.vocab_size = twin.ctc_head.weight.shape[0]

    def _encode(self, own: Any, *arguments: Any, **options: Any) -> Any:
        encoder, call = own.__self__, _named(_ENCODER, arguments, options)
        is_served = _is_served(encoder, _ENCODER, call, encoder.config) and self.runs("encoder", encoder)
        clips = self._clips(call, encoder.config) if is_served else None
        if clips is None or self._counts_padding():
            return own(*arguments, **options)
        with usual_device():
            states, left = self.twin.encoder.encode(clips.pack(call["input_features"]), clips)
            width = self.twin.encoder.frames_left(call["input_features"].shape[1])
            has_mask = call.get("attention_mask") is not None and call.get("output_attention_mask", True)
            states, mask = left.pad(states, width), mask_of(left, width) if has_mask else None
        from transformers.models.granite_speech5.modeling_granite_speech5 import GraniteSpeech5EncoderModelOutput

        output = GraniteSpeech5EncoderModelOutput(last_hidden_state=states, attention_mask=mask)
        return output if call.get("return_dict", getattr(encoder.config, "return_dict", True)) is not False else output.to_tuple()

    def _forward(self, own: Any, *arguments: Any, **options: Any) -> Any:
        call = _named(_FORWARD, arguments, options)
        labels = None if call is None else call.get("labels")
        has_lengths = labels is None or call.get("attention_mask") is not None  # without them, transformers fails
        packed = self._logits(call) if has_lengths and _is_served(self.live, _FORWARD, call, *self._configs()) else None
        if packed is None:
            return own(*arguments, **options)
        logits, left = packed
        with usual_device():
            logits = left.pad(logits, self.twin.encoder.frames_left(call["input_features"].shape[1]))
        config, loss = self.live.config, None
        if labels is not None:
            loss = self.live.loss_function(
                logits=logits,
                labels=labels,
                logit_lengths=on_device(left.lengths, logits.device, torch.int64),
                blank_token_id=config.pad_token_id,
                reduction=config.ctc_loss_reduction,
                zero_infinity=config.ctc_zero_infinity,
                output_attention_mask=True,
                **{name: call[name] for name in ("num_items_in_batch",) if name in call},
            )
        from transformers.modeling_outputs import CausalLMOutput

        output = CausalLMOutput(loss=loss, logits=logits)
        given = call.get("return_dict")
        return output if (config.return_dict if given is None else given) else output.to_tuple()

    @torch.no_grad()
    def _generate(self, own: Any, *arguments: Any, **options: Any) -> Any:
        call, blank = _named(_GENERATE, arguments, options), self.live.config.pad_token_id
        is_plain = call is not None and blank is not None and not any(call.pop(name, None) for name in _GENERATE[2:])
        is_alone = is_plain and not self.live.training and not is_customised(self.live) and self._has_no_hooks()
        packed = self._logits(call) if is_alone and _is_served(self.live, _FORWARD, call, *self._configs()) else None
        if packed is None:
            return own(*arguments, **options)
        logits, left = packed
        with usual_device():
            width = self.twin.encoder.frames_left(call["input_features"].shape[1])
            return left.pad(logits.argmax(-1) - blank, width) + blank

    def _configs(self) -> tuple[Any, Any]:
        return self.live.config, getattr(in_use(self.live.encoder), "config", None)

    def _has_no_hooks(self) -> bool:
        """Whether a call of the whole model runs nothing but its `forward`."""
        try:
            check_code(self.live, type(self.live).__name__)
        except NotFollowedError:
            return False
        return True

    def _logits(self, call: dict[str, Any]) -> tuple[Tensor, Segments] | None:
        """Packed logits, and where each clip's lie; None if transformers' own code has to compute them.

        There is no warning then: it calls the encoder, which gives one if it cannot run here either.
        """
        try:
            for part in self.parts:
                self._follower.follow(part, None)
        except NotFollowedError:
            return None
        clips = self._clips(call, self.live.encoder.config)
        if clips is None or self._has_training_norms():
            return None
        with usual_device():
            states, left = self.twin.encode_packed(clips.pack(call["input_features"]), clips)
            return self.twin.ctc_head(states), left

    def _clips(self, call: dict[str, Any], config: Any) -> Segments | None:
        """Where the clips of a batch lie; None if its shapes or its padding are unusual, and transformers' own code has to judge them."""
        if len(config.subsample_layers) != self.twin.encoder.config.subsamplings:
            return None  # layers that do not exist, or one twice: transformers counts these only in the mask of `generate`
        try:
            return self.twin.encoder.clips(call["input_features"], call.get("attention_mask"))
        except GraniteSpeechError:
            return None

    def _has_training_norms(self) -> bool:
        return any(isinstance(one, nn.BatchNorm1d) and one.training for one in self.twin.encoder.modules())

    def _counts_padding(self) -> bool:
        """Whether BatchNorm takes its statistics from the batch: transformers counts padding, and odd frames that it then drops."""
        if self._has_training_norms():
            self._warn("the encoder", "its BatchNorm is in training mode")
            return True
        return False


def _is_served(module: nn.Module, names: tuple[str, ...], call: dict[str, Any] | None, *configs: Any) -> bool:
    """Whether a call asks for nothing but what is computed here.

    Args:
        module: transformers' module whose `forward` serves the call otherwise.
        names: of its parameters.
        call: its arguments by name; None if they are wrong.
        configs: of the modules that run.
    """
    if call is None or is_traced() or not is_known_code(type(module).forward) or not is_batch(call.get("input_features")):
        return False
    if any(getattr(config, name, False) for config in configs for name in _RECORDED) or any(call.get(name) for name in _RECORDED):
        return False
    return call.keys() <= {*names, *_RECORDED, *_WITHOUT_EFFECT}


def _named(names: tuple[str, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any] | None:
    """A call's arguments by name; None if the method would not accept them."""
    given = names[: len(arguments)]
    if len(arguments) > len(names) or not options.keys().isdisjoint(given):
        return None
    return dict(zip(given, arguments, strict=True)) | options
