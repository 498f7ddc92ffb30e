"""What `generate` returns beside the tokens: scores, logits and hidden states of every step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from granite_speech.generation.options import GenerationOptions
from granite_speech.modules.outputs import GenerateOutput
from granite_speech.modules.transfers import on_device

__all__ = ["Records"]


class Records:
    """The records of one request that its options ask for; false if they ask for none.

    Args:
        options: of the request.
        rows: number of answers, or of beams.

    Attributes:
        scores, logits: of every step, `(rows, vocabulary)` float32; None if not asked for.
        hidden_states: of every step, a tuple of the layers' `(rows, tokens, hidden)`; None if not asked for.
    """

    def __init__(self, options: GenerationOptions, rows: int):
        def wanted(flag: bool) -> list | None:
            return [] if options.return_dict_in_generate and flag else None

        self._rows = rows
        self.scores: list[Tensor] | None = wanted(options.output_scores)
        self.logits: list[Tensor] | None = wanted(options.output_logits)
        self.hidden_states: list[tuple[Tensor, ...]] | None = wanted(options.output_hidden_states)

    def __bool__(self) -> bool:
        return any(one is not None for one in (self.scores, self.logits, self.hidden_states))

    def collected(self) -> list[Tensor] | None:
        """A list for the hidden states of a step, if they are asked for."""
        return None if self.hidden_states is None else []

    def add(self, scores: Tensor, logits: Tensor, hidden_states: Sequence[Tensor] | None, places: list[int]) -> None:
        """Keep a step.

        Args:
            scores, logits: `(at least rows of the step, vocabulary)`.
            hidden_states: `(rows, tokens, hidden)` or `(rows, hidden)` of every layer.
            places: the request's row of each row of the step.
        """
        if self.scores is not None:
            self.scores.append(self._all_rows(scores, places))
        if self.logits is not None:
            self.logits.append(self._all_rows(logits, places))
        if self.hidden_states is not None and hidden_states is not None:
            self.hidden_states.append(tuple(one if one.dim() == 3 else one.unsqueeze(1) for one in hidden_states))

    def _all_rows(self, values: Tensor, places: list[int]) -> Tensor:
        full = values.new_full((self._rows, values.shape[1]), float("-inf"), dtype=torch.float32)
        return full.index_copy_(0, on_device(places, values.device, torch.int64), values[: len(places)].float())

    def scores_so_far(self) -> tuple[Tensor, ...] | None:
        """As stopping criteria get them."""
        return None if self.scores is None else tuple(self.scores)

    def put_into(self, output: GenerateOutput, steps: int | None = None) -> GenerateOutput:
        """Set the fields of an output; None: for all steps."""
        for name in ("scores", "logits", "hidden_states"):
            kept = getattr(self, name)
            setattr(output, name, None if kept is None else tuple(kept[:steps]))
        return output
