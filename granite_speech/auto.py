"""transformers' `Auto` classes for this one model family; any other `model_type` is refused by name.

With these, a model card's snippet runs with one changed import:

    from granite_speech import AutoModelForSpeechSeq2Seq, AutoProcessor
"""

from pathlib import Path
from typing import Any, ClassVar

from granite_speech.checkpoints.call_options import pop_hub_options
from granite_speech.checkpoints.folder import load_json, resolve
from granite_speech.config import GraniteSpeechConfig
from granite_speech.config_base import Config
from granite_speech.config_files import config_from_dict
from granite_speech.errors import InputError, UnsupportedError
from granite_speech.inputs.features import GraniteSpeechFeatureExtractor
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from granite_speech.model import GraniteSpeechForConditionalGeneration, GraniteSpeechModel
from granite_speech.pretrained import Pretrained, as_config

__all__ = [
    "AutoConfig",
    "AutoFeatureExtractor",
    "AutoModel",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoProcessor",
    "AutoTokenizer",
]

# With these transformers' classes choose the class to load. Here there is one.
_CHOICE = ("trust_remote_code", "code_revision", "use_fast", "config", "tokenizer_type", "_from_auto")


class _Auto:
    """A class that is not instantiated; its methods return an object of another one."""

    result: ClassVar[type]

    def __init__(self, *args: Any, **kwargs: Any):
        raise InputError(
            got=f"{type(self).__name__}()",
            expected=f"a {self.result.__name__} loaded or built by a method of this class",
            remedy=f"Call {type(self).__name__}.from_pretrained(folder)",
        )

    @classmethod
    def _accept(cls, known: bool, *classes: Any) -> None:
        """A call of `register` is accepted if it says what is so anyway: in this package every configuration has its class.

        Raises:
            UnsupportedError: another class.
        """
        if not known or any(one is not None and not (isinstance(one, type) and issubclass(one, cls.result)) for one in classes):
            raise UnsupportedError(
                got=f"{cls.__name__}.register(…, {classes!r:.200})",
                expected=f"{cls.result.__name__}, for a configuration of this package",
                remedy="Use your class directly, without an Auto class, or transformers",
            )


def _is_own(config_class: Any) -> bool:
    return isinstance(config_class, type) and issubclass(config_class, GraniteSpeechConfig)


class AutoConfig(_Auto):
    """The configuration of a folder."""

    result = Config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Config | tuple[Config, dict[str, Any]]:
        """As `GraniteSpeechConfig.from_pretrained`, with the class that the file's `model_type` names."""
        return Config.from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> Config:
        """A configuration of this type with the given values: 'granite_speech', 'granite_speech_plus', or the type of a part.

        Raises:
            UnsupportedError: another type.
            ConfigError: a value that no model can be built from.
        """
        kind = type(config_from_dict({"model_type": model_type}))
        return kind(*args, **kwargs)

    @classmethod
    def register(cls, model_type: str, config: type[Config], exist_ok: bool = False) -> None:
        """Accepts only the class that is loaded anyway (`_Auto._accept`)."""
        cls._accept(getattr(config, "model_type", None) == model_type, config)


class _AutoModel(_Auto):
    result: ClassVar[type[Pretrained]] = GraniteSpeechForConditionalGeneration

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """As `GraniteSpeechForConditionalGeneration.from_pretrained`."""
        return cls.result.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config: GraniteSpeechConfig, **kwargs: Any) -> Any:
        """A model with random weights.

        Args:
            config: of the whole model, of this package or of transformers.
            kwargs: `dtype` or its earlier name `torch_dtype`, of the weights; options of transformers that change nothing here.

        Raises:
            InputError, UnsupportedError: another option.
        """
        return cls.result._from_config(as_config(config), **kwargs)

    @classmethod
    def register(cls, config_class: type, model_class: type, exist_ok: bool = False) -> None:
        """Accepts only the class that is loaded anyway (`_Auto._accept`)."""
        cls._accept(_is_own(config_class), model_class)


class AutoModelForSpeechSeq2Seq(_AutoModel):
    """The model of a folder."""


class AutoModelForSeq2SeqLM(_AutoModel):
    """The model of a folder, the same as `AutoModelForSpeechSeq2Seq`."""


class AutoModelForMultimodalLM(_AutoModel):
    """The model of a folder, the same as `AutoModelForSpeechSeq2Seq`."""


class AutoModel(_AutoModel):
    """The model of a folder without its head, `GraniteSpeechModel`."""

    result = GraniteSpeechModel


class AutoProcessor(_Auto):
    """Feature extractor and tokenizer of a folder."""

    result = GraniteSpeechProcessor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> GraniteSpeechProcessor:
        """As `GraniteSpeechProcessor.from_pretrained`; a config.json, if present, must be of this model family."""
        folder, options = _processing_folder(pretrained_model_name_or_path, kwargs)
        return GraniteSpeechProcessor.from_pretrained(folder, **options)

    @classmethod
    def register(cls, config_class: type, processor_class: type, exist_ok: bool = False) -> None:
        """Accepts only the class that is loaded anyway (`_Auto._accept`)."""
        cls._accept(_is_own(config_class), processor_class)


class AutoTokenizer(_Auto):
    """The tokenizer of a folder."""

    result = GraniteSpeechTokenizer

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *inputs: Any, **kwargs: Any) -> GraniteSpeechTokenizer:
        """As `GraniteSpeechTokenizer.from_pretrained`, with the same check as `AutoProcessor`."""
        folder, options = _processing_folder(pretrained_model_name_or_path, kwargs)
        return GraniteSpeechTokenizer.from_pretrained(folder, *inputs, **options)

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
        cls._accept(_is_own(config_class), tokenizer_class, slow_tokenizer_class, fast_tokenizer_class)


class AutoFeatureExtractor(_Auto):
    """The feature extractor of a folder."""

    result = GraniteSpeechFeatureExtractor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> GraniteSpeechFeatureExtractor:
        """As `GraniteSpeechFeatureExtractor.from_pretrained`, with the same check as `AutoProcessor`."""
        folder, options = _processing_folder(pretrained_model_name_or_path, kwargs)
        return GraniteSpeechFeatureExtractor.from_pretrained(folder, **options)

    @classmethod
    def register(cls, config_class: type, feature_extractor_class: type, exist_ok: bool = False) -> None:
        """Accepts only the class that is loaded anyway (`_Auto._accept`)."""
        cls._accept(_is_own(config_class), feature_extractor_class)


def _processing_folder(name_or_path: str | Path, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder, which may hold only a processor, and the options that are not about finding it."""
    options = {name: value for name, value in options.items() if name not in _CHOICE}
    folder = resolve(name_or_path, **pop_hub_options(options), weights=False)
    if (folder / "config.json").is_file():
        config = config_from_dict(load_json(folder / "config.json"))
        if not isinstance(config, GraniteSpeechConfig):
            raise UnsupportedError(
                got=f"model_type {config.model_type!r}, which is part of a model",
                expected="'granite_speech' or 'granite_speech_plus'",
                remedy="Pass the folder of the whole checkpoint",
            )
    return folder, options
