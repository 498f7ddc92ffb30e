"""The keywords of a processor's call, in all forms that transformers has: alone, or in dictionaries for each modality."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from granite_speech.errors import InputError, UnsupportedError
from granite_speech.inputs.text_options import TextOptions

__all__ = ["CallArguments", "chat_arguments", "group", "only_one", "refuse_other_modalities"]

_TEXT = {one.name for one in fields(TextOptions)} | {
    "text_pair",
    "text_target",
    "text_pair_target",
    "max_target_length",
    "tokenizer_kwargs",
}
_GROUPS = ("text_kwargs", "audio_kwargs", "common_kwargs", "images_kwargs", "videos_kwargs")
# Clips keep their lengths, whatever these say; other values are refused.
_OF_AUDIO = {"padding": (True, "longest"), "truncation": (False,), "return_attention_mask": (True, False), "return_tensors": ("pt", "np")}
_MODALITIES = ("images", "videos", "images_kwargs", "videos_kwargs")
_OFF = ("return_mm_token_type_ids", "return_text_replacement_offsets", "return_metadata")
_CALL = _TEXT | {*_GROUPS, *_MODALITIES, *_OFF, "audio", "audios", "device", "sampling_rate", "load_audio_backend"}


class CallArguments(NamedTuple):
    """A call's options, sorted.

    Attributes:
        text: for the tokenizer.
        audio: of a keyword audio or audios; None without.
        device: of the features.
        sampling_rate: of the clips, in Hz, or None.
    """

    text: dict[str, Any]
    audio: Any
    device: Any
    sampling_rate: int | None

    @classmethod
    def of(
        cls,
        device: Any = "cpu",
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        padding: bool | str | None = True,
        options: Mapping[str, Any] | None = None,
    ) -> "CallArguments":
        """Sorts the arguments of a call.

        Raises:
            InputError: an unknown option, or one that is given twice with different values.
            UnsupportedError: options of another modality.
        """
        text = {"padding": True if padding is None else padding, "return_tensors": return_tensors, "truncation": None, "max_length": None}
        if not options:  # most calls
            return cls(text, None, device, sampling_rate)
        options = dict(options)
        text_kwargs, audio_kwargs, common = (group(options, name) for name in _GROUPS[:3])
        refuse_other_modalities(options)
        if unknown := sorted(options.keys() - _CALL):
            raise InputError(
                got=f"unknown options {unknown}", expected="text, audio, device, sampling_rate and text options", remedy="Remove them"
            )
        audio = only_one(options.get("audio"), options.get("audios"))
        flat = {name: value for name, value in options.items() if name in _TEXT}
        passed = {**flat, **({"padding": padding} if padding is not True else {})}
        if twice := sorted(name for name in text_kwargs if name in passed and passed[name] != text_kwargs[name]):
            raise InputError(got=f"{', '.join(twice)} in text_kwargs and as a keyword", expected="each once", remedy="Remove one")
        if unknown := sorted((text_kwargs.keys() - _TEXT - {*_OFF}) | (common.keys() - _TEXT - {"device", "sampling_rate"})):
            raise InputError(
                got=f"unknown options {unknown} in text_kwargs or common_kwargs", expected="text options", remedy="Remove them"
            )
        text |= {name: value for name, value in common.items() if name in _TEXT} | flat | text_kwargs
        return cls(text, audio, *_audio_options(device, sampling_rate, common, audio_kwargs))


def group(options: dict[str, Any], name: str) -> dict[str, Any]:
    """Removes a dictionary of options, such as text_kwargs, from a call's options and returns a copy; empty if there is none."""
    group = options.pop(name, None)
    if not isinstance(group, Mapping | None):
        raise InputError(got=f"{name} of type {type(group).__name__}", expected="a dictionary of options", remedy="Pass one")
    return dict(group or {})


def refuse_other_modalities(options: dict[str, Any]) -> None:
    """Removes options of images and videos, and those that change nothing, from a call's options; UnsupportedError if one is in use."""
    for name in _MODALITIES:
        value = options.pop(name, None)
        if value is not None and not (hasattr(value, "__len__") and len(value) == 0):
            raise UnsupportedError(got=f"{name} for a model of speech", expected="text and audio", remedy="Omit it")
    for name in _OFF:
        if options.pop(name, None):
            raise UnsupportedError(
                got=f"{name}=True", expected="False", remedy="Omit it; audio tokens are where input_ids have audio_token_id"
            )
    options.pop("load_audio_backend", None)  # files are always decoded with FFmpeg


def only_one(first: Any, second: Any) -> Any:
    """Whichever of audio and audios was given, or None."""
    if first is not None and second is not None:
        raise InputError(got="audio and audios, or two lots of audio", expected="one of them", remedy="Pass audio once")
    return second if first is None else first


def _audio_options(device: Any, sampling_rate: int | None, common: dict[str, Any], options: dict[str, Any]) -> tuple[Any, int | None]:
    """The device and the rate."""
    options.pop("load_audio_backend", None)
    device = options.pop("device", common.get("device", device))
    nested = options.pop("sampling_rate", common.get("sampling_rate"))
    if nested is not None and sampling_rate not in (None, nested):
        raise InputError(got=f"sampling_rate={sampling_rate} and {nested} in audio_kwargs", expected="one rate", remedy="Remove one")
    for name, value in options.items():
        if value is not None and not (name in _OF_AUDIO and value in _OF_AUDIO[name]):
            raise InputError(
                got=f"{name}={value!r:.40} in audio_kwargs",
                expected="device and sampling_rate",
                remedy="Remove it; clips keep their lengths",
            )
    return device, sampling_rate if nested is None else nested


def chat_arguments(
    processor_kwargs: Mapping[str, Any] | None, names: Mapping[str, Any], return_tensors: str | None, load_audio_from_video: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `CallArguments.of` for `apply_chat_template`, and the names for the template.

    Args:
        processor_kwargs: the call's dictionary.
        names: its other keywords, of which options of the processor's call are not for the template.
        return_tensors: the call's.
        load_audio_from_video: the call's.
    """
    if load_audio_from_video:
        raise UnsupportedError(
            got="load_audio_from_video=True", expected="recordings", remedy="Pass the file as audio; its sound is decoded"
        )
    given = {name: value for name, value in names.items() if name in _CALL} | dict(processor_kwargs or {})
    if return_tensors is not None:
        given["return_tensors"] = return_tensors
    options = {name: given.pop(name) for name in ("device", "sampling_rate", "return_tensors", "padding") if name in given}
    return {**options, "options": given}, {name: value for name, value in names.items() if name not in _CALL}
