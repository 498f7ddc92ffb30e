"""The table of token embeddings and the output head: getting, replacing, resizing and tying them, as transformers' models do."""

import torch
from torch import Tensor, nn

from granite_speech.config import GraniteSpeechConfig
from granite_speech.errors import InputError
from granite_speech.modules.language_model import GraniteModel

__all__ = ["Embeddings", "checked_embeddings"]

# Of the variance of the old rows: new rows are almost their mean, but not all the same.
_SPREAD = 1e-9


class Embeddings(nn.Module):
    """For a model with `config` and `decoder`, the language model without its head."""

    config: GraniteSpeechConfig
    decoder: GraniteModel

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embeddings. A tied head keeps the earlier ones until `tie_weights`."""
        self.decoder.embed_tokens = checked_embeddings(value)
        self.config.text_config.vocab_size = value.weight.shape[0]

    def get_output_embeddings(self) -> nn.Linear | None:
        """The output head; None for the model without one."""
        return None

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """Make the head's weight that of the embeddings, if the configuration says so.

        Args:
            missing_keys, recompute_mapping: of transformers' loading; they change nothing here.
        """
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight
            head.out_features = head.weight.shape[0]

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the number of tokens of embeddings and head; the rows of the tokens that stay keep their values.

        Args:
            new_num_tokens: rows afterwards; None keeps their number.
            pad_to_multiple_of: rounds the number up.
            mean_resizing: new rows are drawn around the mean of the old ones (Hewitt, "Initializing New Word Embeddings for Pretrained
                Language Models", 2021); False draws them around zero with the configuration's `initializer_range`.

        Returns:
            The embeddings, the same module as before.

        Raises:
            InputError: a number that is not an integer from 1.
        """
        embeddings, head = self.get_input_embeddings(), self.get_output_embeddings()
        for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(got=f"{name}={value!r:.60}", expected="an integer from 1, or None", remedy="Pass len(tokenizer)")
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        rows, step = new_num_tokens or embeddings.weight.shape[0], pad_to_multiple_of or 1
        rows = -(-rows // step) * step
        spread = None if mean_resizing else self.config.text_config.initializer_range
        _resize(embeddings, rows, spread)
        embeddings.num_embeddings = rows
        if embeddings.padding_idx is not None and embeddings.padding_idx >= rows:
            embeddings.padding_idx = None
        if head is not None:
            _resize(head, rows, spread)  # a tied one has the rows already
            head.out_features = rows
        self.config.text_config.vocab_size = rows
        self.tie_weights()
        return embeddings


def checked_embeddings(value: nn.Module) -> nn.Module:
    if not isinstance(value, nn.Module) or not isinstance(getattr(value, "weight", None), Tensor):
        raise InputError(
            got=f"embeddings of type {type(value).__name__}",
            expected="a module with a weight (tokens, hidden_size)",
            remedy="Pass a torch.nn.Embedding, or a torch.nn.Linear without bias for the head",
        )
    return value


@torch.no_grad()
def _resize(module: nn.Module, rows: int, spread: float | None) -> None:
    """Give a module's weight this many rows. `spread`: of the new ones around zero; None: they are drawn around the mean."""
    weight = module.weight
    if weight.shape[0] == rows:
        return
    kept, added = weight[:rows], rows - weight.shape[0]
    if added > 0:
        new = _near_mean(weight, added) if spread is None else torch.randn(added, weight.shape[1], device=weight.device) * spread
        kept = torch.cat((kept, new.to(weight.dtype)))
    # In place of the values, so that optimizers and a tied head keep the same parameter.
    weight.data, weight.grad = kept.clone(), None


def _near_mean(weight: Tensor, count: int) -> Tensor:
    old = weight.float()
    mean = old.mean(0)
    centered = old - mean
    factor, failed = torch.linalg.cholesky_ex(centered.T @ centered / len(old) * _SPREAD)
    if failed:  # too few rows to have a variance in every direction
        return mean.expand(count, -1)
    return mean + torch.randn(count, len(mean), device=weight.device) @ factor.T
