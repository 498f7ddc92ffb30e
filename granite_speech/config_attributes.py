"""The attributes that transformers gives every configuration, with its defaults.

Most describe other models. They are kept, changed and saved as in transformers; `dtype`, `output_hidden_states`,
`output_attentions` and `return_dict` have an effect.
"""

import copy
from typing import Any, ClassVar

__all__ = ["COMMON", "CommonAttributes"]

_LABELS = ("LABEL_0", "LABEL_1")
# Name in files → default.
COMMON: dict[str, Any] = {
    "architectures": None,
    "output_hidden_states": False,
    "output_attentions": False,
    "return_dict": True,
    "dtype": None,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "id2label": dict(enumerate(_LABELS)),
    "label2id": {name: number for number, name in enumerate(_LABELS)},
    "problem_type": None,
    "transformers_version": None,
    "_name_or_path": "",
}
_OTHER_NAMES = {"torch_dtype": "dtype", "name_or_path": "_name_or_path"}
# How transformers computes, and the commit that was downloaded: kept in memory, and not written to files.
_IN_MEMORY = {
    "attn_implementation": "_attn_implementation",
    "_attn_implementation": "_attn_implementation",
    "experts_implementation": "_experts_implementation",
    "_commit_hash": "_commit_hash",
}


class CommonAttributes:
    """Takes these attributes out of a configuration's values, and has transformers' other names for them."""

    sub_configs: ClassVar[dict[str, type]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = []  # fields of an output that transformers' Trainer does not gather
    _experts_implementation: str | None = None
    _commit_hash: str | None = None

    def _take_common(self, given: dict[str, Any]) -> None:
        """Set the attributes from `given`, and remove them from it."""
        for name, other in _OTHER_NAMES.items():
            value = given.pop(name, None)
            if given.get(other) is None and value is not None:
                given[other] = value
        number = given.pop("num_labels", None)
        has_labels = given.get("id2label") is not None
        for name, default in COMMON.items():
            value = given.pop(name, None)
            setattr(self, name, copy.deepcopy(default) if value is None else value)
        if isinstance(self.id2label, dict):  # JSON has only strings as keys
            self.id2label = {int(key) if str(key).isdecimal() else key: label for key, label in self.id2label.items()}
        if isinstance(number, int) and not has_labels:
            self.num_labels = number
        for name, attribute in _IN_MEMORY.items():
            if (value := given.pop(name, None)) is not None:
                setattr(self, attribute, value)

    def chosen(self, name: str, given: bool | None) -> bool:
        """An argument of a call, or if it is None the attribute of this name."""
        return bool(getattr(self, name) if given is None else given)

    def _common(self) -> dict[str, Any]:
        """Name → value, for JSON."""
        values = {name: copy.deepcopy(self.__dict__[name]) for name in COMMON if name != "dtype"}
        return values | {"dtype": self.__dict__["_dtype"]}

    @property
    def dtype(self) -> Any:
        """`torch.dtype` of the weights, or None. It may be set by name."""
        name = self.__dict__["_dtype"]
        if not isinstance(name, str):
            return name
        import torch  # configurations are usable before torch is imported

        return getattr(torch, name, name)

    @dtype.setter
    def dtype(self, value: Any) -> None:
        # Kept by name, as files have it.
        named = value is None or isinstance(value, dict)
        self.__dict__["_dtype"] = value if named else str(value).removeprefix("torch.")

    @property
    def torch_dtype(self) -> Any:
        """The earlier name of `dtype`."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    @property
    def name_or_path(self) -> str:
        """Where the weights came from: a folder or a hub id; "" if from neither."""
        return self.__dict__["_name_or_path"]

    @name_or_path.setter
    def name_or_path(self, value: Any) -> None:
        self.__dict__["_name_or_path"] = str(value)

    @property
    def num_labels(self) -> int:
        """How many labels `id2label` has."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        if number != len(self.id2label):
            self.id2label = {index: f"LABEL_{index}" for index in range(number)}
            self.label2id = {name: index for index, name in self.id2label.items()}

    @property
    def _attn_implementation(self) -> str | None:
        """The name that transformers would choose its attention by. Here it changes nothing."""
        return self.__dict__.get("_attention")

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, str] | None) -> None:
        """A dictionary has a name for each part, and "" for the whole."""
        each = value if isinstance(value, dict) else None
        self.__dict__["_attention"] = value if each is None else each.get("", self._attn_implementation)
        for name in self.sub_configs:
            part = self.__dict__.get(name)
            if isinstance(part, CommonAttributes):
                part._attn_implementation = value if each is None else each.get(name, part._attn_implementation)

    def complete_attention(self, name: str) -> None:
        """Give the configuration and its parts a name where none was chosen."""
        for config in (self, *(self.__dict__[part] for part in self.sub_configs)):
            config.__dict__["_attention"] = config._attn_implementation or name

    @property
    def use_return_dict(self) -> bool:
        """The earlier name of `return_dict`."""
        return self.return_dict
