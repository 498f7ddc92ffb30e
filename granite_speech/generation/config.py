"""`GenerationConfig`: options of `generate` that are kept, loaded and saved, as transformers' class of this name."""

import copy
import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch

from granite_speech.checkpoints.folder import load_json, resolve
from granite_speech.checkpoints.upload import PushToHub, saving
from granite_speech.errors import CheckpointNotFoundError, InputError
from granite_speech.generation.option_table import ACCEPTED, REFUSED
from granite_speech.generation.options import GenerationOptions

__all__ = ["GenerationConfig", "WithGenerationConfig"]

FILE = "generation_config.json"
_NAMES = (*(one.name for one in fields(GenerationOptions)), *sorted(ACCEPTED), *REFUSED)
_NOT_SAVED = ("_commit_hash", "_original_object_hash")
_ABOUT_THE_FILE = ("_from_model_config", "transformers_version")
_LANGUAGE_MODELS = ("decoder", "generator", "text_config")


class GenerationConfig(PushToHub):
    """Options as attributes, None where not set; `GenerationOptions` describes them. Other names are kept, and not used.

    Args:
        options: by name. They are checked when `generate` uses them.
    """

    _from_model_config = False  # transformers' Seq2SeqTrainer reads it

    def __init__(self, **options: Any):
        for name in _NAMES:
            setattr(self, name, options.get(name))
        vars(self).update(options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash(self._compared())

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(ignore_metadata=True)}"

    def _compared(self) -> str:
        return self.to_json_string(use_diff=False, ignore_metadata=True)

    @classmethod
    def of(cls, given: Any) -> Self:
        """A GenerationConfig as it is; a dictionary or transformers' class as one.

        Raises:
            InputError: something else.
        """
        if isinstance(given, cls):
            return given
        values = given.to_dict() if callable(getattr(given, "to_dict", None)) else given
        if not isinstance(values, dict):
            raise InputError(
                got=f"generation_config of type {type(given).__name__}",
                expected="a GenerationConfig or a dictionary of options",
                remedy="Pass GenerationConfig(max_new_tokens=…)",
            )
        return cls(**values)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """The options of a dictionary, then those given by name.

        Returns:
            The configuration; with return_unused_kwargs, also the arguments that it does not know.
        """
        config = cls(**{**config_dict, **kwargs})
        return (config, config.update(**kwargs)) if return_unused_kwargs else config

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """The options that a model's configuration has, itself or for its language model: its token ids, usually."""
        whole = dict(model_config if isinstance(model_config, dict) else model_config.to_dict())
        language_model = next((whole[name] for name in _LANGUAGE_MODELS if whole.get(name)), {})
        language_model = language_model if isinstance(language_model, dict) else language_model.to_dict()
        values = {name: value for name, value in language_model.items() if value is not None}
        values |= {name: value for name, value in whole.items() if value is not None}
        values = {name: value for name, value in values.items() if not (name.startswith("output_") and value is False)}
        config = cls(**{name: value for name, value in values.items() if name in _NAMES} | {"_from_model_config": True})
        config.transformers_version = None
        if any(getattr(config, f"output_{name}") for name in ("scores", "logits", "attentions", "hidden_states")):
            config.return_dict_in_generate = True
        return config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        config_file_name: str | Path | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read the generation_config.json of a folder or hub id.

        Args:
            pretrained_model_name: a folder, or a hub id such as "ibm-granite/granite-speech-3.3-2b".
            config_file_name: another name of the file.
            cache_dir, force_download, local_files_only, token, revision: of the hub.
            kwargs: options that override those of the file; subfolder and return_unused_kwargs.

        Raises:
            CheckpointNotFoundError: no such folder, hub id or file.
            CheckpointError: a file that is not JSON.
        """
        kwargs.pop("proxies", None)
        kwargs.pop("trust_remote_code", None)
        hub = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only, "token": token}
        folder = resolve(pretrained_model_name, **hub, revision=revision, subfolder=kwargs.pop("subfolder", None) or "")
        file = folder / (config_file_name or FILE)
        if not file.is_file():
            raise CheckpointNotFoundError(
                got=f"{folder} without {file.name}",
                expected=f"a folder with a {file.name}",
                remedy="Use model.generation_config, which every model has, or save one with GenerationConfig.save_pretrained",
            )
        if kwargs.pop("_from_model_config", False):
            return cls.from_model_config(load_json(file))
        return cls.from_dict(load_json(file), **kwargs)

    def save_pretrained(
        self, save_directory: str | Path, config_file_name: str | Path | None = None, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write generation_config.json into a folder, which is created if missing. transformers reads it too.

        Args:
            save_directory: the folder.
            config_file_name: another name of the file.
            push_to_hub: upload the file afterwards.
            kwargs: of the upload (`PushToHub.push_to_hub`), and transformers' options that change nothing here.
        """
        text = self.to_json_string(keys_to_pop=["compile_config"])
        with saving(save_directory, "GenerationConfig.save_pretrained", push_to_hub=push_to_hub, options=kwargs) as folder:
            (folder / (config_file_name or FILE)).write_text(text, encoding="utf-8")

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check the options as `generate` does.

        Args:
            strict: refuse options that do nothing too, which otherwise give a warning.
            user_set_attributes: accepted and not used; every option that is set is checked.

        Raises:
            InputError: an option out of range or not supported, or options that contradict each other.
        """
        with warnings.catch_warnings():
            if strict:
                warnings.simplefilter("error")
            try:
                GenerationOptions.resolve({}, self, None, 0)
            except UserWarning as warning:
                raise InputError(got=str(warning), expected="options that have an effect", remedy="Remove it") from None

    def get_generation_mode(self, assistant_model: None = None) -> str:
        """The method: "greedy_search", "sample", "beam_search" or "beam_sample". `generate` refuses an assistant_model."""
        if (self.num_beams or 1) == 1:
            return "sample" if self.do_sample else "greedy_search"
        return "beam_sample" if self.do_sample else "beam_search"

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Set options.

        Args:
            defaults_only: set only those that are None.
            allow_custom_entries: add names that the configuration does not have.
            kwargs: the options.

        Returns:
            The arguments that were not set.
        """
        unused = {}
        for name, value in kwargs.items():
            known = hasattr(self, name)
            if allow_custom_entries if not known else not defaults_only or getattr(self, name) is None:
                setattr(self, name, value)
            else:
                unused[name] = value
        return unused

    def _get_default_generation_params(self) -> dict[str, Any]:
        """What transformers' Seq2SeqTrainer sets if it is None, because it pads answers to this many columns at least."""
        return {"max_length": 20}

    def to_dict(self) -> dict[str, Any]:
        """All options, those that are None too."""
        values = {name: copy.deepcopy(value) for name, value in vars(self).items() if name not in _NOT_SAVED}
        if values["transformers_version"] is None:
            del values["transformers_version"]
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that are set."""
        return {name: value for name, value in self.to_dict().items() if value is not None or name not in _NAMES}

    def to_json_string(self, use_diff: bool = True, ignore_metadata: bool = False, keys_to_pop: list[str] | None = None) -> str:
        """The contents of generation_config.json.

        Args:
            use_diff: leave out the options that are None.
            ignore_metadata: leave out what is about the file.
            keys_to_pop: names to leave out.
        """
        omitted = {*(keys_to_pop or ()), *(_ABOUT_THE_FILE if ignore_metadata else ())}
        values = self.to_diff_dict() if use_diff else self.to_dict()
        if isinstance(values.get("sequence_bias"), dict):
            # JSON has no tuples as keys; transformers reads this form too.
            values["sequence_bias"] = [[list(tokens), bias] for tokens, bias in values["sequence_bias"].items()]
        kept = {name: value for name, value in values.items() if name not in omitted}
        return json.dumps(kept, indent=2, sort_keys=True, default=_as_json) + "\n"

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True, keys_to_pop: list[str] | None = None) -> None:
        Path(json_file_path).write_text(self.to_json_string(use_diff, keys_to_pop=keys_to_pop), encoding="utf-8")


def _as_json(value: Any) -> Any:
    """NumPy values, tensors, sets, dtypes and configurations as JSON has them."""
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if callable(getattr(value, "to_dict", None)):
        return value.to_dict()
    raise InputError(
        got=f"a GenerationConfig with a {type(value).__name__}",
        expected="values that JSON has",
        remedy="Pass that value to generate itself",
    )


class WithGenerationConfig:
    """The attribute `generation_config` of a model that has `config`."""

    config: Any

    @property
    def generation_config(self) -> GenerationConfig:
        """The options of `generate` that its calls do not set. A dictionary, or transformers' class, may be assigned too."""
        if "_generation_config" not in self.__dict__:
            self.generation_config = GenerationConfig.from_model_config(self.config)
        return self.__dict__["_generation_config"]

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.__dict__["_generation_config"] = GenerationConfig.of(value)
