"""transformers' `Auto` classes for the two model families of this package; any other `model_type` is refused by name.

With these, a model card's snippet runs with one changed import:

    from granite_speech import AutoModelForSpeechSeq2Seq, AutoProcessor
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from granite_speech.checkpoints.adapter_folder import base_of_adapter, is_only_adapter
from granite_speech.checkpoints.call_options import pop_hub_options
from granite_speech.checkpoints.folder import load_json, resolve
from granite_speech.config import GraniteSpeechConfig
from granite_speech.config_base import Config
from granite_speech.config_ctc import GraniteSpeech5CTCConfig, GraniteSpeech5EncoderConfig
from granite_speech.config_files import config_from_dict
from granite_speech.errors import InputError, UnsupportedError
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.inputs.ctc_tokenizer import GraniteSpeech5Tokenizer
from granite_speech.inputs.delta_features import GraniteSpeech5FeatureExtractor
from granite_speech.inputs.features import GraniteSpeechFeatureExtractor
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.processor_files import EXTRACTOR, PROCESSOR
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from granite_speech.inputs.tokenizer_files import CONFIG
from granite_speech.pretrained import as_config

__all__ = [
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoModel",
    "AutoModelForCTC",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoProcessor",
    "AutoTokenizer",
]

# With these transformers' classes choose the class to load. Here the folder does.
_CHOICE = ("trust_remote_code", "code_revision", "use_fast", "config", "tokenizer_type", "_from_auto")
_MODEL = "model"  # granite_speech.model, and other modules by their names in the package
_SEQ2SEQ = dict.fromkeys(("granite_speech", "granite_speech_plus"), (_MODEL, "GraniteSpeechForConditionalGeneration"))
_CTC = {"granite_speech5_ctc": ("model_ctc", "GraniteSpeech5ForCTC")}


class _Family(NamedTuple):
    """What comes with a model: the classes that AutoProcessor, AutoTokenizer and AutoFeatureExtractor load."""

    processor: type
    tokenizer: type
    extractor: type


_SPEECH = _Family(GraniteSpeechProcessor, GraniteSpeechTokenizer, GraniteSpeechFeatureExtractor)
_SPEECH5 = _Family(GraniteSpeech5Processor, GraniteSpeech5Tokenizer, GraniteSpeech5FeatureExtractor)
_FAMILIES = {GraniteSpeechConfig: _SPEECH, GraniteSpeech5CTCConfig: _SPEECH5, GraniteSpeech5EncoderConfig: _SPEECH5}


def _family(config_class: Any) -> _Family | None:
    """The family of a configuration's class, or None."""
    return next((one for kind, one in _FAMILIES.items() if isinstance(config_class, type) and issubclass(config_class, kind)), None)


class _Auto:
    """A class that is not instantiated; its methods return an object of another one."""

    result: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any):
        raise InputError(
            got=f"{type(self).__name__}()",
            expected=f"{self.result} loaded or built by a method of this class",
            remedy=f"Call {type(self).__name__}.from_pretrained(folder)",
        )

    @classmethod
    def _accept(cls, expected: type | None, *classes: Any) -> None:
        """A call of `register` is accepted if it says what is so anyway: in this package every configuration has its class, `expected`.

        Raises:
            UnsupportedError: another class.
        """
        if expected is None or any(one is not None and not (isinstance(one, type) and issubclass(one, expected)) for one in classes):
            raise UnsupportedError(
                got=f"{cls.__name__}.register(…, {classes!r:.200})",
                expected=f"a configuration of this package{f', with {expected.__name__}' if expected else ''}",
                remedy="Use your class directly, without an Auto class, or transformers",
            )


class AutoConfig(_Auto):
    """The configuration of a folder."""

    result = "a configuration"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Config | tuple[Config, dict[str, Any]]:
        """As `GraniteSpeechConfig.from_pretrained`, with the class that the file's `model_type` names."""
        return Config.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> Config:
        """A configuration of this type with the given values: 'granite_speech', 'granite_speech_plus', 'granite_speech5_ctc', or the type
        of a part.

        Raises:
            UnsupportedError: another type.
            ConfigError: a value that no model can be built from.
        """
        kind = type(config_from_dict({"model_type": model_type}))
        return kind(*args, **kwargs)

    @classmethod
    def register(cls, model_type: str, config: type[Config], exist_ok: bool = False) -> None:
        """Accepts only the class that is loaded anyway (`_Auto._accept`)."""
        cls._accept(Config if getattr(config, "model_type", None) == model_type else None, config)


