"""What `generate` can be told: transformers' names, where their values come from, and what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor

from granite_speech.config import GraniteConfig
from granite_speech.errors import InputError

__all__ = ["GenerationOptions"]

_NEW_TOKENS_BY_DEFAULT = 20
_LONGEST = 1 << 20  # a hundred times the longest answer to be expected; memory is set aside for what is asked

# Options of transformers that are not done here, and the values at which they do nothing. None does nothing for any option.
_WITHOUT_EFFECT: dict[str, tuple] = {
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "diversity_penalty": (0,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "min_p": (),
    "top_h": (),
    "max_time": (),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "prompt_lookup_num_tokens": (),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
}

# Options of transformers about how it runs, or about a model of another kind: here they are read over.
_READ_OVER = frozenset(
    [
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "return_legacy_cache",
        "low_memory",
        "prefill_chunk_size",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "max_matching_ngram_size",
        "speculation_type",
        "use_mtp",
        "decoder_start_token_id",
        "generation_kwargs",
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
    ]
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")


def _whole(least: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least, f"a whole number from {least}"


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _are_ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


_IDS = (_are_ids, "a token id or a list of them")
_FLAG = (_is_bool, "True or False")
_ABOVE_0 = (lambda value: _is_number(value) and value > 0, "a number above 0")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda value: _whole(0)[0](value) and value <= _LONGEST, f"a whole number from 0 to {_LONGEST}"),
    "max_length": _whole(1),
    "min_new_tokens": _whole(0),
    "min_length": _whole(0),
    "do_sample": _FLAG,
    "temperature": (_ABOVE_0[0], "a number above 0, or do_sample=False to decode greedily"),
    "top_k": (_whole(0)[0], "a whole number from 1, or 0 to keep all tokens"),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "repetition_penalty": _ABOVE_0,
    "num_beams": _whole(1),
    "length_penalty": (_is_number, "a number"),
    "early_stopping": (lambda value: _is_bool(value) or value == "never", "True, False or 'never'"),
    "num_return_sequences": _whole(1),
    "eos_token_id": _IDS,
    "pad_token_id": (lambda value: _are_ids((value,)), "a token id"),
    "bos_token_id": (lambda value: _are_ids((value,)), "a token id"),
    "stop_strings": (
        lambda value: isinstance(value, tuple) and all(isinstance(one, str) and one for one in value),
        "a string or a list of strings, none of them empty",
    ),
    "output_scores": _FLAG,
    "return_dict_in_generate": _FLAG,
    "use_cache": (lambda value: value is True, "True: every step reads its keys from the cache"),
}


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to decode; names, meanings and defaults are those of transformers 5.17's GenerationConfig.

    Attributes:
        max_new_tokens: tokens to add at most; 20 where neither this nor max_length is said.
        max_length: columns of prompt and answer at most, where max_new_tokens is not given beside it.
        min_new_tokens: no end token before so many new ones.
        min_length: the same counted in columns, where min_new_tokens is not given beside it.
        do_sample: draw from the softmax; otherwise the best token, or the best beams, are taken.
        temperature: divides the scores before the softmax, above 0.
        top_k: draw among so many best tokens; 0: among all.
        top_p: then among the fewest whose probabilities reach this sum, in (0, 1].
        repetition_penalty: scores of tokens that the row has (prompt without padding, and answer) are divided by it where
            positive and multiplied where negative.
        num_beams: hypotheses that are kept of each row; 1: no beam search.
        length_penalty: a finished beam's score is the sum of its log-probabilities over its length to this power.
        early_stopping: True: end when num_beams beams have ended. False: when the best open beam's score at its present
            length is no better than the worst ended one. "never": the same, at the greatest length it could have.
        num_return_sequences: answers to each row.
        eos_token_id: a row ends with any of these.
        pad_token_id: fills a row behind its end; the first of eos_token_id where nobody says it, and for beams where it is 0.
        bos_token_id: accepted; a prompt is never begun here.
        stop_strings: a row ends with the token that completes one of these in its text, prompt included.
        output_scores: return the scores too, with return_dict_in_generate.
        return_dict_in_generate: return a `GenerateOutput`.
        use_cache: True.
    """

    max_new_tokens: int
    min_new_tokens: int
    eos_token_id: tuple[int, ...]
    pad_token_id: int
    max_length: int | None = None
    min_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    bos_token_id: int | None = None
    stop_strings: tuple[str, ...] = ()
    output_scores: bool = False
    return_dict_in_generate: bool = False
    use_cache: bool = True

    @classmethod
    def resolve(
        cls, call: dict[str, Any], generation_config: Any, file: dict[str, Any] | None, text_config: GraniteConfig, columns: int
    ) -> Self:
        """Put together what the call, its generation_config, the checkpoint's file and the text configuration say, in that order.

        Args:
            call: options by name; None counts as not given, everywhere.
            generation_config: a mapping, or an object with options as attributes.
            file: contents of the checkpoint's generation_config.json.
            columns: of the prompts.

        Raises:
            InputError: an unknown option, one that is not done here, a value out of range, or options that contradict.
        """
        known = {one.name for one in fields(cls)}
        given = _contents(generation_config, known)
        _refuse_unknown(call, known)
        _refuse_unknown(given, known)
        special = {name: getattr(text_config, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
        layers = [_checked(layer, known) for layer in (call, given, file or {}, special)]

        values = {name: value for layer in reversed(layers) for name, value in layer.items()}
        _refuse_without_sampling(layers[0], values.get("do_sample", False))
        values["max_new_tokens"] = _count(layers, "max_new_tokens", "max_length", columns, _NEW_TOKENS_BY_DEFAULT)
        values["min_new_tokens"] = max(0, _count(layers, "min_new_tokens", "min_length", columns, 0))
        if values["max_new_tokens"] < 0:
            raise InputError(
                got=f"max_length={values['max_length']} for prompts of {columns} columns",
                expected="room for new tokens",
                remedy="Pass max_new_tokens",
            )
        values["max_new_tokens"] = min(values["max_new_tokens"], _LONGEST)
        ends = values.setdefault("eos_token_id", ())
        values.setdefault("pad_token_id", ends[0] if ends else 0)
        options = cls(**values)
        options._check_number_of_answers()
        return options

    def _check_number_of_answers(self) -> None:
        several = self.num_return_sequences
        if self.num_beams == 1 and several > 1 and not self.do_sample:
            raise InputError(
                got=f"generate(num_return_sequences={several}) of greedy decoding, whose answers would all be the same",
                expected="sampling or beams for more than one answer",
                remedy="Pass do_sample=True, or num_beams of at least as many",
            )
        if 1 < self.num_beams < several:
            raise InputError(
                got=f"generate(num_return_sequences={several}, num_beams={self.num_beams})",
                expected="no more answers than beams",
                remedy="Raise num_beams or ask for fewer",
            )


def _contents(generation_config: Any, known: set[str]) -> Mapping[str, Any]:
    """A configuration's options; of an object, which may carry anything besides, only names that mean something here."""
    if generation_config is None or isinstance(generation_config, Mapping):
        return generation_config or {}
    values = {name: getattr(generation_config, name) for name in (*known, *_WITHOUT_EFFECT) if hasattr(generation_config, name)}
    if not values:
        raise InputError(
            got=f"generation_config of type {type(generation_config).__name__} without a single option",
            expected="a dictionary of options, or an object with them as attributes",
            remedy="Pass transformers' GenerationConfig, or the options themselves",
        )
    return values


def _refuse_unknown(given: Mapping[str, Any], known: set[str]) -> None:
    named = {name for name, value in given.items() if value is not None}
    unknown = sorted(named - known - _WITHOUT_EFFECT.keys() - _READ_OVER)
    if unknown:
        raise InputError(
            got=f"generate() with unknown options {', '.join(unknown)}",
            expected=f"some of {', '.join(sorted(known))}",
            remedy="Leave them out",
        )


def _checked(layer: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The options of one source that are not None, in their plain types, each in its range."""
    values = {}
    for name, value in layer.items():
        if value is None:
            continue
        if name in _WITHOUT_EFFECT and value not in _WITHOUT_EFFECT[name]:
            raise InputError(got=f"generate({name}={value!r:.60})", expected=f"no {name}, which is not done here", remedy="Leave it out")
        if name in known:
            values[name] = plain = _plain(name, value)
            is_right, expected = _RULES[name]
            if not is_right(plain):
                raise InputError(got=f"generate({name}={value!r:.60})", expected=expected, remedy=f"Change {name} or leave it out")
    return values


def _plain(name: str, value: Any) -> Any:
    """Tensors as numbers; one or several as a tuple."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if name in ("eos_token_id", "stop_strings"):
        return tuple(value) if isinstance(value, (list, tuple, set)) else (value,)
    return value


def _refuse_without_sampling(call: dict[str, Any], do_sample: bool) -> None:
    """A temperature that would do nothing is a mistake in a call; in a file it waits for calls that sample."""
    for name, neutral in (("temperature", (1,)), ("top_p", (1,)), ("top_k", (0, 50))):
        if name in call and call[name] not in neutral and not do_sample:
            raise InputError(
                got=f"generate({name}={call[name]!r}) without sampling",
                expected="do_sample=True beside it",
                remedy=f"Add it, or leave {name} out",
            )


def _count(layers: list[dict[str, Any]], new: str, length: str, columns: int, default: int) -> int:
    """New tokens, from the first source that says either; where one says both, the number of new tokens counts."""
    for layer in layers:
        if new in layer:
            return layer[new]
        if length in layer:
            return layer[length] - columns
    return default
