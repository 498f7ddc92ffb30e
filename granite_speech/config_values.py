"""The base of the configurations, and the checks of values that options share.

A check takes a value and returns what was expected in its place, or None if the value is right.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from granite_speech.errors import ConfigError, UnsupportedError

__all__ = ["ACTIVATIONS", "Config", "activation_name", "boolean", "checked", "config_from_dict", "integer", "number", "optional", "shown"]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh")

Check = Callable[[Any], str | None]


def integer(low: int | None = None, high: int | None = None) -> Check:
    """From low to high, both included; a bool is not an integer here."""
    bounds = ("" if low is None else f" from {low}") + ("" if high is None else f" to {high}")

    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool)
        right = right and (low is None or low <= value) and (high is None or value <= high)
        return None if right else f"an integer{bounds}"

    return check


def number(low: float = -math.inf, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Check:
    """A finite number from low to high, which are excluded if open."""
    lower = "above" if open_low else "at least" if open_high else "from"
    upper = "and below" if open_high else "and at most" if open_low else "to"
    bounds = ("" if low == -math.inf else f" {lower} {low:g}") + ("" if high == math.inf else f" {upper} {high:g}")

    def check(value: Any) -> str | None:
        # Comparisons exclude NaN and infinities; math.isfinite would overflow on a very large integer.
        right = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
        right = right and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        return None if right else f"a finite number{bounds}"

    return check


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def activation_name(value: Any) -> str | None:
    return None if value in ACTIVATIONS else f"one of {', '.join(ACTIVATIONS)}"


def shown(value: Any) -> str:
    """A value as errors quote it: shortened, or its type if Python refuses to print it (an integer of thousands of digits)."""
    try:
        return f"{value!r:.100}"
    except ValueError:
        return f"a very long {type(value).__name__}"


def optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def checked(default: Any, check: Check) -> Any:
    """A dataclass field with a check in its metadata."""
    return field(default=default, metadata={"check": check})


_OTHER_FAMILIES = {
    "granite_speech_nar": "a non-autoregressive checkpoint (granite-speech-4.1-2b-nar)",
    "granite_speech5_ctc": "a TurboCTC checkpoint (granite-speech-5.0-470m-turboctc)",
}
_KINDS: dict[str, type["Config"]] = {}  # by model_type; each configuration class registers itself


@dataclass(init=False, eq=False)
class Config:
    """Base of the configurations: keyword construction, checks, unknown keys, dictionaries and files."""

    model_type: ClassVar[str]
    earlier_model_types: ClassVar[tuple[str, ...]] = ()  # read but never written
    attribute_map: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls) -> None:
        if "model_type" in vars(cls):
            _KINDS[cls.model_type] = cls

    def __init__(self, /, *args: Any, **kwargs: Any):
        names = [one.name for one in fields(self)]
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__} takes at most {len(names)} positional values, got {len(args)}")
        given = dict(zip(names, args, strict=False)) | {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        model_type = given.pop("model_type", self.model_type)
        if model_type not in (self.model_type, *self.earlier_model_types):
            raise ConfigError(
                got=f"model_type {shown(model_type)} for {type(self).__name__}",
                expected=f"{self.model_type!r}",
                remedy="Use the configuration class of that model type, or correct config.json",
            )
        for one in fields(self):
            setattr(self, one.name, given.pop(one.name, one.default))
        self._extra = given  # not among the attributes, where a key named like a method would replace it
        self._derive()
        self.validate()

    def _derive(self) -> None:
        """Set values that follow from others."""

    def validate(self) -> None:
        """Raise ConfigError for the first value that no model can be built from."""
        for one in fields(self):
            check = one.metadata.get("check")
            expected = check(getattr(self, one.name)) if check else None
            if expected:
                self.refuse(one.name, expected)
        self._validate_together()

    def _validate_together(self) -> None:
        """Check values that depend on each other."""

    def refuse(self, name: str, expected: str, remedy: str = "") -> None:
        raise ConfigError(
            got=f"{type(self).__name__}.{name} = {shown(getattr(self, name))}",
            expected=expected,
            remedy=remedy or f"Correct {name!r} in config.json or in the call",
        )

    def __getattr__(self, name: str) -> Any:
        # Called only if normal lookup fails: for another model's name of a field, or an unknown key.
        if name in type(self).attribute_map:
            return getattr(self, type(self).attribute_map[name])
        extra = self.__dict__.get("_extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_extra", {}):
            self._extra[name] = value
        else:
            object.__setattr__(self, type(self).attribute_map.get(name, name), value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    __hash__ = None

    def to_dict(self) -> dict[str, Any]:
        """The values for JSON, unknown keys included."""
        values = {one.name: getattr(self, one.name) for one in fields(self)} | self._extra
        plain = {name: value.to_dict() if isinstance(value, Config) else value for name, value in values.items()}
        return plain | {"model_type": self.model_type}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Build from the contents of a config.json."""
        return cls(**values)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> "Config":
        """Read `config.json` of a folder or hub id.

        Args:
            name_or_path: a folder, "embedded", or a hub id such as "ibm-granite/granite-speech-3.3-2b" (`hub.resolve`).
            hub: revision, cache_dir, local_files_only and token, as in `GraniteSpeechForConditionalGeneration.from_pretrained`.
        """
        from granite_speech.checkpoints.folder import load_json, resolve

        config = config_from_dict(load_json(resolve(name_or_path, **hub) / "config.json"))
        if not isinstance(config, cls):
            raise ConfigError(
                got=f"a config.json of model_type {config.model_type!r}",
                expected=f"{cls.model_type!r}",
                remedy=f"Load it with {type(config).__name__}",
            )
        return config

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` into a folder, which is created if missing."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.to_json_string())


def config_from_dict(values: dict[str, Any]) -> Config:
    """The configuration in a config.json, of the class that its `model_type` names.

    Raises:
        UnsupportedError: another model family, or a checkpoint that asks to run its own code.
        ConfigError: no `model_type`, or a value that no model can be built from.
    """
    model_type = values.get("model_type")
    name = model_type if isinstance(model_type, str) else ""
    other = _OTHER_FAMILIES.get("granite_speech_nar" if "nar" in name.split("_") else name)
    # Another family is reported first: removing its auto_map would not help.
    if "auto_map" in values and other is None:
        raise UnsupportedError(
            got=f"a config.json with auto_map, which asks to run code from the checkpoint ({shown(values['auto_map'])})",
            expected="a plain granite_speech checkpoint",
            remedy="Remove auto_map from config.json if the folder holds such a checkpoint; code from a checkpoint is never run",
        )
    if name in _KINDS:
        return _KINDS[name].from_dict(values)
    if model_type is None:
        raise ConfigError(got="a config.json without model_type", expected="'granite_speech'", remedy="Check that the folder holds a model")
    raise UnsupportedError(
        got=f"model_type {shown(model_type)}" + (f", {other}" if other else ""),
        expected="'granite_speech' or 'granite_speech_plus'",
        remedy="Run this checkpoint with the code its model card names",
    )
