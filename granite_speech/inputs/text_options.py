"""The options of a tokenizer's call: how texts are cut, padded and returned. Names and defaults are those of transformers."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from granite_speech.errors import InputError

__all__ = ["UNLIMITED", "TextOptions", "check_choice", "padding_and_limit"]

# The model_max_length of a tokenizer without a limit.
UNLIMITED = int(1e30)
_LIMITS = 1e20  # anything above is no limit

_TRUNCATIONS = ("longest_first", "only_first", "only_second")


@dataclass(frozen=True)
class TextOptions:
    """Options of `GraniteSpeechTokenizer.__call__`, whose docstring describes them.

    After `resolved`, padding is "longest", "max_length" or None; truncation is one of the strategies or None.
    """

    add_special_tokens: bool = True
    padding: bool | str | None = False
    truncation: bool | str | None = None
    max_length: int | None = None
    stride: int = 0
    is_split_into_words: bool = False
    pad_to_multiple_of: int | None = None
    padding_side: str | None = None
    return_tensors: str | None = None
    return_token_type_ids: bool | None = None
    return_attention_mask: bool | None = None
    return_overflowing_tokens: bool = False
    return_special_tokens_mask: bool = False
    return_offsets_mapping: bool = False
    return_length: bool = False
    verbose: bool = True
    split_special_tokens: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From a call's keywords.

        Raises:
            InputError: an unknown keyword.
        """
        names = {one.name for one in fields(cls)}
        if unknown := sorted(options.keys() - names):
            raise InputError(
                got=f"unknown options {', '.join(unknown)}", expected=f"text options: {', '.join(sorted(names))}", remedy="Remove them"
            )
        return cls(**options)

    def resolved(self, model_max_length: int) -> Self:
        """The same with defaults filled in.

        Raises:
            InputError: a value that is not one of those allowed, or values that contradict each other.
        """
        check_choice("return_tensors", self.return_tensors, (None, "pt", "np"))
        check_choice("padding_side", self.padding_side, (None, "left", "right"))
        _check_count("pad_to_multiple_of", self.pad_to_multiple_of, 1)
        _check_count("stride", self.stride, 0)
        truncation, padding = self.truncation, self.padding
        if truncation is None and self.max_length is not None and padding in (False, None):
            truncation = True
        check_choice("truncation", truncation, (True, False, None, "do_not_truncate", *_TRUNCATIONS))
        truncation = "longest_first" if truncation is True else None if truncation in (False, "do_not_truncate") else truncation
        padding, limit = padding_and_limit(padding, self.max_length, model_max_length, cut=truncation is not None, verbose=self.verbose)
        if truncation is not None and limit is None:
            truncation = _without_limit("truncation", self.verbose)
        multiple = self.pad_to_multiple_of
        if truncation and padding and multiple and limit is not None and limit % multiple:
            raise InputError(
                got=f"max_length={limit} with pad_to_multiple_of={multiple}",
                expected="a multiple, because texts are cut and padded",
                remedy=f"Pass max_length={limit // multiple * multiple or multiple}",
            )
        return replace(self, padding=padding, truncation=truncation, max_length=limit)


def padding_and_limit(
    padding: bool | str | None, max_length: int | None, model_max_length: int, *, cut: bool = False, verbose: bool = True
) -> tuple[str | None, int | None]:
    """What a call's padding and max_length mean.

    Args:
        padding: True or "longest", "max_length", or False, None or "do_not_pad".
        max_length: the caller's.
        model_max_length: the tokenizer's, used where padding or truncation needs a length and there is none.
        cut: whether texts are truncated.
        verbose: whether to warn about an option without effect.

    Returns:
        "longest", "max_length" or None; and the length, if there is one.
    """
    check_choice("padding", padding, (True, False, None, "longest", "max_length", "do_not_pad"))
    _check_count("max_length", max_length, 0)
    if padding is True and max_length is not None and not cut and verbose:
        warnings.warn(
            "max_length has no effect with padding=True and no truncation. Pass padding='max_length' to pad to it, or truncation=True.",
            UserWarning,
            stacklevel=4,
        )
    padding = "longest" if padding is True else None if padding in (False, "do_not_pad") else padding
    if max_length is None and (padding == "max_length" or cut) and model_max_length <= _LIMITS:
        max_length = model_max_length
    if padding == "max_length" and max_length is None:
        padding = _without_limit("padding='max_length'", verbose)
    return padding, max_length


def _without_limit(option: str, verbose: bool) -> None:
    if verbose:
        warnings.warn(
            f"{option} has no effect: there is no max_length, and the tokenizer has no model_max_length.", UserWarning, stacklevel=5
        )


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise InputError if an option has none of these values."""
    if not any(value is one or (isinstance(one, str) and isinstance(value, str) and value == one) for one in choices):
        raise InputError(got=f"{name} = {value!r:.40}", expected=f"one of {choices}", remedy=f"Pass {name} as one of those")


def _check_count(name: str, value: Any, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise InputError(got=f"{name} = {value!r:.40}", expected=f"an integer from {least}", remedy="Correct it")
