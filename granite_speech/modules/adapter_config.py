"""The values of peft's `adapter_config.json`: which layers of a model an adapter changes, and by how much.

Scaling, patterns and rank-stabilised scaling: peft 0.21's `LoraConfig`.
"""

import math
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, NoReturn

from granite_speech.errors import CheckpointError, InputError, UnsupportedError
from granite_speech.modules.module_patterns import ModulePatterns

__all__ = ["AdapterConfig", "known_paths"]

# Options that change the arithmetic and are not supported. All other keys of the file concern training or bookkeeping.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
_REWRITES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The values of an `adapter_config.json` that affect the arithmetic.

    Attributes:
        r, lora_alpha: rank and alpha of modules that no pattern matches; the scaling is alpha / rank.
        rank_pattern, alpha_pattern: rank or alpha by regular expression on the end of a module's path (`ModulePatterns`).
        use_rslora: makes the scaling alpha / sqrt(rank).
        lora_dropout: probability of dropout on the adapter's input in training.
        raw: the whole file, which is written back when the model is saved.
    """

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    lora_dropout: float
    raw: dict[str, Any]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "AdapterConfig":
        """Read the contents of an adapter_config.json.

        Raises:
            UnsupportedError: another kind of adapter, or an unsupported peft option that changes the arithmetic.
            CheckpointError: an invalid rank, alpha, pattern or dropout.
        """
        if raw.get("peft_type", "LORA") != "LORA":
            raise UnsupportedError(
                got=f"adapter_config.json with peft_type {raw['peft_type']!r}",
                expected="'LORA'",
                remedy="Merge the adapter into the weights with peft, or load the folder without adapter files",
            )
        initial = raw.get("init_lora_weights")
        refused = [f"{name}={raw[name]!r:.60}" for name in _REFUSED if raw.get(name)]
        refused += [f"bias={raw['bias']!r}"] if raw.get("bias", "none") != "none" else []
        refused += [f"init_lora_weights={initial!r}"] if isinstance(initial, str) and initial.startswith(_REWRITES_THE_BASE) else []
        if refused:
            raise UnsupportedError(
                got=f"adapter_config.json with {', '.join(refused)}",
                expected="a plain LoRA (r, lora_alpha, target_modules, rank_pattern, alpha_pattern, use_rslora)",
                remedy="Merge the adapter into the weights with peft and load the merged folder",
            )
        r, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
        ranks, alphas = (_pattern_table(name, raw.get(name)) for name in ("rank_pattern", "alpha_pattern"))
        dropout = 0.0 if raw.get("lora_dropout") is None else raw["lora_dropout"]
        if not all(type(one) is int and 0 < one <= 1 << 16 for one in (r, *ranks.values())):
            _refuse_value("r or rank_pattern", (r, ranks), "integers from 1 to 65536")
        if not all(type(one) in (int, float) and abs(one) <= 1e9 for one in (alpha, *alphas.values())):
            _refuse_value("lora_alpha or alpha_pattern", (alpha, alphas), "numbers from -1e9 to 1e9")
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            _refuse_value("lora_dropout", dropout, "a number from 0 up to, but not including, 1")
        config = cls(r, alpha, ranks, alphas, bool(raw.get("use_rslora")), dropout, raw)
        config.scaling("")  # compiles both tables, and so refuses invalid keys
        return config

    @classmethod
    def plain(cls, r: int, lora_alpha: float, target_modules: list[str]) -> "AdapterConfig":
        """The configuration of a new adapter, in peft's format."""
        raw = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": lora_alpha, "target_modules": target_modules}
        return cls.from_dict(raw | {"bias": "none", "inference_mode": True, "lora_dropout": 0.0})

    @classmethod
    def read(cls, given: Any) -> "AdapterConfig":
        """The configuration that a user gave: peft's `LoraConfig`, the contents of an adapter_config.json, or an AdapterConfig."""
        if isinstance(given, cls):
            return given
        values = given.to_dict() if callable(getattr(given, "to_dict", None)) else given
        if not isinstance(values, dict):
            raise InputError(
                got=f"an adapter's configuration of type {type(given).__name__}",
                expected="peft's LoraConfig, or a dictionary with the contents of an adapter_config.json",
                remedy="Pass LoraConfig(r=16, lora_alpha=32, target_modules=['q_proj', 'v_proj'])",
            )
        return cls.from_dict({name: _plain(value) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The contents of adapter_config.json."""
        return dict(self.raw)

    def __getattr__(self, name: str) -> Any:
        # peft's other options, such as target_modules, are read from its LoraConfig as attributes.
        if name.startswith("_") or name == "raw" or name not in self.raw:
            raise AttributeError(f"this adapter's configuration has no {name!r}")
        return self.raw[name]

    def rank(self, module: str) -> int:
        """Rank of the adapter of the module at this path."""
        return self._ranks.find(known_paths(module), self.r)

    def scaling(self, module: str) -> float:
        """Factor on the adapter's product in the module at this path."""
        rank = self.rank(module)
        return self._alphas.find(known_paths(module), self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    @cached_property
    def _ranks(self) -> ModulePatterns:
        return ModulePatterns("rank_pattern", self.rank_pattern)

    @cached_property
    def _alphas(self) -> ModulePatterns:
        return ModulePatterns("alpha_pattern", self.alpha_pattern)


def _plain(value: Any) -> Any:
    """A value as JSON has it: peft keeps module names in sets, and types in enumerations."""
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return value.value if isinstance(value, Enum) else value


def known_paths(module: str) -> tuple[str, str]:
    """A module's path here, and in transformers 5.10 and later. A pattern refers to the path in the model that peft trained."""
    return module, "model." + module.replace("language_model.model.", "language_model.", 1)


def _pattern_table(name: str, value: Any) -> dict[str, Any]:
    """A table of values by regular expression; empty if the file has none."""
    table = {} if value is None else value
    if not isinstance(table, dict):
        _refuse_value(name, table, "an object that maps regular expressions to numbers")
    return table


def _refuse_value(name: str, value: Any, expected: str) -> NoReturn:
    raise CheckpointError(
        got=f"adapter_config.json with {name} = {value!r:.100}", expected=expected, remedy="Save the adapter again with peft"
    )
