"""What the processor, the tokenizer and the feature extractor return: dictionaries whose entries are attributes too."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from granite_speech.errors import InputError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["BatchEncoding", "BatchFeature", "Span"]

# The model reads these on the host. From a GPU it would have to wait for them.
_ON_HOST = {"input_features_lengths"}


class BatchFeature(dict):
    """A dictionary whose entries are attributes too, and whose tensors move together.

    Args:
        data: the entries; more can be given by keyword.
        tensor_type: "pt" or "np" to convert lists of numbers, as `convert_to_tensors` does.
        skip_tensor_conversion: names of entries that are not converted.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        tensor_type: str | None = None,
        skip_tensor_conversion: Collection[str] | None = None,
        **entries: Any,
    ):
        super().__init__(data or {}, **entries)
        self.convert_to_tensors(tensor_type, skip_tensor_conversion)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no entry {name!r}; there are {sorted(self)}") from None

    @property
    def data(self) -> dict[str, Any]:
        """The entries as a plain dictionary."""
        return dict(self)

    def to(
        self,
        *args: str | int | torch.device | torch.dtype,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> Self:
        """Moves the tensors, in place as transformers does, and returns itself.

        Args:
            args: a device, a dtype or both.
            device, dtype: the same by name. Only floating-point tensors change their dtype.
            non_blocking: as in `torch.Tensor.to`.

        `input_features_lengths` stays on the CPU, because the model reads it there. It may be moved by hand: `batch[name].to(…)`.
        """
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            else:
                device = arg

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device=device, dtype=dtype if value.is_floating_point() else None, non_blocking=non_blocking)
            return type(value)(map(moved, value)) if type(value) in (list, tuple) else value

        for name in self.keys() - _ON_HOST:
            self[name] = moved(self[name])
        return self

    def convert_to_tensors(self, tensor_type: str | None = None, skip_tensor_conversion: Collection[str] | None = None) -> Self:
        """Converts lists of numbers, arrays and tensors, in place. Other entries, such as text, are left as they are.

        Args:
            tensor_type: "pt" for tensors, "np" for arrays, None for no conversion. Rows of unequal lengths become an array of arrays.
            skip_tensor_conversion: names of entries that are not converted.

        Raises:
            InputError: another tensor_type, or rows of unequal lengths for a tensor.
        """
        if tensor_type is None:
            return self
        if tensor_type not in ("pt", "np"):
            raise InputError(got=f"return_tensors={tensor_type!r:.40}", expected="'pt', 'np' or None", remedy="Pass one of them")
        convert = _as_tensor if tensor_type == "pt" else _as_array
        for name, value in self.items():
            if name not in (skip_tensor_conversion or ()) and _is_numeric(value):
                try:
                    self[name] = convert(value)
                except (ValueError, TypeError, RuntimeError) as error:
                    raise InputError(
                        got=f"{name} with {_describe(value)}",
                        expected="one length for a tensor",
                        remedy="Pass padding=True (and truncation=True with max_length for a fixed length), or return_tensors=None",
                    ) from error
        return self


class Span(NamedTuple):
    """The first character or token of a range, and the one after its last."""

    start: int
    end: int


