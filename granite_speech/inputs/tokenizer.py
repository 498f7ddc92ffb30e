"""Text to token ids and back, with the `tokenizers` library.

Text is split as the folder's `tokenizer.json` says, whichever class `tokenizer_config.json` names. That file gives only the
roles of special tokens, the padding side and the chat template.
"""

import json
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from granite_speech.checkpoints.call_options import check_unused
from granite_speech.checkpoints.folder import load_json, resolve
from granite_speech.errors import CheckpointError, CheckpointNotFoundError, InputError, MissingDependencyError, UnsupportedError
from granite_speech.inputs.chat_template import LONGEST_PROMPT, read_chat_template, render_chat_template, write_chat_template, write_text
from granite_speech.inputs.features import BatchFeature

if TYPE_CHECKING:
    import tokenizers

__all__ = ["LONGEST_PROMPT", "GraniteSpeechTokenizer", "render_chat_template", "write_chat_template"]

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class GraniteSpeechTokenizer:
    """A byte-level BPE tokenizer with padding and a chat template.

    Args:
        backend: the `tokenizers.Tokenizer`.
        config: contents of tokenizer_config.json: `*_token` entries, padding_side ("right" if not given), and other
            entries, which are kept for saving.
        chat_template: a Jinja template, several by name, or None.

    Attributes: bos_token, eos_token, unk_token, pad_token … and the same with `_id`, None for a role without a token; other
    roles in the configuration (`audio_token`); padding_side, "left" or "right"; chat_template.

    Raises:
        CheckpointError: padding_side is neither "left" nor "right".
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(
        self, backend: "tokenizers.Tokenizer", config: dict[str, Any] | None = None, chat_template: str | dict[str, str] | None = None
    ):
        self.backend = backend
        self.config = dict(config or {})
        self.chat_template = chat_template
        self.padding_side: str = self.config.get("padding_side", "right")
        if self.padding_side not in ("left", "right"):
            raise CheckpointError(
                got=f"padding_side = {self.padding_side!r}", expected="'left' or 'right'", remedy="Correct tokenizer_config.json"
            )
        backend.no_padding()
        backend.no_truncation()
        self.special_tokens: dict[str, str] = _special_tokens(self.config)
        known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens([token for token in self.special_tokens.values() if token not in known])
        for role in dict.fromkeys((*ROLES, *self.special_tokens)):
            token = self.special_tokens.get(role)
            setattr(self, role, token)
            setattr(self, f"{role}_id", None if token is None else backend.token_to_id(token))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "GraniteSpeechTokenizer":
        """As `from_folder`, also of a hub id."""
        check_unused(options, "GraniteSpeechTokenizer.from_pretrained")
        return cls.from_folder(resolve(pretrained_model_name_or_path))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "GraniteSpeechTokenizer":
        """Reads tokenizer.json, tokenizer_config.json, the legacy special_tokens_map.json and added_tokens.json, and the template.

        Raises:
            CheckpointNotFoundError: there is no tokenizer.json.
            CheckpointError: a file with invalid contents.
            MissingDependencyError: tokenizers is not installed.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise MissingDependencyError(got="no tokenizers", expected="the package tokenizers", remedy="pip install tokenizers") from error
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointNotFoundError(
                got=f"no {file}", expected="a folder with a tokenizer.json", remedy="Name a whole checkpoint folder or a hub id"
            )
        try:
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(got=f"{file}, unreadable ({error})", expected="a tokenizer", remedy="Download it again") from error
        config = _read(folder / "tokenizer_config.json")
        if config.get("added_tokens_decoder") is None:
            # Folders older than added_tokens_decoder: special_tokens_map.json overrides tokenizer_config.json there.
            config.update(_read(folder / "special_tokens_map.json"))
            _add_legacy_tokens(backend, _read(folder / "added_tokens.json"), config)
        else:
            _add_tokens(backend, config["added_tokens_decoder"], folder / "tokenizer_config.json")
        return cls(backend, config, read_chat_template(folder, config))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat template, as transformers 4.x and 5.x read them.

        The class is written as PreTrainedTokenizerFast, which follows tokenizer.json. For GPT2Tokenizer, transformers 5.x
        uses the vocabulary alone and ignores how tokenizer.json splits text.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {name: value for name, value in self.config.items() if name not in ("chat_template", "add_bos_token", "add_eos_token")}
        config |= self.special_tokens
        config |= {
            "padding_side": self.padding_side,
            "model_input_names": list(self.model_input_names),
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        write_chat_template(folder, self.chat_template)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens; `len` includes them."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens, ascending."""
        return sorted(index for index, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """The id of a token, or of each. Outside the vocabulary it is the unknown token's id, or None if there is no such token."""
        if isinstance(tokens, str):
            index = self.backend.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """The token of an id, or of each; None outside the vocabulary."""
        return self.backend.id_to_token(ids) if isinstance(ids, int) else [self.backend.id_to_token(int(index)) for index in ids]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one text. add_special_tokens: whether tokenizer.json's post-processor adds its tokens."""
        return self._encode([text], add_special_tokens)[0]

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        try:
            return [one.ids for one in self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)]
        except (TypeError, UnicodeError) as error:  # the library refuses lone surrogates
            raise InputError(
                got=f"text that is not Unicode, such as a lone surrogate ({error})",
                expected="text",
                remedy="Decode it again from its bytes",
            ) from error

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool = False,
        return_tensors: str | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Token ids of one text or of several.

        Args:
            text: one text or a list.
            padding: pad to the longest text, on padding_side (None: the tokenizer's own). Generation needs "left".
            return_tensors: "pt" for int64 tensors `(texts, tokens)`; None for lists, flat for one text.
            add_special_tokens: as in `encode`.

        Returns: input_ids, and attention_mask with 1 for tokens and 0 for padding.

        Raises:
            InputError: not text; unequal lengths with return_tensors="pt" and no padding; padding without a pad token.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(one, str) for one in texts):
            raise InputError(got=f"text of type {type(text).__name__}", expected="a string or a list of strings", remedy="Pass those")
        _check_choice("return_tensors", return_tensors, (None, "pt"))
        _check_choice("padding", padding, (True, False, "longest"))
        _check_choice("padding_side", padding_side, (None, "left", "right"))
        ids = self._encode(texts, add_special_tokens)
        masks = [[1] * len(one) for one in ids]
        longest = max(map(len, ids))
        if padding and any(len(one) < longest for one in ids):
            if self.pad_token_id is None:
                raise InputError(
                    got="texts of unequal lengths and no pad token", expected="a pad_token in tokenizer_config.json", remedy="Set pad_token"
                )
            left = (padding_side or self.padding_side) == "left"
            for rows, filler in ((ids, self.pad_token_id), (masks, 0)):
                for index, row in enumerate(rows):
                    fill = [filler] * (longest - len(row))
                    rows[index] = fill + row if left else row + fill
        if return_tensors is None:
            flat = isinstance(text, str)
            return BatchFeature(input_ids=ids[0] if flat else ids, attention_mask=masks[0] if flat else masks)
        if any(len(row) != len(ids[0]) for row in ids):
            raise InputError(
                got=f"texts of {sorted(set(map(len, ids)))} tokens", expected="one length for a tensor", remedy="Pass padding=True"
            )
        as_tensor = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in (("input_ids", ids), ("attention_mask", masks))}
        return BatchFeature(as_tensor)

    def decode(self, token_ids, skip_special_tokens: bool = False) -> str | list[str]:
        """The text of an id or of ids `(tokens,)`, in a list or tensor; a list of texts for `(texts, tokens)`.

        Ids outside the vocabulary are skipped. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: a value that is not an id, or is negative.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, int):
            ids = [ids]
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
            raise InputError(got=f"token ids of type {type(ids).__name__}", expected="ids, a list or a tensor of them", remedy="Pass those")
        if len(ids) and not isinstance(ids[0], int):
            return [self.decode(row, skip_special_tokens) for row in ids]
        if min(ids, default=0) < 0 or max(ids, default=0) >> 32:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InputError(got=f"token id {wrong}", expected="ids from 0", remedy="Remove label padding (-100) before decoding")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences, skip_special_tokens: bool = False, *, add_special_tokens: bool = False) -> list[str]:
        """Texts of several sequences of token ids; see `decode`.

        add_special_tokens is accepted because model cards pass it; it has no effect, here or in transformers.
        """
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        padding: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **kwargs,
    ) -> str | list[str] | BatchFeature | list:
        """Formats messages as the prompt that the model was trained on. The defaults are those of transformers.

        Args:
            conversation: messages with "role" and "content"; or a list of conversations.
            tools, documents: passed to the template; tools as JSON schemas.
            chat_template: a template, or the name of one of this tokenizer's; None for its own.
            add_generation_prompt: whether to end with the beginning of the assistant's turn.
            tokenize: whether to return the result of `__call__` for the prompt (only input_ids if return_dict is False) or text.
            **kwargs: passed to the template.

        Raises:
            InputError: no messages, no template, or a template that fails or writes more than LONGEST_PROMPT characters.
            UnsupportedError: continue_final_message, return_assistant_tokens_mask, or a tool that is not a dictionary.
        """
        for name in ("continue_final_message", "return_assistant_tokens_mask", "truncation", "tokenizer_kwargs"):
            if kwargs.pop(name, None):
                raise UnsupportedError(got=name, expected="a plain prompt", remedy="Call with tokenize=False and work on the text")
        if any(not isinstance(tool, dict) for tool in tools or ()):
            raise UnsupportedError(got="a tool that is not a dictionary", expected="JSON schemas", remedy="Write the schema out")
        if not isinstance(conversation, list | tuple) or not conversation:
            got = f"messages of type {type(conversation).__name__}" if conversation else "no messages"
            raise InputError(got=got, expected="at least one, in a list", remedy="Pass a list of {'role': …, 'content': …}")
        template = self.get_chat_template(chat_template, tools)
        single = isinstance(conversation[0], dict)
        names = {**self.special_tokens, "tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt, **kwargs}
        prompts = [render_chat_template(template, messages=one, **names) for one in ([conversation] if single else conversation)]
        prompt = prompts[0] if single else prompts
        if not tokenize:
            return prompt
        encoded = self(prompt, padding=padding, return_tensors=return_tensors, add_special_tokens=False)
        return encoded if return_dict else encoded["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: list[dict[str, Any]] | None = None) -> str:
        """The template that `apply_chat_template` uses for the same two arguments."""
        own = self.chat_template
        if isinstance(own, dict):
            name = chat_template or ("tool_use" if tools and "tool_use" in own else "default")
            if name in own:
                return own[name]
        if chat_template is None and isinstance(own, str):
            return own
        if chat_template is None:
            known = f"only templates {sorted(own)}" if own else "no chat template"
            raise InputError(got=known, expected="one to use", remedy="Pass chat_template, or add chat_template.jinja to the folder")
        return chat_template


def _read(file: Path) -> dict[str, Any]:
    return load_json(file) if file.is_file() else {}


def _add_legacy_tokens(backend: "tokenizers.Tokenizer", added: dict[str, int], config: dict[str, Any]) -> None:
    """Adds the tokens of added_tokens.json that the vocabulary lacks, in the order of their ids."""
    from tokenizers import AddedToken

    special = set(_special_tokens(config).values())
    for token, _ in sorted(added.items(), key=lambda item: item[1]):
        if backend.token_to_id(token) is None:
            backend.add_tokens([AddedToken(token, special=token in special, normalized=token not in special)])


def _add_tokens(backend: "tokenizers.Tokenizer", added: Any, file: Path) -> None:
    """Adds the tokens of added_tokens_decoder, from `file`, that tokenizer.json lacks, in the order of their ids."""
    from tokenizers import AddedToken

    known = {str(index) for index in backend.get_added_tokens_decoder()}
    try:
        late = sorted(((int(index), token) for index, token in added.items() if index not in known), key=itemgetter(0))
        backend.add_tokens([AddedToken(**token) for _, token in late])
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            got=f"added_tokens_decoder in {file}, which does not describe tokens ({error})",
            expected="ids and their tokens",
            remedy="Download it again",
        ) from error


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Roles and their tokens. An entry is a string or the description of an added token."""
    extra = config.get("extra_special_tokens")
    entries = {name: value for name, value in config.items() if name.endswith("_token")} | (extra if isinstance(extra, dict) else {})
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise InputError(got=f"{name} = {value!r}", expected=f"one of {choices}", remedy=f"Pass {name} as one of those")
