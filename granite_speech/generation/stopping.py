"""What ends rows apart from their tokens and lengths: a time limit and the caller's stopping criteria."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.processors import replacement

__all__ = ["Stopping", "with_criteria"]


def with_criteria(options: GenerationOptions, criteria: Sequence[Any], columns: int) -> GenerationOptions:
    """The options without those that a criterion replaces: as in transformers, one of its own classes replaces the built-in one.

    Args:
        options: of the request.
        criteria: the caller's.
        columns: of the prompts.
    """
    longest = replacement(criteria, "MaxLengthCriteria")
    if longest is not None:
        # A row has at least one token before its length is looked at.
        options = replace(options, max_new_tokens=max(1, longest.max_length - columns))
    if replacement(criteria, "EosTokenCriteria") is not None:
        options = replace(options, eos_token_id=())
    if replacement(criteria, "MaxTimeCriteria") is not None:
        options = replace(options, max_time=None)
    return options


class Stopping:
    """Whether rows end now. Time counts from here.

    Args:
        options: of the request.
        criteria: callables `(ids, scores)` that return a bool, or a bool for each row.

    Attributes:
        criteria: as given.
    """

    def __init__(self, options: GenerationOptions, criteria: Sequence[Any] = ()):
        self.criteria = criteria
        self._end = None if options.max_time is None else time.perf_counter() + options.max_time

    def __bool__(self) -> bool:
        return bool(self.criteria) or self._end is not None

    @property
    def is_late(self) -> bool:
        return self._end is not None and time.perf_counter() > self._end

    def ended(self, ids: Tensor, scores: tuple[Tensor, ...] | None) -> Tensor:
        """`(rows,)` bool on the device of `ids`.

        Args:
            ids: `(rows, columns)`, prompts with their padding, and answers.
            scores: of every step so far, if the request returns them.
        """
        ended = torch.full((len(ids),), self.is_late, device=ids.device)
        for one in self.criteria:
            ended = ended | _checked(one, one(ids, scores), ids)
        return ended


def _checked(criterion: Any, result: Any, ids: Tensor) -> Tensor:
    try:
        rows = torch.as_tensor(result, device=ids.device).bool()
    except (TypeError, ValueError, RuntimeError):
        rows = None
    if rows is None or rows.shape not in ((), (1,), (len(ids),)):
        raise InputError(
            got=f"{result!r:.60} from the stopping criterion {type(criterion).__name__}",
            expected=f"a bool, or a bool tensor ({len(ids)},)",
            remedy="Return whether each row is done",
        )
    return rows
