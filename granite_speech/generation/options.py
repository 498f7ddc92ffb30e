"""Options of `generate`: transformers' names, the sources of their values, and the values that are refused."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, fields
from typing import Any, Self

from torch import Tensor

from granite_speech.config import GraniteConfig
from granite_speech.config_values import boolean, checked, integer, number, shown
from granite_speech.errors import InputError

__all__ = ["GenerationOptions"]

_NEW_TOKENS_BY_DEFAULT = 20
_LONGEST = 1 << 20  # a hundred times the longest answer to be expected; memory is reserved according to this number

# transformers' options that are not supported here, and their values that have no effect. None never has an effect.
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

# transformers options about its own runtime or other model types: ignored here.
_IGNORED = frozenset(
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


_COUNT, _AT_LEAST_ONE, _ABOVE_0 = integer(0), integer(1), number(0.0, open_low=True)


def _temperature(value: Any) -> str | None:
    return _ABOVE_0(value) and "a number above 0, or do_sample=False to decode greedily"


def _top_k(value: Any) -> str | None:
    return _COUNT(value) and "an integer from 1, or 0 to keep all tokens"


def _early_stopping(value: Any) -> str | None:
    return None if isinstance(value, bool) or value == "never" else "True, False or 'never'"


def _token_id(value: Any) -> str | None:
    return integer()(value) and "a token id"


def _token_ids(value: Any) -> str | None:
    return "a token id or a list of them" if any(map(_token_id, value)) else None


def _stop_strings(value: Any) -> str | None:
    right = all(isinstance(one, str) and one for one in value)
    return None if right else "a string or a list of strings, none of them empty"


def _use_cache(value: Any) -> str | None:
    return None if value is True else "True: every step reads its keys from the cache"


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
        bos_token_id: accepted and not used.
        stop_strings: a row ends with the token that completes one of these in its text, prompt included.
        output_scores: with return_dict_in_generate, return the scores too.
        return_dict_in_generate: return a `GenerateOutput`.
        use_cache: True.
    """

    max_new_tokens: int = checked(_NEW_TOKENS_BY_DEFAULT, integer(0, _LONGEST))
    min_new_tokens: int = checked(0, _COUNT)
    max_length: int | None = checked(None, _AT_LEAST_ONE)
    min_length: int | None = checked(None, _COUNT)
    do_sample: bool = checked(False, boolean)
    temperature: float = checked(1.0, _temperature)
    top_k: int = checked(50, _top_k)
    top_p: float = checked(1.0, number(0.0, 1.0, open_low=True))
    repetition_penalty: float = checked(1.0, _ABOVE_0)
    num_beams: int = checked(1, _AT_LEAST_ONE)
    length_penalty: float = checked(1.0, number())
    early_stopping: bool | str = checked(False, _early_stopping)
    num_return_sequences: int = checked(1, _AT_LEAST_ONE)
    eos_token_id: tuple[int, ...] = checked((), _token_ids)
    pad_token_id: int = checked(0, _token_id)
    bos_token_id: int | None = checked(None, _token_id)
    stop_strings: tuple[str, ...] = checked((), _stop_strings)
    output_scores: bool = checked(False, boolean)
    return_dict_in_generate: bool = checked(False, boolean)
    use_cache: bool = checked(True, _use_cache)

    @classmethod
    def resolve(
        cls, call: dict[str, Any], generation_config: Any, file: dict[str, Any] | None, text_config: GraniteConfig, columns: int
    ) -> Self:
        """Merge the options of a call with those of its generation_config, the checkpoint's file and the text configuration.

        Each source overrides those after it.

        Args:
            call: options by name; None means not set, here and in the other sources.
            generation_config: a mapping, or an object with options as attributes.
            file: contents of the checkpoint's generation_config.json.
            columns: of the prompts.

        Raises:
            InputError: an option that is unknown, not supported or out of range, or options that contradict each other.
        """
        checks = {one.name: one.metadata["check"] for one in fields(cls)}
        given = _contents(generation_config, checks.keys())
        _refuse_unknown(call, checks.keys())
        _refuse_unknown(given, checks.keys())
        special = {name: getattr(text_config, name, None) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
        sources = [_checked(source, checks) for source in (call, given, file or {}, special)]

        values = {name: value for source in reversed(sources) for name, value in source.items()}
        _refuse_without_sampling(sources[0], values.get("do_sample", False))
        values["max_new_tokens"] = _new_tokens(sources, "max_new_tokens", "max_length", columns, _NEW_TOKENS_BY_DEFAULT)
        values["min_new_tokens"] = max(0, _new_tokens(sources, "min_new_tokens", "min_length", columns, 0))
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


def _contents(generation_config: Any, known: Set[str]) -> Mapping[str, Any]:
    """The options in a configuration. An object may carry anything, so only its known attributes are read."""
    if generation_config is None or isinstance(generation_config, Mapping):
        return generation_config or {}
    values = {name: getattr(generation_config, name) for name in (*known, *_WITHOUT_EFFECT) if hasattr(generation_config, name)}
    if not values:
        raise InputError(
            got=f"generation_config of type {type(generation_config).__name__} without any option",
            expected="a dictionary of options, or an object with options as attributes",
            remedy="Pass transformers' GenerationConfig, or the options themselves",
        )
    return values


def _refuse_unknown(given: Mapping[str, Any], known: Set[str]) -> None:
    named = {name for name, value in given.items() if value is not None}
    unknown = sorted(named - known - _WITHOUT_EFFECT.keys() - _IGNORED)
    if unknown:
        raise InputError(
            got=f"generate() with unknown options {', '.join(unknown)}",
            expected=f"some of {', '.join(sorted(known))}",
            remedy="Remove them",
        )


def _checked(source: Mapping[str, Any], checks: Mapping[str, Callable[[Any], str | None]]) -> dict[str, Any]:
    """The options of one source that are set, in their plain types, each in its range."""
    values = {}
    for name, value in source.items():
        if value is None:
            continue
        if name in _WITHOUT_EFFECT and value not in _WITHOUT_EFFECT[name]:
            raise InputError(got=f"generate({name}={value!r:.60})", expected=f"no {name}, which is not supported", remedy="Remove it")
        if name in checks:
            values[name] = _plain(name, value)
            if expected := checks[name](values[name]):
                raise InputError(got=f"generate({name}={shown(value)})", expected=expected, remedy=f"Change or remove {name}")
    return values


def _plain(name: str, value: Any) -> Any:
    """Tensors as numbers; one or several ids or strings as a tuple."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if name in ("eos_token_id", "stop_strings"):
        return tuple(value) if isinstance(value, (list, tuple, set)) else (value,)
    return value


def _refuse_without_sampling(call: dict[str, Any], do_sample: bool) -> None:
    """A temperature that has no effect is a mistake in a call; in a file it is there for calls that sample."""
    for name, neutral in (("temperature", (1,)), ("top_p", (1,)), ("top_k", (0, 50))):
        if name in call and call[name] not in neutral and not do_sample:
            raise InputError(
                got=f"generate({name}={call[name]!r}) without sampling",
                expected="do_sample=True with it",
                remedy=f"Add do_sample=True, or remove {name}",
            )


def _new_tokens(sources: list[dict[str, Any]], new: str, length: str, columns: int, default: int) -> int:
    """A number of new tokens, from the first source that sets either option; the option `new` wins within a source."""
    for source in sources:
        if new in source:
            return source[new]
        if length in source:
            return source[length] - columns
    return default
