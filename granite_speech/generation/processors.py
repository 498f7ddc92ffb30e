"""The rules of a request in transformers' order, the caller's own logits processors among them.

A captured step has its own, shorter list of rules (`engine.step.Selection`); this one serves requests that need another rule, and
beam search.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.generation import constraints
from granite_speech.generation.cutoffs import keep_above_epsilon, keep_above_eta, keep_min_p, keep_top_h, keep_typical
from granite_speech.generation.options import GenerationOptions
from granite_speech.generation.sampling import keep_top_k, keep_top_p

__all__ = ["History", "Processors", "listed", "replacement"]

Rule = Callable[[Tensor, Tensor], Tensor]


class History:
    """The tokens of every row, prompt and answer.

    Args:
        ids: `(rows, width)`, the prompts.
        kept: `(rows, width)` bool, False for padding.

    Attributes:
        ids: `(rows, columns)` int64 as given, with padding.
        own: the same with −1 for padding.
    """

    def __init__(self, ids: Tensor, kept: Tensor):
        self.ids = ids.long()
        self.own = self.ids.masked_fill(~kept, -1)

    def extend(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """Make row i the old row `rows[i]`, or row i if omitted, followed by `tokens[i]`."""
        if rows is not None:
            self.ids, self.own = self.ids.index_select(0, rows), self.own.index_select(0, rows)
        new = tokens.unsqueeze(1)
        self.ids, self.own = torch.cat((self.ids, new), dim=1), torch.cat((self.own, new), dim=1)


class Processors:
    """Turns the scores of a step into those that tokens are chosen from.

    Args:
        options: of the request.
        history: the prompts of all rows.
        custom: the caller's logits processors.
        prefix_allowed_tokens_fn: the caller's, or None.
    """

    def __init__(
        self,
        options: GenerationOptions,
        history: History,
        custom: Sequence[Rule] = (),
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Any] | None = None,
    ):
        built_in = list(_constraints(options, history.own))
        if prefix_allowed_tokens_fn is not None:
            place = sum(not isinstance(one, _AFTER_PREFIX) for one in built_in)
            built_in.insert(place, constraints.PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, options.num_beams))
        rules = [replacement(custom, type(one).__name__) or one for one in built_in]
        self._rules: list[Rule] = rules + [one for one in custom if one not in rules]
        self._cutoffs = list(_cutoffs(options))
        self._custom = bool(custom)

    def __call__(self, history: History, scores: Tensor) -> Tensor:
        """`(rows, vocabulary)` float32.

        Args:
            history: the tokens before.
            scores: `(rows, vocabulary)` logits, or log-probabilities of beams. They stay unchanged.
        """
        # A caller's processor may write to its argument.
        scores = scores.to(torch.float32, copy=self._custom)
        for rule in self._rules:
            scores = rule(history.own, scores) if type(rule) in _SEE_NO_PADDING else _checked(rule, rule(history.ids, scores), scores)
        for cut in self._cutoffs:
            scores = cut(scores)
        return scores


def _checked(rule: Rule, result: Any, scores: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != scores.shape:
        got = f"of shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"of type {type(result).__name__}"
        raise InputError(
            got=f"a result {got} from the logits processor {type(rule).__name__}",
            expected=f"a tensor of the shape of its scores, {tuple(scores.shape)}",
            remedy="Return the scores",
        )
    return result.float()


_SEE_NO_PADDING = {getattr(constraints, name) for name in constraints.__all__} - {constraints.PrefixConstrainedLogitsProcessor}
_AFTER_PREFIX = (
    constraints.ForcedBOSTokenLogitsProcessor,
    constraints.ForcedEOSTokenLogitsProcessor,
    constraints.InfNanRemoveLogitsProcessor,
    constraints.ExponentialDecayLengthPenalty,
    constraints.SuppressTokensLogitsProcessor,
    constraints.SuppressTokensAtBeginLogitsProcessor,
)


def _constraints(options: GenerationOptions, prompt: Tensor) -> Iterator[Rule]:
    """The built-in rules before those for sampling."""
    columns, ends = prompt.shape[1], options.eos_token_id
    if options.sequence_bias:
        yield constraints.SequenceBiasLogitsProcessor(options.sequence_bias)
    if options.encoder_repetition_penalty != 1 and columns:
        yield constraints.EncoderRepetitionPenaltyLogitsProcessor(options.encoder_repetition_penalty, prompt)
    if options.repetition_penalty != 1:
        yield constraints.RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
    if options.no_repeat_ngram_size:
        yield constraints.NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size)
    if options.encoder_no_repeat_ngram_size and columns:
        yield constraints.EncoderNoRepeatNGramLogitsProcessor(options.encoder_no_repeat_ngram_size, prompt)
    if options.bad_words_ids:
        yield constraints.NoBadWordsLogitsProcessor(options.bad_words_ids, ends)
    if options.min_new_tokens:
        yield constraints.MinNewTokensLengthLogitsProcessor(columns, options.min_new_tokens, ends)
    if options.forced_bos_token_id:
        yield constraints.ForcedBOSTokenLogitsProcessor(options.forced_bos_token_id)
    if options.forced_eos_token_id:
        yield constraints.ForcedEOSTokenLogitsProcessor(columns + options.max_new_tokens, options.forced_eos_token_id)
    if options.remove_invalid_values:
        yield constraints.InfNanRemoveLogitsProcessor()
    if options.exponential_decay_length_penalty is not None:
        yield constraints.ExponentialDecayLengthPenalty(*options.exponential_decay_length_penalty, columns, ends)
    if options.suppress_tokens:
        yield constraints.SuppressTokensLogitsProcessor(options.suppress_tokens)
    if options.begin_suppress_tokens:
        # A forced first token comes before the first that is chosen.
        column = columns if columns > 1 or not options.forced_bos_token_id else columns + 1
        yield constraints.SuppressTokensAtBeginLogitsProcessor(options.begin_suppress_tokens, column)


def _cutoffs(options: GenerationOptions) -> Iterator[Callable[[Tensor], Tensor]]:
    """The rules for sampling, and the last one."""
    if options.do_sample:
        # Some beam must go on, so one token more is kept than there are end tokens.
        at_least = 1 if options.num_beams == 1 else len(options.eos_token_id) + 1
        if options.temperature != 1:
            yield lambda scores: scores / options.temperature
        if options.top_h is not None:
            yield partial(keep_top_h, share=options.top_h)
        if options.top_k:
            yield partial(keep_top_k, most=max(options.top_k, at_least))
        if options.top_p < 1:
            yield partial(keep_top_p, dropped=1 - options.top_p, at_least=at_least)
        if options.min_p is not None:
            yield partial(keep_min_p, min_p=options.min_p, at_least=at_least)
        if options.typical_p < 1:
            yield partial(keep_typical, mass=options.typical_p, at_least=at_least)
        if options.epsilon_cutoff:
            yield partial(keep_above_epsilon, epsilon=options.epsilon_cutoff, at_least=at_least)
        if options.eta_cutoff:
            yield partial(keep_above_eta, epsilon=options.eta_cutoff, at_least=at_least)
    if options.renormalize_logits:
        yield lambda scores: scores.log_softmax(-1)


def replacement(custom: Sequence[Any], name: str) -> Any:
    """The first of the caller's objects that is transformers' class of this name; None if there is none."""
    return next((one for one in custom if type(one).__name__ == name and type(one).__module__.startswith("transformers.")), None)


def listed(name: str, given: Any) -> tuple[Any, ...]:
    """The caller's processors or criteria.

    Raises:
        InputError: not a list of callables.
    """
    if given is None:
        return ()
    if not isinstance(given, list | tuple) or not all(map(callable, given)):
        raise InputError(
            got=f"{name} of type {type(given).__name__}" if not isinstance(given, list | tuple) else f"{name} with {given!r:.60}",
            expected="a list of callables (input_ids, scores)",
            remedy=f"Pass {name}=[…], or transformers' list class",
        )
    return tuple(given)
