"""The base of the configurations: construction, unknown keys, dictionaries, and the options of calls.

A configuration is a dataclass whose fields are checked when it is built. Everything else that a file or a call gives is kept:
the attributes that all configurations have (`config_attributes`), and unknown keys.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from typing import Any, ClassVar, Self, dataclass_transform

from granite_speech.checkpoints.call_options import check_unused
from granite_speech.config_attributes import COMMON, CommonAttributes
from granite_speech.config_files import ConfigFiles
from granite_speech.config_values import checked, shown
from granite_speech.errors import ConfigError, InputError

__all__ = ["Config", "configuration"]

_SETTABLE = {"torch_dtype", "name_or_path", "num_labels", "attn_implementation", "_attn_implementation", "experts_implementation"}


@dataclass_transform(kw_only_default=True, field_specifiers=(checked,))
def configuration(cls: type) -> type:
    """Make a dataclass whose constructor shows its own parameters and those of all configurations, and accepts any other key."""
    cls = dataclass(init=False, eq=False, repr=False)(cls)

    def init(self, /, *args: Any, **kwargs: Any):
        self._build(args, kwargs)

    own = [Parameter(one.name, Parameter.POSITIONAL_OR_KEYWORD, default=one.default, annotation=one.type) for one in fields(cls)]
    common = [Parameter(name, Parameter.KEYWORD_ONLY, default=default) for name, default in COMMON.items() if not name.startswith("_")]
    init.__name__, init.__qualname__ = "__init__", f"{cls.__qualname__}.__init__"
    init.__signature__ = Signature(
        [Parameter("self", Parameter.POSITIONAL_ONLY), *own, *common, Parameter("kwargs", Parameter.VAR_KEYWORD)]
    )
    cls.__init__ = init
    return cls


class Config(CommonAttributes, ConfigFiles):
    """Base of the configurations. A value is checked when the configuration is built, and by `validate`."""

    model_type: ClassVar[str]
    earlier_model_types: ClassVar[tuple[str, ...]] = ()  # read but never written
    attribute_map: ClassVar[dict[str, str]] = {}

    def _build(self, args: tuple, kwargs: dict[str, Any]) -> None:
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
        given = self._current_names(given)
        for one in fields(self):
            setattr(self, one.name, given.pop(one.name, one.default))
        self._derive()
        self._take_common(given)
        self._extra = given  # not among the attributes, where a key named like a method would replace it
        self.validate()

    def _current_names(self, given: dict[str, Any]) -> dict[str, Any]:
        """The constructor's values, with keys of earlier versions translated."""
        return given

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

    # --- attributes --------------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # Called only if normal lookup fails: for another model's name of a field, or an unknown key.
        if name in type(self).attribute_map:
            return getattr(self, type(self).attribute_map[name])
        extra = self.__dict__.get("_extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        name = type(self).attribute_map.get(name, name)
        extra = self.__dict__.get("_extra")
        unknown = not (name.startswith("_") or name in COMMON or name in self._fields() or hasattr(type(self), name))
        if extra is not None and (name in extra or unknown):
            extra[name] = value  # saved, as in transformers
            return
        if isinstance(value, dict) and name in self.sub_configs:
            value = self.sub_configs[name](**value)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if self._extra.pop(name, self) is self:
            object.__delattr__(self, name)

    def __iter__(self) -> Iterator[str]:
        """The names of the attributes, so that `name in config` works."""
        return iter(self.to_dict())

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.to_diff_dict() == other.to_diff_dict()

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "Config":
        """The language model's configuration, or this one if it has no such part.

        Args:
            decoder, encoder: which side is asked for. The language model is a decoder.
        """
        wants_decoder = bool(decoder) or not encoder
        return self.__dict__.get("text_config", self) if wants_decoder else self

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Set attributes, and check the result.

        Raises:
            ConfigError: a value that no model can be built from.
        """
        for name, value in config_dict.items():
            setattr(self, name, value)
        self.validate()

    def update_from_string(self, update_str: str) -> None:
        """Set attributes from text such as "downsample_rate=5,has_lora_adapter=false". Each must exist already.

        Raises:
            InputError: an attribute that does not exist, or text that is not of the attribute's type.
        """
        found = {}
        for item in update_str.split(","):
            name, _, text = item.partition("=")
            kind = type(getattr(self, name, None))
            try:
                found[name] = (
                    {"true": True, "false": False}[text.lower()] if kind is bool else {int: int, float: float, str: str}[kind](text)
                )
            except (KeyError, ValueError) as error:
                raise InputError(
                    got=f"{item!r:.100} for {type(self).__name__}",
                    expected="name=value, with the name of a number, text, true or false that the configuration has",
                    remedy="Set other attributes by name, config.name = value",
                ) from error
        self.update(found)

    # --- dictionaries and JSON ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All values as JSON can hold them, unknown keys included."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        plain = {name: value.to_dict() if isinstance(value, Config) else copy.deepcopy(value) for name, value in values.items()}
        return plain | self._common() | copy.deepcopy(self._extra) | {"model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: `to_dict` without those attributes of all configurations that have their defaults."""
        values = {name: value for name, value in self.to_dict().items() if name not in COMMON or value != COMMON[name]}
        values.pop("_name_or_path", None)
        values |= {name: getattr(self, name).to_diff_dict() for name in self.sub_configs}
        # transformers 4.x reads `torch_dtype`, and 5.x `dtype`.
        return values | ({"torch_dtype": values["dtype"]} if "dtype" in values else {})

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON text of `to_diff_dict`, or of `to_dict`."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self | tuple[Self, dict[str, Any]]:
        """Build from the contents of a config.json.

        Args:
            config_dict: the contents; not modified.
            kwargs: values that replace those; `return_unused_kwargs=True` returns the options that are not attributes, too.

        Raises:
            ConfigError: a value that no model can be built from.
            InputError: an unknown option, without `return_unused_kwargs`.
        """
        if not isinstance(config_dict, Mapping):
            raise InputError(
                got=f"a {type(config_dict).__name__} as a configuration", expected="a dictionary", remedy="Pass the contents of config.json"
            )
        return cls(**config_dict).with_options(kwargs, f"{cls.__name__}.from_dict")

    # --- files -------------------------------------------------------------------------------------------------------------------

    def with_options(self, options: Mapping[str, Any], call: str) -> Self | tuple[Self, dict[str, Any]]:
        """This configuration, changed by the options of a call; with `return_unused_kwargs` also the options that are not attributes."""
        options = dict(options)
        return_unused = options.pop("return_unused_kwargs", False)
        unused = self.override(options)
        if return_unused:
            return self, unused
        self.refuse_unused(unused, call)
        return self

    def override(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Set those options that are attributes, and check the result. Returns the others.

        A dictionary for a part changes only the values that it names.
        """
        unused = {}
        for name, value in options.items():
            attribute = self.attribute_map.get(name, name)
            part = self.__dict__.get(attribute)
            if name in ("dtype", "torch_dtype") and value in (None, "auto"):
                continue
            if isinstance(part, Config) and isinstance(value, Mapping):
                for key, one in part.override(value).items():
                    setattr(part, key, one)
            elif name == "attn_implementation":
                check_unused({name: value}, type(self).__name__)
                self._attn_implementation = value
            elif self._has(attribute):
                setattr(self, attribute, value)
            else:
                unused[name] = value
        self.validate()
        return unused

    @classmethod
    def _fields(cls) -> set[str]:
        return {one.name for one in fields(cls)}

    def _has(self, name: str) -> bool:
        return name in self._fields() or name in COMMON or name in _SETTABLE or name in self._extra

    def refuse_unused(self, unused: Mapping[str, Any], call: str, known: tuple[str, ...] = ()) -> None:
        """Accept options that change nothing (`call_options`), and refuse the rest by name; a value of a part with the way to set it."""
        for name, value in unused.items():
            homes = [part for part in self.sub_configs if getattr(self, part)._has(name)]
            if homes:
                raise InputError(
                    got=f"{name}={value!r:.100} for {call}, which is a value of {' and of '.join(homes)}",
                    expected="the part that it is for",
                    remedy=f"Pass {homes[0]}={{{name!r}: {value!r:.100}}}",
                )
        check_unused(unused, call, known=(*known, *self._fields(), *(name for name in COMMON if not name.startswith("_"))))
