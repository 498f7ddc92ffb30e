"""The low-rank adapter for requests with audio, as peft's `adapter_config.json` describes it.

The model's linear layers are `LoraLinear`: ordinary until an adapter is attached, and then `x Wᵀ + b + scaling · (x Aᵀ) Bᵀ` for the
rows that use it. A tensor says which rows do, so a batch may mix requests with and without audio.

LoRA: Hu et al., arXiv 2106.09685. Scaling, patterns and rank-stabilised scaling: peft 0.21's `LoraConfig`.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from torch import Tensor, nn

from granite_speech.errors import CheckpointError, UnsupportedError
from granite_speech.modules.module_patterns import ModulePatterns
from granite_speech.modules.transfers import on_device

__all__ = ["AdapterConfig", "LoraLinear", "attach_adapter", "merge_adapter"]

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

    def rank(self, module: str) -> int:
        """Rank of the adapter of the module at this path."""
        return self._ranks.find(_paths(module), self.r)

    def scaling(self, module: str) -> float:
        """Factor on the adapter's product in the module at this path."""
        rank = self.rank(module)
        return self._alphas.find(_paths(module), self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    @cached_property
    def _ranks(self) -> ModulePatterns:
        return ModulePatterns("rank_pattern", self.rank_pattern)

    @cached_property
    def _alphas(self) -> ModulePatterns:
        return ModulePatterns("alpha_pattern", self.alpha_pattern)


def _paths(module: str) -> tuple[str, str]:
    # A pattern refers to the module's path in the model that peft trained, which changed in transformers 5.10.
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


class LoraLinear(nn.Linear):
    """`nn.Linear` with an optional low-rank adapter.

    Without an adapter, `lora_A` and `lora_B` are None. With one, they are linear layers without bias, so that parameters are named as in
    the released adapter files: `lora_A.weight` `(rank, in_features)` and `lora_B.weight` `(out_features, rank)`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias)
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None
        self.scaling = 0.0
        self.lora_dropout = 0.0
        self._scaling_tensor: Tensor | None = None

    def attach(self, rank: int, scaling: float, dropout: float = 0.0) -> None:
        """Add an adapter on the weight's device and in its dtype. B is zero, so it changes nothing yet."""
        where = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, **where)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, **where)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling, self.lora_dropout = scaling, dropout
        self._scaling_tensor = None

    def forward(self, x: Tensor, adapter_index: Tensor | None = None) -> Tensor:
        """`(..., in_features)` → `(..., out_features)`.

        Args:
            x: rows, in the weight's dtype.
            adapter_index: `(rows,)` int32, 0 for rows with the adapter and −1 for rows without; None: all rows use it.
        """
        if self.lora_A is None:
            return F.linear(x, self.weight, self.bias)
        if self.training and self.lora_dropout:
            return F.linear(x, self.weight, self.bias) + self._dropped_out_product(x, adapter_index)
        if x.dim() != 2:
            return self.forward(x.reshape(-1, self.in_features), adapter_index).view(*x.shape[:-1], self.out_features)
        a, b = self.lora_A.weight.unsqueeze(0), self.lora_B.weight.unsqueeze(0)
        tensors = (x, self.weight, self.bias, a, b)
        if torch.is_autocast_enabled(x.device.type):
            tensors = _autocast(tensors, torch.get_autocast_dtype(x.device.type))
        return OPERATIONS["lora_linear"].run(*tensors, self._scaling_on(x.device), adapter_index)

    def _dropped_out_product(self, x: Tensor, adapter_index: Tensor | None) -> Tensor:
        # Only the adapter's input has dropout, so base and adapter no longer share x and cannot be one operation.
        product = self.lora_B(self.lora_A(F.dropout(x, self.lora_dropout))) * self.scaling
        if adapter_index is None:
            return product
        return torch.where((adapter_index >= 0).view(*x.shape[:-1], 1), product, 0.0)

    def _scaling_on(self, device: torch.device) -> Tensor:
        # Not a buffer, because checkpoints do not have it. Cached, because a new tensor for each call would be a kernel launch.
        cached, dtype = self._scaling_tensor, torch.promote_types(self.weight.dtype, torch.float32)
        if cached is None or cached.device != device or cached.dtype != dtype:
            with torch.inference_mode(False):  # a tensor from inference mode could not be used in a later backward pass
                self._scaling_tensor = on_device([self.scaling], device, dtype)
        return self._scaling_tensor

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter's product to the weight, which affects all rows, and remove the adapter."""
        if self.lora_A is None:
            return
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        product = self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide) * self.scaling
        self.weight.copy_((self.weight.to(wide) + product).to(self.weight.dtype))
        self.lora_A = self.lora_B = self._scaling_tensor = None
        self.scaling = self.lora_dropout = 0.0

    def extra_repr(self) -> str:
        if self.lora_A is None:
            return super().extra_repr()
        backend = OPERATIONS["lora_linear"].backend(self.weight)
        return f"{super().extra_repr()}, lora_rank={self.lora_A.out_features}, scaling={self.scaling:g}, {backend}"


def _autocast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    """What autocast does to the arguments of `F.linear`: float64 is left alone."""
    return [one if one is None or one.dtype == torch.float64 else one.to(dtype) for one in tensors]


def attach_adapter(model: nn.Module, config: AdapterConfig, modules: list[str]) -> None:
    """Attach an adapter to the named modules.

    Raises:
        UnsupportedError: a name that is not a linear layer of the model.
    """
    for name in modules:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, LoraLinear):
            raise UnsupportedError(
                got=f"an adapter for {name!r}, " + ("not a module of this model" if module is None else f"a {type(module).__name__}"),
                expected="adapters of linear layers of the encoder, the projector or the language model",
                remedy="Merge the adapter into the weights with peft and load the merged folder",
            )
        module.attach(config.rank(name), config.scaling(name), config.lora_dropout)


def merge_adapter(model: nn.Module) -> None:
    """Merge a model's adapters into its weights. Requests without audio then use them too."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.merge()
