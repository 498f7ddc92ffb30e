"""What becomes of each option of transformers 5.23's GenerationConfig: implemented, accepted without effect, or refused.

Implemented are the fields of `GenerationOptions`. None never has an effect, except that in a call it undoes what a configuration set.
"""

from collections.abc import Callable
from typing import Any

from granite_speech.config_values import integer, number

__all__ = [
    "ACCEPTED",
    "AT_LEAST_ONE",
    "COUNT",
    "POSITIVE",
    "REFUSED",
    "biases",
    "decay",
    "early_stopping",
    "fraction",
    "stop_strings",
    "temperature",
    "token_id",
    "token_ids",
    "token_sequences",
    "top_k",
]

Check = Callable[[Any], str | None]

# About the runtime or the helpers of transformers: no value changes a token here.
ACCEPTED = frozenset(
    [
        "use_cache",
        "cache_config",
        "max_cache_len",
        "prefill_chunk_size",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "max_matching_ngram_size",
        "speculation_type",
        "decoder_start_token_id",
        "transformers_version",
        "_from_model_config",
        "_commit_hash",  # written by versions before 5.23
    ]
)

# Refused, except for these values, which have no effect.
REFUSED: dict[str, tuple] = {
    # Every cache of transformers holds the same keys, except the one that rounds them.
    "cache_implementation": (
        "dynamic",
        "dynamic_full",
        "static",
        "offloaded",
        "offloaded_static",
        "sliding_window",
        "hybrid",
        "hybrid_chunked",
        "offloaded_hybrid",
        "offloaded_hybrid_chunked",
        "paged",
    ),
    "guidance_scale": (1,),
    "diversity_penalty": (0,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "low_memory": (False,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "is_assistant": (False,),
    "output_attentions": (False,),
    "assistant_early_exit": (),
    "prompt_lookup_num_tokens": (),
    "watermarking_config": (),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
}

COUNT, AT_LEAST_ONE, POSITIVE = integer(0), integer(1), number(0.0, open_low=True)

# A share of a probability or of an entropy.
fraction = number(0.0, 1.0)


def temperature(value: Any) -> str | None:
    return number(0.0)(value) and "a number above 0, or do_sample=False to decode greedily"


def top_k(value: Any) -> str | None:
    return COUNT(value) and "an integer from 1, or 0 to keep all tokens"


def early_stopping(value: Any) -> str | None:
    return None if isinstance(value, bool) or value == "never" else "True, False or 'never'"


def token_id(value: Any) -> str | None:
    return integer()(value) and "a token id"


def token_ids(value: Any) -> str | None:
    return "a token id or a list of them" if any(map(token_id, value)) else None


def stop_strings(value: Any) -> str | None:
    right = all(isinstance(one, str) and one for one in value)
    return None if right else "a string or a list of strings, none of them empty"


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and not any(map(COUNT, value))


def token_sequences(value: Any) -> str | None:
    return None if all(map(_is_sequence, value)) else "a list of lists of token ids, none of them empty"


def biases(value: Any) -> str | None:
    pairs = all(isinstance(one, tuple) and len(one) == 2 and _is_sequence(one[0]) for one in value)
    # −inf forbids a sequence.
    right = pairs and all(bias == float("-inf") or number()(bias) is None for _, bias in value)
    return None if right else "a dictionary of numbers by tuples of token ids, or a list of [token ids, number]"


def decay(value: Any) -> str | None:
    right = value is None or (isinstance(value, tuple) and len(value) == 2 and integer()(value[0]) is None and POSITIVE(value[1]) is None)
    return None if right else "a number of tokens and a factor above 0"