class _AutoModel(_Auto):
    result = "a model"
    models: ClassVar[dict[str, tuple[str, str]]]  # by model_type: the module and the class

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *model_args: Any, **kwargs: Any) -> Any:
        """As `from_pretrained` of the class that the `model_type` in the folder's config.json, or in `config`, names.

        Raises:
            UnsupportedError: a `model_type` of another Auto class, or of another family.
        """
        kind = cls._class_of(_model_type(pretrained_model_name_or_path, kwargs))
        return kind.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: Config, **kwargs: Any) -> Any:
        """A model with random weights.

        Args:
            config: of the whole model, of this package or of transformers.
            kwargs: `dtype` or its earlier name `torch_dtype`, of the weights; options of transformers that change nothing here.

        Raises:
            InputError, UnsupportedError: another option, or a configuration of another model.
        """
        kind = cls._class_of(_type_in(config))
        return kind._from_config(as_config(config, kind.config_class), **kwargs)

    @classmethod
    def register(cls, config_class: type, model_class: type, exist_ok: bool = False) -> None:
        """Accepts only the class that is loaded anyway (`_Auto._accept`)."""
        own = isinstance(config_class, type) and issubclass(config_class, Config) and config_class.model_type in cls.models
        cls._accept(cls._class_of(config_class.model_type) if own else None, model_class)

    @classmethod
    def _class_of(cls, model_type: Any) -> type:
        if model_type is None:
            model_type = next(iter(cls.models))  # whose methods say what is missing
        if not isinstance(model_type, str) or model_type not in cls.models:
            config_from_dict({"model_type": model_type})  # refuses other families
            right = [one.__name__ for one in (AutoModelForSpeechSeq2Seq, AutoModelForCTC, AutoModel) if model_type in one.models]
            raise UnsupportedError(
                got=f"model_type {model_type!r} for {cls.__name__}" + ("" if right else ", which is part of a model"),
                expected=" or ".join(map(repr, cls.models)),
                remedy=f"Load it with {right[0]}" if right else "Pass the folder of the whole checkpoint",
            )
        module, name = cls.models[model_type]
        return getattr(import_module(f"granite_speech.{module}"), name)


class AutoModelForSpeechSeq2Seq(_AutoModel):
    """The model of a folder: audio and text in, text out."""

    models = _SEQ2SEQ


class AutoModelForSeq2SeqLM(_AutoModel):
    """The model of a folder, the same as `AutoModelForSpeechSeq2Seq`."""

    models = _SEQ2SEQ


class AutoModelForMultimodalLM(_AutoModel):
    """The model of a folder, the same as `AutoModelForSpeechSeq2Seq`."""

    models = _SEQ2SEQ


class AutoModelForCTC(_AutoModel):
    """The model of a folder, of a family without a language model: `GraniteSpeech5ForCTC`."""

    models = _CTC


class AutoModel(_AutoModel):
    """The model of a folder without its head, `GraniteSpeechModel`; as in transformers, with its head if it is a `GraniteSpeech5ForCTC`."""

    models = dict.fromkeys(_SEQ2SEQ, (_MODEL, "GraniteSpeechModel")) | _CTC
    models["granite_speech5_encoder"] = ("modules.ctc_encoder", "GraniteSpeech5Encoder")


class AutoProcessor(_Auto):
    """Feature extractor and tokenizer of a folder."""

    result = "a processor"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> GraniteSpeechProcessor | GraniteSpeech5Processor:
        """As `from_pretrained` of the class that belongs to the folder's config.json, or without one to its other files.

        Raises:
            UnsupportedError: a config.json of another family, or of part of a model.
        """
        folder, options, family = _processing_folder(pretrained_model_name_or_path, kwargs)
        return family.processor.from_pretrained(folder, **options)

    @classmethod
    def register(cls, config_class: type, processor_class: type, exist_ok: bool = False) -> None:
        """Accepts only the class that is loaded anyway (`_Auto._accept`)."""
        cls._accept(getattr(_family(config_class), "processor", None), processor_class)


