"""The model that a `Transcriber` runs if it was given a live model of transformers that is accelerated."""

from typing import Any

from torch import nn

from granite_speech.errors import InputError, UnsupportedError
from granite_speech.interop.follow import Follower, NotFollowedError, Twin, check_code
from granite_speech.interop.generate import is_customised

__all__ = ["TranscriptionTwin"]

_PARTS = ("encoder", "projector", "language_model", "lm_head")


class TranscriptionTwin:
    """A twin for transcripts, made when it is first needed.

    It is not the twin of `generate`, whose logits are those of the installed transformers. From 5.10 on, transformers does not divide
    logits by `logits_scaling`: greedy tokens are the same, but probabilities are not. Here logits are always divided, as when IBM trained
    the model, so that confidences and temperatures are those of the same checkpoint in this package.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[Twin, Follower]] = {}  # by the size of the vocabulary, which an engine has its buffers for

    def follow(self, acceleration: Any) -> Twin:
        """The twin, with everything that may have changed in the live model taken over. Threads may call this at the same time.

        Args:
            acceleration: of the live model.

        Raises:
            InputError: the live model is in training mode.
            UnsupportedError: something in it that this package does not compute in the same way, such as hooks, adapters other than plain
                LoRA, or quantized layers.
        """
        live = acceleration.live
        try:
            for module in acceleration.whole:
                _check_methods(module)
            twin, follower = self._twin(acceleration)
            # Before it answers a prompt with audio, transformers' `generate` switches adapters on that it loaded itself.
            adapters_on = getattr(live, "_hf_peft_config_loaded", False)
            trains = [part for part in _PARTS if follower.follow(part, None, adapters_on)]
        except NotFollowedError as reason:
            raise UnsupportedError(
                got=f"an accelerated model that this package cannot run, because {reason}",
                expected="transformers' own modules without hooks, plain LoRA, and weights that are not quantized",
                remedy="Undo that, or load the checkpoint with Transcriber.from_pretrained",
            ) from None
        if live.training or trains:
            what = "a model" if live.training else f"an accelerated model with a module of the {trains[0]}"
            raise InputError(got=f"{what} in training mode", expected="evaluation mode", remedy="Call model.eval() first")
        text = acceleration.text.config
        twin.config.audio_token_index = live.config.audio_token_index
        twin.config.text_config.logits_scaling = getattr(text, "text_config", text).logits_scaling
        options = live.generation_config
        if callable(getattr(options, "to_diff_dict", None)):
            options = options.to_diff_dict()  # to_dict has transformers' defaults too
        twin.generation_config = options
        return twin

    def _twin(self, acceleration: Any) -> tuple[Twin, Follower]:
        head = getattr(acceleration.text.lm_head, "weight", None)
        size = 0 if head is None else head.shape[0]
        made = self._made.get(size)
        if made is None:
            twin, follower = acceleration.new_twin()
            twin.config.text_config.vocab_size = size
            made = self._made.setdefault(size, (twin, follower))  # another thread may have been faster
            self._made = {size: made}
        return made


def _check_methods(module: nn.Module) -> None:
    """Refuse a model with which somebody's own Python code runs."""
    name = type(module).__name__
    check_code(module, name)
    if is_customised(module):
        raise NotFollowedError(f"a method of {name} is not transformers' own")
