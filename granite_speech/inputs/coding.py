"""Text to token ids and back: the calls of the tokenizer."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from granite_speech.errors import InputError
from granite_speech.inputs.batch import BatchEncoding
from granite_speech.inputs.padding import need_pad_token, padded, round_up
from granite_speech.inputs.text_options import UNLIMITED, TextOptions, check_choice, padding_and_limit
from granite_speech.inputs.vocabulary import Vocabulary

__all__ = ["Coder", "plain_ids"]

# The backend holds how texts are cut and whether special tokens are split, so calls take turns.
_ENCODING = threading.Lock()
_WITHOUT_EFFECT_ON_TEXT = {"add_special_tokens", "spaces_between_special_tokens", "use_source_tokenizer"}


class Coder(Vocabulary):
    """A vocabulary that encodes, pads and decodes."""

    padding_side: str = "right"
    truncation_side: str = "right"
    model_max_length: int = UNLIMITED
    model_input_names: Sequence[str] = ("input_ids", "attention_mask")
    split_special_tokens: bool = False
    clean_up_tokenization_spaces: bool = False

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str | None = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        *,
        max_target_length: int | None = None,
        split_special_tokens: bool | None = None,
        **unknown: Any,
    ) -> BatchEncoding:
        """Token ids of one text or of several.

        Args:
            text: one text or a list.
            text_pair: a second text for each, which is appended.
            text_target, text_pair_target: the same for answers; their ids are called labels if there is also a text.
            add_special_tokens: whether tokenizer.json's post-processor adds its tokens.
            padding: True or "longest" to pad to the longest text; "max_length" to pad to max_length; False for no padding. Generation
                needs padding_side "left".
            truncation: True or "longest_first", "only_first" or "only_second" to cut texts to max_length; None cuts if max_length is
                given and nothing is padded.
            max_length: in tokens; None for model_max_length, if the tokenizer has one.
            stride: tokens that a part repeats from the one before it, with return_overflowing_tokens.
            is_split_into_words: each text is a list of words.
            pad_to_multiple_of: rounds padded lengths up.
            padding_side: "left" or "right"; None for the tokenizer's own.
            return_tensors: "pt" for int64 tensors `(texts, tokens)`, "np" for arrays; None for lists, flat for one text.
            return_token_type_ids, return_attention_mask, return_special_tokens_mask, return_offsets_mapping, return_length: more entries.
            return_overflowing_tokens: the rest of a text that is cut follows as further texts; overflow_to_sample_mapping numbers them.
            verbose: whether to warn about options without effect.
            tokenizer_kwargs: more options, which override these.
            max_target_length: max_length of text_target.
            split_special_tokens: whether special tokens in a text are split like other text.

        Returns:
            input_ids; attention_mask, with 1 for tokens and 0 for padding; and the entries asked for.

        Raises:
            InputError: not text; an option with a value that is not allowed; unequal lengths for a tensor; padding without a pad token.
        """
        options = TextOptions.of(
            {
                "add_special_tokens": add_special_tokens,
                "padding": padding,
                "truncation": truncation,
                "max_length": max_length,
                "stride": stride,
                "is_split_into_words": is_split_into_words,
                "pad_to_multiple_of": pad_to_multiple_of,
                "padding_side": padding_side,
                "return_tensors": return_tensors,
                "return_token_type_ids": return_token_type_ids,
                "return_attention_mask": return_attention_mask,
                "return_overflowing_tokens": return_overflowing_tokens,
                "return_special_tokens_mask": return_special_tokens_mask,
                "return_offsets_mapping": return_offsets_mapping,
                "return_length": return_length,
                "verbose": verbose,
                "split_special_tokens": self.split_special_tokens if split_special_tokens is None else split_special_tokens,
                **(tokenizer_kwargs or {}),
                **unknown,
            }
        )
        if text is None and text_target is not None:
            return self._encode(text_target, text_pair_target, options, max_target_length)
        encoded = self._encode(text, text_pair, options)
        if text_target is not None:
            encoded["labels"] = self._encode(text_target, text_pair_target, options, max_target_length)["input_ids"]
        return encoded

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str | None = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """Token ids of one text, or of several: the input_ids of `__call__`, which describes the options."""
        named = {"padding": padding, "truncation": truncation, "max_length": max_length, "stride": stride, "padding_side": padding_side}
        return self(text, text_pair, add_special_tokens=add_special_tokens, return_tensors=return_tensors, **named, **options)["input_ids"]

    def tokenize(self, text: Any, pair: str | None = None, add_special_tokens: bool = False, **options: Any) -> list[str]:
        """The tokens of one text, as strings. options: as in `__call__`."""
        if not isinstance(text, str) and not options.get("is_split_into_words"):
            raise InputError(got=f"text of type {type(text).__name__}", expected="one string", remedy="Tokenize texts one by one")
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens add_special_tokens adds to one text, or to a pair."""
        return self.backend.num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        """model_max_length without the tokens that are added to a text."""
        return self.model_max_length - self.num_special_tokens_to_add(False)

    @property
    def max_len_sentences_pair(self) -> int:
        """model_max_length without the tokens that are added to a pair."""
        return self.model_max_length - self.num_special_tokens_to_add(True)

    def _encode(self, text: Any, pair: Any, options: TextOptions, max_length: int | None = None) -> BatchEncoding:
        if max_length is not None:
            options = TextOptions(**{**vars(options), "max_length": max_length})
        options = options.resolved(self.model_max_length)
        texts, single = _as_batch(text, pair, options.is_split_into_words)
        parts = self._encodings(texts, options)
        if options.return_overflowing_tokens:
            groups = [[one, *one.overflowing] for one in parts]
            parts = [one for group in groups for one in group]
        if options.padding is not None:
            self._pad_encodings(parts, options)
        entries = self._entries(parts, options)
        if options.return_overflowing_tokens:
            entries["overflow_to_sample_mapping"] = [index for index, group in enumerate(groups) for _ in group]
        elif single and options.return_tensors is None:
            entries = {name: rows if name == "length" else rows[0] for name, rows in entries.items()}
        return BatchEncoding(entries, parts, options.return_tensors)

    def _encodings(self, texts: list[Any], options: TextOptions) -> list[Any]:
        backend, cut, split = self.backend, options.truncation, options.split_special_tokens
        try:
            with _ENCODING:
                if cut is not None:
                    check_choice("truncation_side", self.truncation_side, ("left", "right"))
                    backend.enable_truncation(options.max_length, stride=options.stride, strategy=cut, direction=self.truncation_side)
                if split:
                    backend.encode_special_tokens = True
                try:
                    return backend.encode_batch(
                        texts, is_pretokenized=options.is_split_into_words, add_special_tokens=options.add_special_tokens
                    )
                finally:
                    if cut is not None:
                        backend.no_truncation()
                    if split:
                        backend.encode_special_tokens = False
        except InputError:
            raise
        except (TypeError, UnicodeError) as error:  # the library refuses lone surrogates
            raise InputError(
                got=f"text that is not Unicode, such as a lone surrogate ({error})",
                expected="text",
                remedy="Decode it again from its bytes",
            ) from error
        except Exception as error:  # of the library, which raises nothing narrower
            raise InputError(
                got=f"texts that cannot be cut to max_length={options.max_length} with stride={options.stride} ({error})",
                expected="a max_length larger than the stride and the added tokens, and a text long enough to cut",
                remedy="Raise max_length, or pass truncation=True",
            ) from error

    def _pad_encodings(self, parts: list[Any], options: TextOptions) -> None:
        longest = options.max_length if options.padding == "max_length" else max(map(len, parts))
        target = round_up(longest, options.pad_to_multiple_of)
        short = [one for one in parts if len(one) < target]
        if short:
            pad_id, side = self.pad_token_id, options.padding_side or self.padding_side
            need_pad_token(pad_id)
            check_choice("padding_side", side, ("left", "right"))
            for one in short:
                one.pad(target, direction=side, pad_id=pad_id, pad_type_id=0, pad_token=self.pad_token)

    def _entries(self, parts: list[Any], options: TextOptions) -> dict[str, list[Any]]:
        def wanted(option: bool | None, name: str) -> bool:
            return name in self.model_input_names if option is None else option

        entries = {"input_ids": [one.ids for one in parts]}
        if wanted(options.return_token_type_ids, "token_type_ids"):
            entries["token_type_ids"] = [one.type_ids for one in parts]
        if wanted(options.return_attention_mask, "attention_mask"):
            entries["attention_mask"] = [one.attention_mask for one in parts]
        if options.return_special_tokens_mask:
            entries["special_tokens_mask"] = [one.special_tokens_mask for one in parts]
        if options.return_offsets_mapping:
            entries["offset_mapping"] = [one.offsets for one in parts]
        if options.return_length:
            entries["length"] = [len(one) for one in parts]
        return entries

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str | None = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads texts that are already encoded, as data collators do.

        Args:
            encoded_inputs: one encoded text, a batch as one dictionary, or a list of encoded texts; lists, arrays or tensors.
            padding, max_length, pad_to_multiple_of, padding_side, verbose: as in `__call__`.
            return_attention_mask: whether to add a mask that is missing; None: if the model uses it.
            return_tensors: "pt" or "np"; None: tensors or arrays if that is what was given, otherwise lists.

        Returns:
            input_ids and their masks, padded. Other entries, such as labels, are collected; as tensors they must have one length.

        Raises:
            InputError: no input_ids, unequal lengths for a tensor, or no pad token.
        """
        check_choice("return_tensors", return_tensors, (None, "pt", "np"))
        side = padding_side or self.padding_side
        check_choice("padding_side", side, ("left", "right"))
        padding, max_length = padding_and_limit(padding, max_length, self.model_max_length, verbose=verbose)
        entries, kind = padded(
            encoded_inputs,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            left=side == "left",
            pad_token_id=self.pad_token_id,
            attention_mask="attention_mask" in self.model_input_names if return_attention_mask is None else return_attention_mask,
        )
        return BatchEncoding(entries, tensor_type=return_tensors or kind)

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None, **options: Any
    ) -> str | list[str]:
        """The text of an id or of ids `(tokens,)`, in a list, array or tensor; a list of texts for `(texts, tokens)`.

        Ids outside the vocabulary are skipped. Bytes that are not UTF-8 become U+FFFD.

        Args:
            token_ids: the ids.
            skip_special_tokens: leave out the tokens that tokenizer.json marks as special.
            clean_up_tokenization_spaces: remove spaces before punctuation (`clean_up_tokenization`); None for the tokenizer's own
                setting. As in transformers, it has no effect on BPE, which keeps the text's own spaces; True is warned about.
            options: add_special_tokens, spaces_between_special_tokens and use_source_tokenizer, which have no effect.

        Raises:
            InputError: a value that is not an id, or is negative; an unknown option.
        """
        if unknown := options.keys() - _WITHOUT_EFFECT_ON_TEXT:
            raise InputError(
                got=f"unknown options {', '.join(sorted(unknown))}",
                expected="skip_special_tokens and clean_up_tokenization_spaces",
                remedy="Remove them",
            )
        is_bpe = type(self.backend.model).__name__ == "BPE"
        if clean_up_tokenization_spaces and is_bpe:
            warnings.warn("clean_up_tokenization_spaces has no effect: BPE already gives the text's own spaces.", UserWarning, stacklevel=2)
        chosen = self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        clean = self.clean_up_tokenization if chosen and not is_bpe else str
        ids = plain_ids(token_ids)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return [clean(self._text(row, skip_special_tokens)) for row in ids]
        return clean(self._text([ids] if isinstance(ids, int) else ids, skip_special_tokens))

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None, **options: Any
    ) -> list[str]:
        """Texts of several sequences of token ids; see `decode`."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces, **options)
        if isinstance(texts, str):
            return [texts] if len(plain_ids(sequences)) else []
        return texts

    def _text(self, ids: Any, skip_special_tokens: bool) -> str:
        if not isinstance(ids, list) or not all(isinstance(index, int) for index in ids):
            kind = type(ids).__name__ if not isinstance(ids, list) else next(type(one).__name__ for one in ids if not isinstance(one, int))
            raise InputError(got=f"token ids of type {kind}", expected="ids, a list or a tensor of them", remedy="Pass those")
        if ids and (min(ids) < 0 or max(ids) >> 32):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InputError(got=f"token id {wrong}", expected="ids from 0", remedy="Remove label padding (-100) before decoding")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens that are given as strings."""
        return " ".join(tokens) if self.backend.decoder is None else self.backend.decoder.decode(list(tokens))

    def clean_up_tokenization(self, text: str) -> str:
        """Removes spaces before punctuation and English contractions, which tokenizers other than BPE leave."""
        for mark in (".", "?", "!", ","):
            text = text.replace(f" {mark}", mark)
        text = text.replace(" ' ", "'")
        for ending in ("n't", "'m", "'s", "'ve", "'re"):
            text = text.replace(f" {ending}", ending)
        return text


def _as_batch(text: Any, pair: Any, is_split_into_words: bool) -> tuple[list[Any], bool]:
    """What the backend encodes, and whether it is a single text."""
    one = (
        (lambda value: isinstance(value, list | tuple) and all(isinstance(word, str) for word in value))
        if is_split_into_words
        else _is_text
    )
    if one(text) and not (is_split_into_words and not text):
        return [(text, pair) if pair else text], True
    if not isinstance(text, list | tuple) or not text or not all(one(value) or _is_pair(value) for value in text):
        raise InputError(
            got=f"text of type {type(text).__name__}",
            expected="a list of words, or several" if is_split_into_words else "a string or a list of strings",
            remedy="Pass those",
        )
    if pair is None:
        return list(text), False
    if not isinstance(pair, list | tuple) or len(pair) != len(text) or not all(map(one, pair)):
        raise InputError(
            got=f"{len(text)} texts with text_pair of {f'{len(pair)} texts' if isinstance(pair, list | tuple) else type(pair).__name__}",
            expected="one second text for each",
            remedy="Pass lists of one length",
        )
    return list(zip(text, pair, strict=True)), False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(one, str | list | tuple) for one in value)


def plain_ids(ids: Any) -> Any:
    """An integer, or lists of them, for tensors, arrays, numbers of numpy, and lists of those."""
    if hasattr(ids, "tolist"):
        return ids.tolist()
    if isinstance(ids, Mapping) and "input_ids" in ids:
        return plain_ids(ids["input_ids"])
    if isinstance(ids, list | tuple):
        return list(ids) if all(type(one) is int for one in ids) else [plain_ids(one) for one in ids]
    return ids
