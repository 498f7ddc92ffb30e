"""Options of `generate`: transformers' names, the sources of their values, and the values that are refused."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self
from warnings import warn

import numpy as np
from torch import Tensor

from granite_speech.config_values import boolean, checked, integer, number, optional, shown
from granite_speech.errors import InputError
from granite_speech.generation import option_table as values_of
from granite_speech.generation.option_table import ACCEPTED, AT_LEAST_ONE, COUNT, POSITIVE, REFUSED

__all__ = ["GenerationOptions"]

_NEW_TOKENS_BY_DEFAULT = 20
_LONGEST = 1 << 20  # a hundred times the longest answer to be expected; memory is reserved according to this number

# Options whose value may be one item or several.
_SEVERAL = frozenset(
    ["eos_token_id", "stop_strings", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"]
)

# Options that do nothing unless another has a certain value, and their neutral values.
_ONLY_SAMPLING = {"temperature": (1,), "top_k": (0, 50), "top_p": (1,), "min_p": (), "top_h": (), "typical_p": (1,)}
_ONLY_SAMPLING |= {"epsilon_cutoff": (0,), "eta_cutoff": (0,)}
_ONLY_BEAMS = {"early_stopping": (False,), "length_penalty": (1,)}
_ONLY_RECORDS = {"output_scores": (False,), "output_logits": (False,), "output_hidden_states": (False,), "output_attentions": (False,)}


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to decode; names, meanings and defaults are those of transformers 5.17's GenerationConfig.

    Attributes:
        max_new_tokens: most tokens to add; 20 if neither this nor max_length is set.
        max_length: most columns of prompt and answer together; ignored if set next to max_new_tokens.
        min_new_tokens: an answer does not end before it has this many tokens.
        min_length: the same in columns of prompt and answer; ignored if set next to min_new_tokens.
        do_sample: draw tokens from the softmax of the scores; otherwise take the best.
        temperature: divides the scores before the softmax, above 0.
        top_k: draw only from this many best tokens; 0: from all.
        top_p: then only from the fewest best tokens whose probabilities add up to this, in (0, 1].
        repetition_penalty: positive scores of tokens that the row already has (prompt without padding, and answer) are divided
            by it, negative ones multiplied.
        num_beams: hypotheses kept for each row; 1: no beam search.
        length_penalty: a finished beam's score is the sum of its log-probabilities over its length to this power.
        early_stopping: True: end when num_beams beams have ended. False: when the best open beam's score at its present
            length is no better than the worst ended one. "never": the same, at the greatest length it could have.
        num_return_sequences: answers to each prompt.
        eos_token_id: a row ends with any of these.
        pad_token_id: fills a row after its end; the first of eos_token_id if not set, and in beam search also if 0.
        bos_token_id: the prompt of a call without one.
        stop_strings: a row ends with the token that completes one of these in its text, prompt included.
        output_scores: with return_dict_in_generate, return the scores too.
        return_dict_in_generate: return a `GenerateOutput`.
        min_p, top_h, typical_p, epsilon_cutoff, eta_cutoff: for sampling, which tokens to draw from (generation/cutoffs.py).
        no_repeat_ngram_size: no sequence of this many tokens occurs twice in a row's prompt and answer; 0: any number.
        encoder_no_repeat_ngram_size: the answer has no sequence of this many tokens that the prompt has; 0: any number.
        encoder_repetition_penalty: as repetition_penalty, for the tokens of the prompt, and the other way round: above 1 they are
            more likely.
        bad_words_ids: sequences that never occur in an answer.
        sequence_bias: pairs of a sequence and a number that is added to the score of its last token after the others.
        suppress_tokens, begin_suppress_tokens: tokens that are never chosen, or not as the first of an answer.
        forced_bos_token_id: chosen as the second column of prompt and answer.
        forced_eos_token_id: chosen as the last of max_new_tokens.
        exponential_decay_length_penalty: from this many tokens on, end tokens get likelier by this factor with each token.
        renormalize_logits: scores are log-probabilities.
        remove_invalid_values: scores that are not finite are replaced by finite ones.
        max_time: seconds after which no further token is chosen.
        output_logits, output_hidden_states: with return_dict_in_generate, return these too.
    """

    max_new_tokens: int = checked(_NEW_TOKENS_BY_DEFAULT, integer(0, _LONGEST))
    min_new_tokens: int = checked(0, COUNT)
    max_length: int | None = checked(None, AT_LEAST_ONE)
    min_length: int | None = checked(None, COUNT)
    do_sample: bool = checked(False, boolean)
    temperature: float = checked(1.0, values_of.temperature)
    top_k: int = checked(50, values_of.top_k)
    top_p: float = checked(1.0, values_of.fraction)
    repetition_penalty: float = checked(1.0, POSITIVE)
    num_beams: int = checked(1, AT_LEAST_ONE)
    length_penalty: float = checked(1.0, number())
    early_stopping: bool | str = checked(False, values_of.early_stopping)
    num_return_sequences: int = checked(1, AT_LEAST_ONE)
    eos_token_id: tuple[int, ...] = checked((), values_of.token_ids)
    pad_token_id: int | None = checked(None, optional(values_of.token_id))
    bos_token_id: int | None = checked(None, optional(values_of.token_id))
    stop_strings: tuple[str, ...] = checked((), values_of.stop_strings)
    output_scores: bool = checked(False, boolean)
    return_dict_in_generate: bool = checked(False, boolean)
    min_p: float | None = checked(None, optional(values_of.fraction))
    top_h: float | None = checked(None, optional(number(0.0, 1.0, open_low=True)))
    typical_p: float = checked(1.0, number(0.0, 1.0, open_low=True))
    epsilon_cutoff: float = checked(0.0, number(0.0, 1.0, open_high=True))
    eta_cutoff: float = checked(0.0, number(0.0, 1.0, open_high=True))
    no_repeat_ngram_size: int = checked(0, COUNT)
    encoder_no_repeat_ngram_size: int = checked(0, COUNT)
    encoder_repetition_penalty: float = checked(1.0, POSITIVE)
    bad_words_ids: tuple[tuple[int, ...], ...] = checked((), values_of.token_sequences)
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = checked((), values_of.biases)
    suppress_tokens: tuple[int, ...] = checked((), values_of.token_ids)
    begin_suppress_tokens: tuple[int, ...] = checked((), values_of.token_ids)
    forced_bos_token_id: tuple[int, ...] = checked((), values_of.token_ids)
    forced_eos_token_id: tuple[int, ...] = checked((), values_of.token_ids)
    exponential_decay_length_penalty: tuple[int, float] | None = checked(None, values_of.decay)
    renormalize_logits: bool = checked(False, boolean)
    remove_invalid_values: bool = checked(False, boolean)
    max_time: float | None = checked(None, optional(number(0.0)))
    output_logits: bool = checked(False, boolean)
    output_hidden_states: bool = checked(False, boolean)

    @classmethod
    def resolve(cls, call: Mapping[str, Any], generation_config: Any, own: Any, columns: int, *, warns: bool = True) -> Self:
        """Merge the options of a call with those of its generation_config and of the model's own; each overrides those after it.

        As in transformers, None in a call undoes what the others set, None in a configuration means not set, and max_new_tokens
        wins over max_length wherever they are set.

        Args:
            call: options by name.
            generation_config: a mapping, an object with options as attributes, or None. Options that are resolved already are returned.
            own: `model.generation_config`.
            columns: of the prompts.
            warns: whether to name options that do nothing.

        Raises:
            InputError: an option that is unknown, not supported or out of range, or options that contradict each other.
        """
        if isinstance(generation_config, cls):
            return generation_config
        given = _contents(generation_config)
        for source in (call, given if isinstance(generation_config, Mapping) else {}):
            _refuse_unknown(source)
        asked = {name: value for name, value in {**given, **call}.items() if value is not None or name in call}
        values = {name: value for name, value in {**_contents(own), **asked}.items() if value is not None}
        if "top_k" in call and call["top_k"] is None:
            values["top_k"] = 0
        values = _checked(values)
        if values.get("do_sample") and values.get("temperature") == 0:
            warn("temperature=0 with do_sample=True: the best token is taken, as with do_sample=False", stacklevel=3)
            values["do_sample"] = False
            del values["temperature"]
        if warns:
            _warn_of_no_effect({name: values[name] for name in asked if name in values}, values)
        values.pop("output_attentions", None)
        _set_lengths(values, columns)
        options = cls(**values)
        options._check_together()
        return options

    @property
    def fill(self) -> int:
        """The token after a row's end."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    @property
    def rules(self) -> list[str]:
        """The options that a captured step cannot serve, since they look at all tokens of a row or at more than its best scores."""
        idle = () if self.do_sample else _ONLY_SAMPLING
        return [one.name for one in fields(self) if one.name in _EAGER and one.name not in idle and getattr(self, one.name) != one.default]

    def _check_together(self) -> None:
        answers = self.num_return_sequences
        if self.num_beams == 1 and answers > 1 and not self.do_sample:
            raise InputError(
                got=f"generate(num_return_sequences={answers}) with greedy decoding, which gives the same answer each time",
                expected="sampling or beams for more than one answer",
                remedy="Pass do_sample=True, or num_beams of at least as many",
            )
        if 1 < self.num_beams < answers:
            raise InputError(
                got=f"generate(num_return_sequences={answers}, num_beams={self.num_beams})",
                expected="no more answers than beams",
                remedy="Raise num_beams or ask for fewer",
            )
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = getattr(self, name)
            if forced and set(forced) <= set(self.suppress_tokens):
                raise InputError(
                    got=f"generate({name}={list(forced)!r:.60}) with the same tokens in suppress_tokens",
                    expected="a forced token that is not suppressed",
                    remedy="Remove it from one of them, or pass min_new_tokens to delay the end",
                )
        if self.exponential_decay_length_penalty is not None and not self.eos_token_id:
            raise InputError(
                got="generate(exponential_decay_length_penalty=…) without an end token",
                expected="eos_token_id, whose score it raises",
                remedy="Pass eos_token_id",
            )


_EAGER = frozenset(
    [
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "bad_words_ids",
        "sequence_bias",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "renormalize_logits",
        "remove_invalid_values",
    ]
)

_CHECKS = {one.name: one.metadata["check"] for one in fields(GenerationOptions)}


def _contents(generation_config: Any) -> Mapping[str, Any]:
    """The options in a configuration. An object may carry anything, so only its known attributes are read."""
    if generation_config is None or isinstance(generation_config, Mapping):
        return generation_config or {}
    values = {name: getattr(generation_config, name) for name in (*_CHECKS, *REFUSED) if hasattr(generation_config, name)}
    if not values:
        raise InputError(
            got=f"generation_config of type {type(generation_config).__name__} without any option",
            expected="a GenerationConfig, a dictionary of options, or an object with options as attributes",
            remedy="Pass generation_config=GenerationConfig(…), or the options themselves",
        )
    return values


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    named = {name for name, value in given.items() if value is not None}
    unknown = sorted(named - _CHECKS.keys() - REFUSED.keys() - ACCEPTED)
    if unknown:
        raise InputError(
            got=f"generate() with unknown options {', '.join(unknown)}",
            expected=f"inputs of the model, or some of {', '.join(sorted(_CHECKS))}",
            remedy="Remove them",
        )


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are implemented, in their plain types, each in its range."""
    values = {}
    for name, value in given.items():
        if name == "output_attentions" and value and not given.get("return_dict_in_generate"):
            values[name] = value  # transformers ignores it too
        elif name in REFUSED and _plain(name, value) not in REFUSED[name]:
            raise InputError(got=f"generate({name}={value!r:.60})", expected=f"no {name}, which is not supported", remedy="Remove it")
        if name in _CHECKS:
            values[name] = _plain(name, value)
            if expected := _CHECKS[name](values[name]):
                raise InputError(got=f"generate({name}={shown(value)})", expected=expected, remedy=f"Change or remove {name}")
    return values


