"""`accelerate` for a model with a language model: the 3.x and 4.x family."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from granite_speech.checkpoints.weight_names import EMBEDDING, HEAD, canonical_keys
from granite_speech.config import GraniteSpeechConfig
from granite_speech.config_files import config_from_dict
from granite_speech.interop.acceleration import Acceleration, is_batch
from granite_speech.interop.follow import Follower, NotFollowedError, Twin, check_code, in_use, is_known_code, usual_device
from granite_speech.interop.generate import generated
from granite_speech.modules.decoder_layers import GraniteRMSNorm
from granite_speech.modules.packing import Segments

__all__ = ["SpeechAcceleration"]


class SpeechAcceleration(Acceleration):
    """What `accelerate` put into a `GraniteSpeechForConditionalGeneration` of transformers."""

    parts = ("encoder", "projector", "language_model", "lm_head")

    def _find_parts(self) -> None:
        # Up to transformers 5.9, the model has a language model with a head; from 5.10 on, a model without, and a head.
        live = self.live
        self._has_inner = isinstance(getattr(live, "model", None), nn.Module)
        speech, text = (live.model, live) if self._has_inner else (live, live.language_model)
        self.speech, self.text = speech, text
        self._divides = any(map(_divides_logits, (live, text)))
        self._decoder = (speech, "language_model") if self._has_inner else (text, "model")
        self.whole = list({id(one): one for one in (live, speech, text)}.values())

    def _replace_methods(self) -> None:
        live, speech = self.live, self.speech
        self._replace(in_use(speech.encoder), "forward", self._encode)
        self._replace(in_use(speech.projector), "forward", self._project)
        for module in speech.language_model.modules():
            if type(module).__name__ == "GraniteRMSNorm" and is_known_code(type(module).forward):
                self._replace(module, "forward", partial(_normalize, module))
        self._replace(live, "load_state_dict", self._load_state_dict)
        self._replace(live, "generate", partial(generated, self, live))
        if not self._has_inner:
            self._replace(self.text, "generate", partial(generated, self, self.text))

    def new_twin(self) -> tuple[Twin, Follower]:
        twin = Twin(_config_of(self.live))
        parts = {
            "encoder": (twin.encoder, self.speech, "encoder"),
            "projector": (twin.projector, self.speech, "projector"),
            "language_model": (twin.decoder, *self._decoder),
            "lm_head": (twin.lm_head, self.text, "lm_head"),
        }
        return twin, Follower(parts)

    @property
    def head(self) -> nn.Module:
        return self.text.lm_head

    @property
    def adapters_on(self) -> bool:
        """Before it answers a prompt with audio, transformers' `generate` switches adapters on that it loaded itself."""
        return getattr(self.live, "_hf_peft_config_loaded", False)

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

    def prepare_transcripts(self, twin: Twin) -> None:
        """From 5.10 on, transformers does not divide logits by `logits_scaling`: greedy tokens are the same, but probabilities are not. For
        transcripts logits are always divided, as when IBM trained the model, so that confidences and temperatures are those of the same
        checkpoint in this package.
        """
        text = self.text.config
        twin.config.audio_token_index = self.live.config.audio_token_index
        twin.config.text_config.logits_scaling = getattr(text, "text_config", text).logits_scaling
        twin.config.text_config.vocab_size = twin.lm_head.weight.shape[0]
        options = self.live.generation_config
        if callable(getattr(options, "to_diff_dict", None)):
            options = options.to_diff_dict()  # to_dict has transformers' defaults too
        twin.generation_config = options

    def _encode(self, own: Any, *arguments: Any, **options: Any) -> Any:
        encoder, x = own.__self__, arguments[0] if len(arguments) == 1 else None
        if not arguments and "hidden_states" in options:
            x = options["hidden_states"]
        config = encoder.config
        asked = options | {name: options.get(name, getattr(config, name, False)) for name in ("output_hidden_states", "output_attentions")}
        is_plain = all(value is None or value is False for name, value in asked.items() if name not in ("return_dict", "hidden_states"))
        if not (is_plain and is_batch(x) and self.runs("encoder", encoder)):
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
        return self.twin.projector(x) if is_batch(x) and self.runs("projector", own.__self__) else own(*arguments, **options)

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


def _mentions(method: Any, name: str) -> bool:
    """Whether a method's code uses a name; decorators are looked through."""
    return name in inspect.unwrap(method).__code__.co_names


def _divides_logits(module: nn.Module) -> bool:
    return _mentions(type(module).forward, "logits_scaling")
