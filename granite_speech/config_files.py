"""Configurations in files: config.json of a folder or hub id, and the class that its `model_type` names."""

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self
from warnings import warn

from granite_speech.checkpoints.call_options import pop_hub_options
from granite_speech.checkpoints.upload import PushToHub, saving
from granite_speech.config_values import shown
from granite_speech.errors import CheckpointError, ConfigError, UnsupportedError

__all__ = ["ConfigFiles", "config_from_dict"]

_NON_AUTOREGRESSIVE = "a non-autoregressive checkpoint (granite-speech-4.1-2b-nar)"
_KINDS: dict[str, type["ConfigFiles"]] = {}  # by model_type; each configuration class registers itself
_HOMES = ("granite_speech.config", "granite_speech.config_ctc")
_MODEL_TYPES = "'granite_speech', 'granite_speech_plus' or 'granite_speech5_ctc'"


class ConfigFiles(PushToHub):
    """Reading and writing of the configuration classes. Each registers itself by its `model_type`."""

    model_type: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "model_type" in vars(cls):
            _KINDS[cls.model_type] = cls

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of a folder's or hub id's config.json, and the options that are not about finding it.

        Args:
            pretrained_model_name_or_path: as of `from_pretrained`.
            kwargs: `cache_dir`, `force_download`, `local_files_only`, `token`, `revision` and `subfolder`, and others.
        """
        from granite_speech.checkpoints.folder import load_json, resolve

        hub = pop_hub_options(kwargs)
        path = Path(pretrained_model_name_or_path).expanduser() if isinstance(pretrained_model_name_or_path, str | Path) else None
        if path is not None and path.suffix == ".json" and path.is_file():
            return load_json(path), kwargs
        return load_json(resolve(pretrained_model_name_or_path, **hub, weights=False) / "config.json"), kwargs

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = "main",
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read a config.json. From the folder of a whole model, the configuration of a part takes that part.

        Args:
            pretrained_model_name_or_path: a folder, a JSON file, "embedded", or a hub id such as
                "ibm-granite/granite-speech-3.3-2b" (`hub.resolve`).
            cache_dir, force_download, local_files_only, token, revision: of the hub.
            kwargs: `subfolder`; values that replace those of the file, for a part as an object or dictionary
                (`text_config={"attention_dropout": 0.1}`); transformers' options that change nothing here.
                `return_unused_kwargs=True` returns a tuple of the configuration and the options that are not attributes.

        Raises:
            CheckpointNotFoundError, CheckpointError: no such file, or one that does not parse.
            ConfigError, UnsupportedError: another kind of model, or a value that no model can be built from.
            InputError: an unknown option.
        """
        hub = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only, "revision": revision}
        hub |= {} if token is None else {"token": token}
        values, options = cls.get_config_dict(pretrained_model_name_or_path, **hub, **kwargs)
        config = _of_kind(cls, values)
        config.name_or_path = pretrained_model_name_or_path
        return config.with_options(options, f"{cls.__name__}.from_pretrained")

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
        """Read a configuration of this class from a JSON file."""
        from granite_speech.checkpoints.folder import load_json

        return cls.from_dict(load_json(json_file))

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `config.json` into a folder.

        Args:
            save_directory: created if missing; an existing config.json is replaced.
            push_to_hub: upload the file afterwards.
            kwargs: of the upload: `repo_id`, which is the folder's name if omitted, `commit_message`, `private`, `token` and others
                (`push_to_hub`); transformers' options that change nothing here.

        Raises:
            CheckpointError: the path is a file, or cannot be written.
            ConfigError: a value that no model can be built from.
        """
        self.validate()
        with saving(save_directory, f"{type(self).__name__}.save_pretrained", push_to_hub=push_to_hub, options=kwargs) as folder:
            self.to_json_file(folder / "config.json")

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json_string` to a file, which is replaced only when the text is complete.

        Raises:
            CheckpointError: the file cannot be written.
        """
        path = Path(json_file_path).expanduser()
        try:
            partial = path.with_name(f".{path.name}.part")
            partial.write_text(self.to_json_string(use_diff), encoding="utf-8")
            partial.replace(path)
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointError(
                got=f"{str(path)!r}, which could not be written: {error}",
                expected="a writable path, and values that JSON can hold",
                remedy="Check the path, its permissions and the values set in the configuration",
            ) from error


def _of_kind(cls: type[ConfigFiles], values: dict[str, Any]) -> ConfigFiles:
    """The configuration of class `cls` in a config.json: the whole, or a part of it."""
    kind = _kind(values.get("model_type"))
    parts = (
        {} if kind is None or issubclass(kind, cls) else {name: part for name, part in kind.sub_configs.items() if issubclass(part, cls)}
    )
    for name, part in parts.items():
        return part.from_dict(values.get(name) or {})
    config = config_from_dict(values)
    if not isinstance(config, cls):
        raise ConfigError(
            got=f"a config.json of model_type {config.model_type!r}",
            expected=f"{cls.model_type!r}",
            remedy=f"Load it with {type(config).__name__}",
        )
    return config


def _kind(model_type: Any) -> type[ConfigFiles] | None:
    """The class of a `model_type`, or None."""
    for home in _HOMES:  # imported here because they import this module
        import_module(home)
    return _KINDS.get(model_type) if isinstance(model_type, str) else None


def config_from_dict(values: dict[str, Any]) -> ConfigFiles:
    """The configuration in a config.json, of the class that its `model_type` names.

    Raises:
        UnsupportedError: another model family.
        ConfigError: no `model_type`, or a value that no model can be built from.
    """
    model_type = values.get("model_type")
    name = model_type if isinstance(model_type, str) else ""
    if (kind := _kind(name)) is not None:
        if "auto_map" in values:
            warn(
                "config.json has auto_map, which names code in the checkpoint. That code is not run: the model is loaded with the code "
                "of this package, and saved without auto_map.",
                stacklevel=3,
            )
        return kind.from_dict({name: value for name, value in values.items() if name != "auto_map"})
    if model_type is None:
        raise ConfigError(got="a config.json without model_type", expected=_MODEL_TYPES, remedy="Check that the folder holds a model")
    other = _NON_AUTOREGRESSIVE if "nar" in name.split("_") else None
    raise UnsupportedError(
        got=f"model_type {shown(model_type)}" + (f", {other}" if other else ""),
        expected=_MODEL_TYPES,
        remedy="Run this checkpoint with the code its model card names",
    )
