"""What `accelerate` puts into a live model, whatever its family: methods on instances, and a with block that takes them off again."""

import warnings
from functools import cache
from typing import Any, ClassVar, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from granite_speech.interop.follow import Follower, NotFollowedError, Replacement, is_own
from granite_speech.interop.transcribe import TranscriptionTwin
from granite_speech.transcription.live_models import ACCELERATION

__all__ = ["Acceleration", "AccelerationWarning", "is_batch", "is_traced"]


class AccelerationWarning(UserWarning):
    """A part of an accelerated model runs as transformers wrote it, and why."""


class Acceleration:
    """What `accelerate` put into a model.

    Args:
        live: transformers' model.

    Attributes:
        parts: the names of the twin's parts.
        whole: the live modules whose own methods run a request.
        twin: a model of this package that computes what the live one does.
    """

    parts: ClassVar[tuple[str, ...]]

    def __init__(self, live: nn.Module):
        self.live, self._calls, self._warned = live, 0, set()
        self._roots: list[nn.Module] = []
        self._replaced = WeakSet[Replacement]()  # weak: a module that was taken out of the model can be freed
        self.whole = [live]
        self._find_parts()
        self.twin, self._follower = self.new_twin()
        self._transcription = TranscriptionTwin()
        self._replace_methods()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # in a copy of the model, whose methods are its own, also if peft's model around it was copied

    def _find_parts(self) -> None:
        """Keep what the other methods need of the live model."""

    def _replace_methods(self) -> None:
        """Replace the live model's methods."""
        raise NotImplementedError

    def new_twin(self) -> tuple[nn.Module, Follower]:
        """A twin of the live model, and what makes it follow."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Module:
        """The live module that computes logits."""
        raise NotImplementedError

    @property
    def adapters_on(self) -> bool:
        """Whether adapters that are switched off are used for transcripts too."""
        return False

    def prepare_transcripts(self, twin: nn.Module) -> None:
        """Give a twin for transcripts what its follower does not: settings of the live model."""
        raise NotImplementedError

    def _replace(self, module: nn.Module, name: str, function: Any) -> None:
        if name in vars(module) and not is_own(module, name):
            return  # somebody else's, which may do anything
        for one in (Replacement(module, name, function), Replacement(module, "_replicate_for_data_parallel", _replica)):
            vars(module)[one.name] = one
            self._replaced.add(one)

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
        if is_traced():
            return False
        try:
            trains = self._follower.follow(part, called)
            if trains and called is None:
                raise NotFollowedError(f"a module of the {part} is in training mode")
        except NotFollowedError as reason:
            self._warn(f"the {part}", str(reason))
            return False
        return True

    def transcribing(self) -> nn.Module:
        """The model that a `Transcriber` runs, which is now as the live model is. See `TranscriptionTwin.follow`."""
        return self._transcription.follow(self)

    def _warn(self, what: str, reason: str) -> None:
        if (what, reason) not in self._warned:
            self._warned.add((what, reason))
            warnings.warn(f"accelerate: {what} runs as transformers wrote it, because {reason}.", AccelerationWarning, stacklevel=4)


def is_traced() -> bool:
    """Whether a program is being made of the call, which must have transformers' own operations in it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_batch(x: Any) -> bool:
    """Whether it is `(clips, frames, width)` with something in it."""
    return isinstance(x, Tensor) and x.dim() == 3 and x.numel() > 0


def _replica(own: Any) -> nn.Module:
    """What `nn.DataParallel` runs on another device: a module that shares the dictionary of this one, but has other weights."""
    replica = own()
    for name in [name for name, one in vars(replica).items() if isinstance(one, Replacement)]:
        del vars(replica)[name]
    return replica


class _WithBlock:
    """What the class of an accelerated model has in addition: the with statement looks for its methods on the class."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        acceleration = getattr(self, ACCELERATION, None)  # peft's wrappers pass it on
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
