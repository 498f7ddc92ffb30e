"""Padding of token ids that are already there, as a collator does it: `GraniteSpeechTokenizer.pad`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from granite_speech.errors import InputError

__all__ = ["need_pad_token", "padded", "round_up"]


def padded(
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    padding: str | None,
    max_length: int | None,
    pad_to_multiple_of: int | None,
    left: bool,
    pad_token_id: int | None,
    attention_mask: bool,
) -> tuple[dict[str, Any], str | None]:
    """Token ids and their masks, padded. Other entries are collected and not changed.

    Args:
        inputs: one encoded text, a batch as one dictionary of lists, or a list of encoded texts; lists, arrays or tensors.
        padding: "longest", "max_length" or None.
        max_length: for "max_length".
        pad_to_multiple_of: lengths are rounded up to a multiple of this.
        left: whether to pad on the left.
        pad_token_id: the filler.
        attention_mask: whether to add an attention_mask that is missing.

    Returns:
        Lists; and "pt" or "np" if the token ids were tensors or arrays, otherwise None.

    Raises:
        InputError: no input_ids, or entries of unequal numbers of texts.
    """
    batch = _gathered(inputs)
    ids = batch.get("input_ids")
    if ids is None:
        raise InputError(
            got=f"encoded texts with {', '.join(map(repr, batch)) or 'no entries'}",
            expected="input_ids",
            remedy="Pass the tokenizer's result",
        )
    kind = _kind(ids)
    # A mask of two or more dimensions for each text is not one of tokens, and is only stacked.
    given = batch.get("attention_mask")
    keep = given if _rank(given) - _rank(ids) > 0 else None
    batch = {name: value if value is keep else _as_lists(value) for name, value in batch.items()}
    ids = batch["input_ids"]
    single = bool(ids) and not isinstance(ids[0], list)
    if single:
        batch = {name: [value] for name, value in batch.items()}
    _check_sizes(batch)
    if batch["input_ids"]:
        _pad_rows(batch, padding, max_length, pad_to_multiple_of, left, pad_token_id, attention_mask, keep is None)
    return ({name: value[0] for name, value in batch.items()} if single else batch), kind


def _pad_rows(batch, padding, max_length, multiple, left, pad_token_id, attention_mask, mask_is_flat) -> None:
    """Pads input_ids and the entries that go with them, in place."""
    rows = batch["input_ids"]
    if attention_mask and "attention_mask" not in batch:
        batch["attention_mask"] = [[1] * len(row) for row in rows]
    if padding is None:
        return
    target = round_up(max(map(len, rows)) if padding == "longest" else max_length, multiple)
    fillers = {"input_ids": pad_token_id, "token_type_ids": 0, "special_tokens_mask": 1}
    if mask_is_flat:
        fillers["attention_mask"] = 0
    missing = [target - len(row) for row in rows]
    if any(count > 0 for count in missing):
        need_pad_token(pad_token_id)
    for name, filler in fillers.items():
        if name in batch:
            fills = [[filler] * count for count in missing]
            batch[name] = [fill + row if left else row + fill for fill, row in zip(fills, batch[name], strict=True)]


def round_up(length: int, multiple: int | None) -> int:
    """`length`, or the next multiple of `multiple`."""
    return length if not multiple else -(-length // multiple) * multiple


def need_pad_token(pad_token_id: int | None) -> None:
    """Raise InputError if there is no token to pad with."""
    if pad_token_id is None:
        raise InputError(
            got="texts of unequal lengths and no pad token",
            expected="a pad_token",
            remedy="Set one, for example tokenizer.pad_token = tokenizer.eos_token",
        )


def _gathered(inputs: Any) -> dict[str, Any]:
    """One dictionary; from a list of them, one of lists."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, list | tuple) and inputs and all(isinstance(one, Mapping) for one in inputs):
        if missing := {name for one in inputs for name in inputs[0].keys() ^ one.keys()}:
            raise InputError(
                got=f"encoded texts of which only some have {', '.join(sorted(missing))}",
                expected="the same entries in each",
                remedy="Add or remove them",
            )
        return {name: [one[name] for one in inputs] for name in inputs[0]}
    raise InputError(
        got=f"encoded texts of type {type(inputs).__name__}",
        expected="a dictionary, or a list of them",
        remedy="Pass the tokenizer's results",
    )


def _kind(value: Any) -> str | None:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return "pt" if isinstance(value, torch.Tensor) else "np" if isinstance(value, np.ndarray) else None


def _rank(value: Any) -> int:
    """The number of dimensions."""
    rank = 0
    while isinstance(value, list | tuple) and value:
        value, rank = value[0], rank + 1
    return rank + getattr(value, "ndim", 0)


def _as_lists(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_as_lists(one) for one in value] if isinstance(value, list | tuple) else value


def _check_sizes(batch: Mapping[str, Any]) -> None:
    counts = {name: len(value) for name, value in batch.items() if hasattr(value, "__len__")}
    if len(set(counts.values())) > 1:
        raise InputError(got=f"entries for {counts} texts", expected="the same number of texts in each", remedy="Correct the batch")
