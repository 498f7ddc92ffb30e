"""What the caller adds to a request: logits processors, stopping criteria, and options that a captured step cannot serve."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.processors import History, Processors, listed
from granite_speech.generation.stopping import Stopping, with_criteria

__all__ = ["Custom", "Rules"]


@dataclass(frozen=True)
class Custom:
    """The caller's own functions.

    Attributes:
        processors: callables `(input_ids, scores)` that return scores.
        criteria: callables `(input_ids, scores)` that return whether rows end.
        prefix_allowed_tokens_fn: callable `(number of the prompt, input_ids)` that returns the tokens allowed next.
    """

    processors: tuple[Any, ...] = ()
    criteria: tuple[Any, ...] = ()
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Any] | None = None

    @classmethod
    def of(cls, logits_processor: Any, stopping_criteria: Any, prefix_allowed_tokens_fn: Any) -> "Custom":
        if prefix_allowed_tokens_fn is not None and not callable(prefix_allowed_tokens_fn):
            raise InputError(
                got=f"prefix_allowed_tokens_fn of type {type(prefix_allowed_tokens_fn).__name__}",
                expected="a function (batch_id, input_ids) that returns the allowed tokens",
                remedy="Pass one, or omit it",
            )
        processors, criteria = listed("logits_processor", logits_processor), listed("stopping_criteria", stopping_criteria)
        return cls(processors, criteria, prefix_allowed_tokens_fn)


@dataclass(frozen=True)
class Rules:
    """The rules of one request, beyond those of a captured step.

    Attributes:
        options: of the request, without those that the caller's criteria replace.
        asked: of the request, as resolved.
        custom: the caller's functions.
        stopping: what ends rows besides tokens and lengths.
    """

    options: GenerationOptions
    asked: GenerationOptions
    custom: Custom
    stopping: Stopping

    @classmethod
    def of(cls, options: GenerationOptions, custom: Custom | None = None, columns: int = 0) -> "Rules":
        custom = custom or Custom()
        rest = with_criteria(options, custom.criteria, columns)
        return cls(rest, options, custom, Stopping(rest, custom.criteria))

    @property
    def has_processors(self) -> bool:
        """Whether tokens are chosen by `processors`, not by the rules of a captured step."""
        return bool(self.asked.rules or self.custom.processors or self.custom.prefix_allowed_tokens_fn)

    @property
    def has_history(self) -> bool:
        """Whether something looks at all tokens of the rows after every step."""
        return self.has_processors or bool(self.custom.criteria)

    def processors(self, history: History) -> Processors:
        return Processors(self.asked, history, self.custom.processors, self.custom.prefix_allowed_tokens_fn)
