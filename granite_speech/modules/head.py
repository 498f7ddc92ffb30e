"""The language model's head on the positions that a caller keeps, and the loss of its logits."""

import torch
import torch.nn.functional as F
from granite_kernels.op import accumulator
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.outputs import BaseModelOutputWithPast
from granite_speech.modules.rows import Rows
from granite_speech.modules.transfers import on_device, on_host

__all__ = ["check_labels", "next_token_loss", "padded_logits", "project"]


def check_labels(labels: Tensor | None, logits_to_keep: int | Tensor) -> None:
    """Raise InputError for labels of positions without logits."""
    if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        raise InputError(got="labels with logits_to_keep", expected="one of them", remedy="Omit logits_to_keep to get a loss")


def project(language_model, output: BaseModelOutputWithPast, logits_to_keep: int | Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the kept positions of a pass. Masked positions have none, unless the head has hooks, which see whole rows.

    Args:
        language_model: has the head, and `logits`.
        output: of the model without head.
        logits_to_keep: how many last columns (0: all), or a tensor of columns.

    Returns:
        `(kept, vocabulary)`, and for `padded_logits` the place of each row's and column's logits in it, `(batch, columns)` int64 on
        the host, −1 for masked positions.
    """
    # Without a gradient of the states, the head must not record one of its own.
    with torch.set_grad_enabled(torch.is_grad_enabled() and not output.is_detached):
        return _project(language_model, output, logits_to_keep)


def _project(language_model, output: BaseModelOutputWithPast, logits_to_keep: int | Tensor) -> tuple[Tensor, Tensor]:
    rows, states = output.rows, output.states_to_project()
    places = rows.places(_kept_columns(logits_to_keep, rows.width))
    kept = places[places >= 0]
    if not torch.equal(kept, torch.arange(len(states))):
        states = states.index_select(0, on_device(kept, states.device))
    if places.numel() and have_hooks(language_model.lm_head):
        logits = language_model.logits(padded_logits(states, places))
        return logits.flatten(0, 1).index_select(0, on_device((places >= 0).flatten().nonzero().squeeze(1), logits.device)), places
    return language_model.logits(states), places


def padded_logits(packed: Tensor, places: Tensor) -> Tensor:
    """`(kept, width)` → `(batch, columns, width)`, zero where `places` is −1."""
    if bool((places >= 0).all()):
        return packed.view(*places.shape, packed.shape[1])
    filled = on_device((places >= 0).flatten().nonzero().squeeze(1), packed.device)
    return packed.new_zeros(places.numel(), packed.shape[1]).index_copy(0, filled, packed).view(*places.shape, packed.shape[1])


def _kept_columns(logits_to_keep: int | Tensor, width: int) -> range | Tensor:
    """Numbers of the columns to return logits for."""
    if not isinstance(logits_to_keep, Tensor):
        return range(width)[-logits_to_keep:]
    (columns,) = on_host(logits_to_keep)
    return columns.nonzero().squeeze(1) if columns.dtype == torch.bool else columns


def next_token_loss(logits: Tensor, labels: Tensor, rows: Rows, num_items: int | Tensor | None) -> Tensor:
    """Cross entropy of each label given the tokens before it in its row: the mean, or the sum divided by `num_items`.

    Labels of −100 do not count.

    A label counts if the attention mask keeps its own column and the one before. After left padding, a row's first token thus
    has no prediction, as in the unpadded row.
    """
    shape = (len(rows.segments.lengths), rows.width)
    if labels.shape != shape:
        raise InputError(got=f"labels of shape {tuple(labels.shape)}", expected=f"{shape}, as input_ids", remedy="Pad both in the same way")
    columns = rows.kept[1:]
    follows = (columns == rows.kept[:-1] + 1) & (columns % max(rows.width, 1) != 0)
    answers = labels.flatten().index_select(0, on_device(columns[follows], labels.device))
    logits = logits.index_select(0, on_device(follows.nonzero().squeeze(1), logits.device))
    logits, answers = logits.to(accumulator(logits.dtype)), on_device(answers, logits.device)
    if num_items is None:
        return F.cross_entropy(logits, answers, ignore_index=-100)
    if isinstance(num_items, Tensor):
        num_items = num_items.to(logits.device)
    return F.cross_entropy(logits, answers, ignore_index=-100, reduction="sum") / num_items