def _plain(name: str, value: Any) -> Any:
    """NumPy values and tensors as numbers; ids, strings and sequences as tuples."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if name in _SEVERAL:
        several = value if isinstance(value, list | tuple | set | frozenset | range) else (value,)
        return tuple(_plain("", one) for one in several)
    if name == "sequence_bias":
        pairs = value.items() if isinstance(value, Mapping) else value
        return _tuples(list(pairs)) if isinstance(value, Mapping | list | tuple) else (value,)
    return _tuples(value) if name in ("bad_words_ids", "exponential_decay_length_penalty") else value


def _tuples(value: Any) -> Any:
    """Lists as tuples, however deep; an item alone where a list should be is left for its check to refuse."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else _plain("", value)


def _warn_of_no_effect(asked: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Name the options of a call that do nothing. Those of a model's own configuration are there for other calls."""
    idle = list(_idle(asked, values))
    if "max_new_tokens" in values and "max_length" in asked:
        idle.append(("max_length", f"next to max_new_tokens={values['max_new_tokens']}"))
    for name, reason in idle:
        warn(f"generate({name}={shown(asked[name])}) has no effect {reason}.", stacklevel=6)


def _idle(asked: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    needs = [
        (_ONLY_SAMPLING, values.get("do_sample", False), "without do_sample=True"),
        (_ONLY_BEAMS, values.get("num_beams", 1) > 1, "without num_beams above 1"),
        (_ONLY_RECORDS, values.get("return_dict_in_generate", False), "without return_dict_in_generate=True"),
    ]
    for neutral, has_effect, reason in needs:
        if not has_effect:
            yield from ((name, reason) for name in neutral if name in asked and asked[name] not in neutral[name])


def _set_lengths(values: dict[str, Any], columns: int) -> None:
    """Set the numbers of new tokens from the lengths in columns, unless they are set themselves."""
    if "max_new_tokens" not in values:
        values["max_new_tokens"] = values["max_length"] - columns if "max_length" in values else _NEW_TOKENS_BY_DEFAULT
    if values["max_new_tokens"] < 0:
        raise InputError(
            got=f"max_length={values['max_length']} for prompts of {columns} columns",
            expected="room for new tokens",
            remedy="Pass max_new_tokens",
        )
    values["max_new_tokens"] = min(values["max_new_tokens"], _LONGEST)
    values.setdefault("min_new_tokens", max(0, values.get("min_length", 0) - columns))
