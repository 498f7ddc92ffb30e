"""The model that a `Transcriber` runs if it was given a live model of transformers that is accelerated."""

from typing import Any

from torch import nn

from granite_speech.errors import InputError, UnsupportedError
from granite_speech.interop.follow import Follower, NotFollowedError, check_code
from granite_speech.interop.generate import is_customised

__all__ = ["TranscriptionTwin"]


class TranscriptionTwin:
    """A twin for transcripts, made when it is first needed.

    It is not the twin of `generate`, whose settings are those of the installed transformers (`Acceleration.prepare_transcripts`), and which
    another thread may be using.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[nn.Module, Follower]] = {}  # by the size of the vocabulary, which an engine has its buffers for

    def follow(self, acceleration: Any) -> nn.Module:
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
            trains = [part for part in acceleration.parts if follower.follow(part, None, acceleration.adapters_on)]
        except NotFollowedError as reason:
            raise UnsupportedError(
                got=f"an accelerated model that this package cannot run, because {reason}",
                expected="transformers' own modules without hooks, plain LoRA, and weights that are not quantized",
                remedy="Undo that, or load the checkpoint with Transcriber.from_pretrained",
            ) from None
        if live.training or trains:
            what = "a model" if live.training else f"an accelerated model with a module of the {trains[0]}"
            raise InputError(got=f"{what} in training mode", expected="evaluation mode", remedy="Call model.eval() first")
        acceleration.prepare_transcripts(twin)
        return twin

    def _twin(self, acceleration: Any) -> tuple[nn.Module, Follower]:
        head = getattr(acceleration.head, "weight", None)
        size = 0 if head is None else head.shape[0]
        made = self._made.get(size)
        if made is None:
            made = self._made.setdefault(size, acceleration.new_twin())  # another thread may have been faster
            self._made = {size: made}
        return made


def _check_methods(module: nn.Module) -> None:
    """Refuse a model with which somebody's own Python code runs."""
    name = type(module).__name__
    check_code(module, name)
    if is_customised(module):
        raise NotFollowedError(f"a method of {name} is not transformers' own")