class AutoTokenizer(_Auto):
    """The tokenizer of a folder."""

    result = "a tokenizer"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *inputs: Any, **kwargs: Any
    ) -> GraniteSpeechTokenizer | GraniteSpeech5Tokenizer:
        """As `from_pretrained` of the class that `AutoProcessor` would load, with the same check."""
        folder, options, family = _processing_folder(pretrained_model_name_or_path, kwargs)
        return family.tokenizer.from_pretrained(folder, *inputs, **options)

    @classmethod
    def register(
        cls,
        config_class: type,
        tokenizer_class: type | None = None,
        slow_tokenizer_class: type | None = None,
        fast_tokenizer_class: type | None = None,
        exist_ok: bool = False,
    ) -> None:
        """Accepts only the class that is loaded anyway (`_Auto._accept`)."""
        cls._accept(getattr(_family(config_class), "tokenizer", None), tokenizer_class, slow_tokenizer_class, fast_tokenizer_class)


class AutoFeatureExtractor(_Auto):
    """The feature extractor of a folder."""

    result = "a feature extractor"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> GraniteSpeechFeatureExtractor | GraniteSpeech5FeatureExtractor:
        """As `from_pretrained` of the class that `AutoProcessor` would load, with the same check."""
        folder, options, family = _processing_folder(pretrained_model_name_or_path, kwargs)
        return family.extractor.from_pretrained(folder, **options)

    @classmethod
    def register(cls, config_class: type, feature_extractor_class: type, exist_ok: bool = False) -> None:
        """Accepts only the class that is loaded anyway (`_Auto._accept`)."""
        cls._accept(getattr(_family(config_class), "extractor", None), feature_extractor_class)


def _type_in(config: Any) -> Any:
    """The `model_type` of a configuration, of this package or of transformers, or of a dictionary; None if it has none."""
    return config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)


def _model_type(name_or_path: str | Path | None, options: Mapping[str, Any]) -> Any:
    """The `model_type` of what a call of `from_pretrained` loads; None if it does not say."""
    given = options.get("config")
    if isinstance(given, str | Path):
        return Config.get_config_dict(given)[0].get("model_type")
    if given is not None or name_or_path is None:
        return _type_in(given)
    hub = pop_hub_options(dict(options))
    folder = resolve(name_or_path, **hub, weights=False)
    if is_only_adapter(folder):
        hub = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}  # of the adapter
        folder, _ = base_of_adapter(folder, **hub)
    file = folder / "config.json"
    return load_json(file).get("model_type") if file.is_file() else None


def _processing_folder(name_or_path: str | Path, options: dict[str, Any]) -> tuple[Path, dict[str, Any], _Family]:
    """The folder, which may hold only a processor, the options that are not about finding it, and the family that it belongs to."""
    options = {name: value for name, value in options.items() if name not in _CHOICE}
    folder = resolve(name_or_path, **pop_hub_options(options), weights=False)
    if not (folder / "config.json").is_file():
        return folder, options, _SPEECH5 if _names_speech5(folder) else _SPEECH
    config = config_from_dict(load_json(folder / "config.json"))
    family = _family(type(config))
    if family is None:
        raise UnsupportedError(
            got=f"model_type {config.model_type!r}, which is part of a model",
            expected="'granite_speech', 'granite_speech_plus' or 'granite_speech5_ctc'",
            remedy="Pass the folder of the whole checkpoint",
        )
    return folder, options, family


def _names_speech5(folder: Path) -> bool:
    """Whether the files of a processor, a feature extractor or a tokenizer name a class of TurboCTC's family."""
    files = [load_json(folder / name) for name in (PROCESSOR, EXTRACTOR, CONFIG) if (folder / name).is_file()]
    named = {str(one.get(key)) for one in files for key in ("processor_class", "feature_extractor_type", "tokenizer_class")}
    names = {*(one.__name__ for one in _SPEECH5), GraniteSpeech5Tokenizer.written_class, f"{GraniteSpeech5Tokenizer.written_class}Fast"}
    return not named.isdisjoint(names)
