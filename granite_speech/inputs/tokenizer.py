"""Text to token ids and back, with the `tokenizers` library.

Text is split as the folder's `tokenizer.json` says, whichever class `tokenizer_config.json` names. That file gives only the
roles of special tokens, lengths, the padding side and the chat template.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from granite_speech.checkpoints.call_options import hub_options
from granite_speech.checkpoints.folder import resolve
from granite_speech.checkpoints.upload import PushToHub, saving
from granite_speech.errors import CheckpointError, InputError, UnsupportedError
from granite_speech.inputs.chat import message_ids, refuse_sanitizing, render_conversations, select_template, text_masks
from granite_speech.inputs.chat_template import LONGEST_PROMPT, render_chat_template, write_chat_template
from granite_speech.inputs.coding import Coder
from granite_speech.inputs.text_options import UNLIMITED, check_choice
from granite_speech.inputs.tokenizer_files import read_files, write_files
from granite_speech.inputs.vocabulary import ROLES

if TYPE_CHECKING:
    import tokenizers

__all__ = ["LONGEST_PROMPT", "GraniteSpeechTokenizer", "render_chat_template", "write_chat_template"]

# tokenizer_config.json entries that can be replaced when loading, besides the roles.
_SETTINGS = (
    "padding_side", "truncation_side", "model_max_length", "model_input_names", "split_special_tokens", "clean_up_tokenization_spaces",
    "extra_special_tokens", "additional_special_tokens", "add_bos_token", "add_eos_token",
)  # fmt: skip


class GraniteSpeechTokenizer(Coder, PushToHub):
    """A byte-level BPE tokenizer with padding and a chat template.

    Args:
        backend: the `tokenizers.Tokenizer`.
        config: contents of tokenizer_config.json: `*_token` entries, padding_side ("right" if not given), and other
            entries, which are kept for saving.
        chat_template: a Jinja template, several by name, or None.

    Attributes: bos_token, eos_token, unk_token, pad_token … and the same with `_id`, None for a role without a token; other
    roles in the configuration (`audio_token`); padding_side and truncation_side, "left" or "right"; model_max_length, 10**30 if
    there is no limit; chat_template; name_or_path. All can be assigned.

    Raises:
        CheckpointError: padding_side or truncation_side is neither "left" nor "right".
    """

    # transformers follows tokenizer.json with this class. For GPT2Tokenizer, version 5 uses the vocabulary alone.
    written_class: ClassVar[str] = "PreTrainedTokenizerFast"
    is_fast = True
    verbose = False
    pad_token_type_id = 0

    def __init__(
        self, backend: "tokenizers.Tokenizer", config: dict[str, Any] | None = None, chat_template: str | dict[str, str] | None = None
    ):
        backend.no_padding()
        backend.no_truncation()
        super().__init__(backend, config or {})
        self.config = dict(config or {})
        self.chat_template = chat_template
        self.name_or_path: str = self.config.get("name_or_path", "")
        self.model_input_names = list(self.config.get("model_input_names", ("input_ids", "attention_mask")))
        self.model_max_length: int = self.config.get("model_max_length") or UNLIMITED
        self.split_special_tokens: bool = self.config.get("split_special_tokens", False)
        self.clean_up_tokenization_spaces: bool = self.config.get("clean_up_tokenization_spaces", False)
        self.padding_side: str = self.config.get("padding_side", "right")
        self.truncation_side: str = self.config.get("truncation_side", "right")
        for name in ("padding_side", "truncation_side"):
            if getattr(self, name) not in ("left", "right"):
                raise CheckpointError(
                    got=f"{name} = {getattr(self, name)!r}", expected="'left' or 'right'", remedy="Correct tokenizer_config.json"
                )
        if "add_bos_token" in self.config or "add_eos_token" in self.config:
            self._add_ends()

        self.deprecation_warnings: dict[str, bool] = {}  # data collators write to it

    @property
    def add_bos_token(self) -> bool:
        """Whether every text begins with the bos token, if it was asked for here; what tokenizer.json adds is not counted. Can be set."""
        return bool(self.config.get("add_bos_token"))

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self.config["add_bos_token"] = value
        self._add_ends()

    @property
    def add_eos_token(self) -> bool:
        """Whether every text ends with the eos token; as `add_bos_token`."""
        return bool(self.config.get("add_eos_token"))

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self.config["add_eos_token"] = value
        self._add_ends()

    def _add_ends(self) -> None:
        """Makes every text begin with the bos token or end with the eos token, as the configuration says."""
        from tokenizers.processors import TemplateProcessing

        ends = [role if self.config.get(f"add_{role}") and role in self.special_tokens else None for role in ("bos_token", "eos_token")]
        first, last = (() if role is None else (self.special_tokens[role],) for role in ends)
        single, second = ([f"{one}:{n}" for one in (*first, f"${'AB'[n]}", *last)] for n in (0, 1))
        ids = {self.special_tokens[role]: getattr(self, f"{role}_id") for role in ends if role is not None}
        self.backend.post_processor = TemplateProcessing(single=single, pair=[*single, *second], special_tokens=list(ids.items()))

    # --- files --------------------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, folder: str | Path, **settings: Any) -> Self:
        """Reads tokenizer.json, tokenizer_config.json, the legacy special_tokens_map.json and added_tokens.json, and the template.

        Args:
            folder: of the files.
            settings: replace entries of tokenizer_config.json, or the chat_template.

        Raises:
            CheckpointNotFoundError: there is no tokenizer.json.
            CheckpointError: a file with invalid contents.
            MissingDependencyError: tokenizers is not installed.
        """
        backend, config, template = read_files(Path(folder))
        for name in ("add_bos_token", "add_eos_token"):
            config.pop(name, None)  # tokenizer.json says it; only a caller can change it
        template = settings.pop("chat_template", None) or template
        return cls(backend, {**config, "name_or_path": str(folder), **settings}, template)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Self:
        """Loads the tokenizer of a folder or hub id.

        Args:
            pretrained_model_name_or_path: as in `granite_speech.checkpoints.hub.resolve`.
            cache_dir, force_download, local_files_only, token, revision: as in `resolve`.
            trust_remote_code: accepted; no code from a checkpoint is ever run.
            options: subfolder; settings that replace those in the
                folder: padding_side, truncation_side, model_max_length, chat_template, special tokens by role …; and options of
                transformers that change nothing here.

        Raises:
            CheckpointNotFoundError, CheckpointError, MissingDependencyError: as `from_folder`.
            InputError, UnsupportedError: an unknown option, or one that would change the result.
        """
        options |= {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only, "token": token}
        options["revision"] = revision
        settings = cls.pop_settings(options)
        folder = resolve(pretrained_model_name_or_path, **hub_options(options, f"{cls.__name__}.from_pretrained"))
        return cls.from_folder(folder, **settings | {"name_or_path": str(pretrained_model_name_or_path)})

    @staticmethod
    def pop_settings(options: dict[str, Any]) -> dict[str, Any]:
        """Removes a tokenizer's settings from the options of a `from_pretrained` and returns them."""
        names = [name for name in options if name in _SETTINGS or name in ROLES or name == "chat_template"]
        settings = {name: options.pop(name) for name in names}
        for name in ("add_prefix_space", "from_slow"):
            if options.pop(name, None):
                raise UnsupportedError(
                    got=f"{name}=True", expected="text split as tokenizer.json says", remedy="Omit it, or change tokenizer.json"
                )
        for name in ("legacy", "fix_mistral_regex", "tokenizer_type"):  # of other models' tokenizers
            options.pop(name, None)
        for side in ("padding_side", "truncation_side"):
            check_choice(side, settings.get(side, "left"), ("left", "right"))
        return settings

    def save_pretrained(
        self,
        save_directory: str | Path,
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        save_format: str | None = None,
        **options: Any,
    ) -> tuple[str, ...]:
        """Writes tokenizer.json, tokenizer_config.json and the chat template, as transformers 4.x and 5.x read them.

        Args:
            save_directory: created if missing.
            legacy_format: accepted; the files are always those of fast tokenizers.
            filename_prefix: of the two files' names, with a hyphen after it.
            push_to_hub: also upload the folder.
            save_format: "hf" or None.
            options: of the upload: repo_id, commit_message, private, token …

        Returns:
            The paths of the files.

        Raises:
            CheckpointError: a file is in the place of the folder.
            InputError: an unknown option.
        """
        check_choice("save_format", save_format, (None, "hf"))
        with saving(save_directory, f"{type(self).__name__}.save_pretrained", push_to_hub=push_to_hub, options=options) as folder:
            names = ("padding_side", "truncation_side", "model_max_length", "model_input_names", "clean_up_tokenization_spaces")
            settings = {name: getattr(self, name) for name in names if name in self.config or name in ("padding_side", "model_input_names")}
            if self.truncation_side != "right" or self.model_max_length != UNLIMITED:
                settings |= {"truncation_side": self.truncation_side, "model_max_length": self.model_max_length}
            settings["tokenizer_class"] = self.written_class
            files = write_files(folder, self, self.config, settings, f"{filename_prefix}-" if filename_prefix else "")
            files += write_chat_template(folder, self.chat_template)
        return tuple(map(str, files))

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes vocab.json and merges.txt, without added tokens. Returns the paths."""
        with saving(save_directory, f"{type(self).__name__}.save_vocabulary") as folder:
            return tuple(self.backend.model.save(str(folder), filename_prefix))

    @property
    def backend_tokenizer(self) -> "tokenizers.Tokenizer":
        """The `tokenizers.Tokenizer`."""
        return self.backend

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """What the tokenizer was made with: the contents of tokenizer_config.json."""
        return dict(self.config)

    def __repr__(self) -> str:
        shown = ("name_or_path", "vocab_size", "model_max_length", "padding_side", "truncation_side")
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{type(self).__name__}({values}, special_tokens={self.special_tokens_map}, added_tokens={self.get_added_vocab()})"

    # --- messages -----------------------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Any,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **names: Any,
    ) -> Any:
        """Formats messages as the prompt that the model was trained on. The defaults are those of transformers.

        Args:
            conversation: messages with "role" and "content", a text or a list of parts; or a list of conversations.
            tools, documents: passed to the template; tools as JSON schemas, or as functions with type hints and docstrings.
            chat_template: a template, or the name of one of this tokenizer's; None for its own.
            add_generation_prompt: whether to end with the beginning of the assistant's turn.
            continue_final_message: whether to end within the last message, so that the model continues it; or the name of its field.
            tokenize: whether to return the result of `__call__` for the prompt (only input_ids if return_dict is False) or text.
            padding, truncation, max_length, return_tensors: as in `__call__`.
            return_dict: whether to return more than input_ids.
            return_assistant_tokens_mask: whether to add assistant_masks, 1 for each token in a {% generation %} block of the template.
            tokenizer_kwargs: more options of `__call__`.
            sanitize_control_tokens: must be False.
            **names: passed to the template.

        Raises:
            InputError: no messages, no template, options that exclude each other, or a template that fails or writes more than
                LONGEST_PROMPT characters.
            UnsupportedError: a part of a message that is neither text nor audio, or sanitize_control_tokens.
        """
        refuse_sanitizing(sanitize_control_tokens)
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise InputError(
                got="return_assistant_tokens_mask without token ids", expected="tokenize=True and return_dict=True", remedy="Pass them"
            )
        prompts = render_conversations(
            conversation,
            self.get_chat_template(chat_template, tools),
            {**self.special_tokens, **names},
            audio_token=self.special_tokens.get("audio_token", "<|audio|>"),
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            with_spans=return_assistant_tokens_mask,
        )
        prompt = prompts.texts if prompts.batched else prompts.texts[0]
        if not tokenize:
            return prompt
        lengths = {"padding": padding, "truncation": truncation, "max_length": max_length}
        options = {"add_special_tokens": False, "return_tensors": return_tensors, **lengths, **(tokenizer_kwargs or {})}
        encoded = self(prompt, **options)
        if return_assistant_tokens_mask:
            masks = text_masks(encoded.encodings, prompts.spans)
            encoded["assistant_masks"] = masks if prompts.batched or options["return_tensors"] else masks[0]
            encoded.convert_to_tensors(options["return_tensors"])
        return encoded if return_dict else encoded["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: list[dict[str, Any]] | None = None) -> str:
        """The template that `apply_chat_template` uses for the same two arguments."""
        return select_template(self.chat_template, chat_template, tools)

    def encode_message_with_chat_template(
        self, message: dict[str, Any], conversation_history: Sequence[dict[str, Any]] | None = None, **options: Any
    ) -> list[int]:
        """The ids that one message adds to those of the conversation before it. options: of `apply_chat_template`."""
        if "add_generation_prompt" in options:
            raise InputError(got="add_generation_prompt", expected="one message alone", remedy="Omit it, and add that prompt afterwards")
        return message_ids(lambda chat: self.apply_chat_template(chat, return_dict=False, **options), message, conversation_history or [])