class BatchEncoding(BatchFeature):
    """A `BatchFeature` of texts, which also knows where in the text each token comes from.

    An integer as index gives the `tokenizers.Encoding` of a text, and a slice those of some texts. The methods that take a text's
    number can be called without it for the first text.

    Args:
        data: the entries.
        encoding: one for each text, or for a single text; None if unknown.
        tensor_type: as in `BatchFeature`.
        prepend_batch_axis: convert each entry as a batch of one.
        n_sequences: 1, or 2 for pairs of texts; None for what the encodings say.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: "tokenizers.Encoding | Sequence[tokenizers.Encoding] | None" = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ):
        data = {name: [value] for name, value in (data or {}).items()} if prepend_batch_axis and tensor_type else data
        super().__init__(data, tensor_type)
        self.encodings = encoding if encoding is None or isinstance(encoding, list | tuple) else [encoding]
        self.n_sequences = n_sequences or (self.encodings[0].n_sequences if self.encodings else None)

    def __getitem__(self, item: str | int | slice) -> Any:
        if isinstance(item, str):
            return super().__getitem__(item)
        if isinstance(item, slice) and self.encodings is None:
            return {name: value[item] for name, value in self.items()}
        return self._encoding(item)

    @property
    def is_fast(self) -> bool:
        """Whether the places of tokens are known."""
        return self.encodings is not None

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a text, as strings."""
        return self._encoding(batch_index).tokens

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token the text of a pair that it belongs to, 0 or 1; None for padding and added tokens."""
        return self._encoding(batch_index).sequence_ids

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token the number of its word; None for padding and added tokens."""
        return self._encoding(batch_index).word_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The text of a pair that a token belongs to."""
        encoding, index = self._place(batch_or_token_index, token_index)
        return encoding.token_to_sequence(index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The word of a token."""
        encoding, index = self._place(batch_or_token_index, token_index)
        return encoding.token_to_word(index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> Span | None:
        """The characters of a token."""
        encoding, index = self._place(batch_or_token_index, token_index)
        return _span(encoding.token_to_chars(index))

    def char_to_token(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0) -> int | None:
        """The token of a character; sequence_index is the text of a pair."""
        encoding, index = self._place(batch_or_char_index, char_index)
        return encoding.char_to_token(index, sequence_index)

    def char_to_word(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0) -> int | None:
        """The word of a character; sequence_index is the text of a pair."""
        encoding, index = self._place(batch_or_char_index, char_index)
        return encoding.char_to_word(index, sequence_index)

    def word_to_tokens(self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0) -> Span | None:
        """The tokens of a word; sequence_index is the text of a pair."""
        encoding, index = self._place(batch_or_word_index, word_index)
        return _span(encoding.word_to_tokens(index, sequence_index))

    def word_to_chars(self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0) -> Span | None:
        """The characters of a word; sequence_index is the text of a pair."""
        encoding, index = self._place(batch_or_word_index, word_index)
        return _span(encoding.word_to_chars(index, sequence_index))

    def _place(self, first: int, second: int | None) -> "tuple[tokenizers.Encoding, int]":
        return (self._encoding(0), first) if second is None else (self._encoding(first), second)

    def _encoding(self, index: int | slice) -> Any:
        if self.encodings is None:
            raise InputError(
                got="a batch that does not know where its tokens come from",
                expected="the result of a call of the tokenizer",
                remedy="Call the tokenizer on the texts",
            )
        return self.encodings[index]


def _span(span: tuple[int, int] | None) -> Span | None:
    return None if span is None else Span(*span)


def _is_numeric(value: Any) -> bool:
    """Whether this is a tensor, an array, a number, or nested lists of those."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, torch.Tensor | np.ndarray | np.generic | int | float | list | tuple)


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
        return torch.stack(list(value))
    if isinstance(value, list | tuple) and value and isinstance(value[0], np.ndarray):
        return torch.from_numpy(np.stack(value))
    tensor = torch.tensor(value)
    return tensor if tensor.numel() else tensor.long()  # no numbers: torch's guess would be float32


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, list | tuple) and value and isinstance(value[0], list | tuple | np.ndarray | torch.Tensor):
        rows = [_as_array(row) for row in value]
        if len({row.shape for row in rows}) == 1:
            return np.stack(rows)
        array = np.empty(len(rows), dtype=object)
        array[:] = rows
        return array
    array = np.asarray(value)
    return array if array.size else array.astype(np.int64)


def _describe(value: Any) -> str:
    lengths = {len(row) for row in value if hasattr(row, "__len__")} if hasattr(value, "__len__") else set()
    return f"rows of {sorted(lengths)} entries" if len(lengths) > 1 else f"values of unequal shapes or types: {value!r:.100}"
