"""The low-rank adapter for requests with audio, as peft's `adapter_config.json` describes it.

The model's linear layers are `LoraLinear`: ordinary until an adapter is attached, and then `x Wᵀ + b + scaling · (x Aᵀ) Bᵀ` for the
rows that use it. A tensor says which rows do, so a batch may mix requests with and without audio.

LoRA: Hu et al., arXiv 2106.09685. Scaling, patterns and rank-stabilised scaling: peft 0.21's `LoraConfig`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from torch import Tensor, nn

from granite_speech.errors import CheckpointError, InputError, UnsupportedError
from granite_speech.modules.autocast import autocast_dtype, cast
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.module_patterns import ModulePatterns
from granite_speech.modules.transfers import on_device

__all__ = ["AdapterConfig", "Lora", "LoraLinear", "LoraMatrix", "attach_adapter", "attach_to", "known_paths", "merge_adapter"]

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


class LoraMatrix(nn.Module):
    """`x Wᵀ`, as `nn.Linear` without bias and initialised like it.

    It is not an `nn.Linear`, so that peft's `target_modules="all-linear"` does not put an adapter on an adapter.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@dataclass(frozen=True)
class Lora:
    """One adapter of one layer: `scaling · (x Aᵀ) Bᵀ`, with dropout of x in training."""

    a: LoraMatrix
    b: LoraMatrix
    scaling: float
    dropout: float

    def product(self, x: Tensor, training: bool) -> Tensor:
        """Computed in the adapter's dtype, which may be wider than that of x."""
        wide = F.dropout(x.to(self.a.weight.dtype), self.dropout, training)
        return self.b(self.a(wide)) * self.scaling

    def delta(self) -> Tensor:
        """What a merge adds to the weight, in float32 or wider."""
        dtype = torch.promote_types(self.a.weight.dtype, torch.float32)
        return self.b.weight.to(dtype) @ self.a.weight.to(dtype) * self.scaling


class LoraLinear(nn.Linear):
    """`nn.Linear` with low-rank adapters, usually one.

    `lora_A` and `lora_B` are None, or the matrices of the active adapter, whose parameters are thus named as in the released adapter
    files: `lora_A.weight` `(rank, in_features)` and `lora_B.weight` `(out_features, rank)`. Adapters that are not active are kept
    aside: they move with the layer, but they are not in its state dict and its parameters.

    Attributes:
        adapters: all adapters by name.
        adapter_enabled: False turns the active adapter off.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("weight_scale", None)
        self.lora_A: LoraMatrix | None = None
        self.lora_B: LoraMatrix | None = None
        self.lora_more: nn.ModuleList | None = None  # A and B of further active adapters
        self.adapters: dict[str, Lora] = {}
        self.adapter_enabled = True
        self._active: tuple[Lora, ...] = ()
        self._scaling_tensor: Tensor | None = None

    @property
    def scaling(self) -> float:
        """Of the active adapter."""
        return self._active[0].scaling if self._active else 0.0

    @property
    def lora_dropout(self) -> float:
        """Of the active adapter."""
        return self._active[0].dropout if self._active else 0.0

    def attach(self, rank: int, scaling: float, dropout: float = 0.0, name: str = "default", initial: bool | str | None = None) -> None:
        """Add an adapter on the weight's device and in its dtype, and make it the active one.

        B is zero, so it changes nothing yet. `initial` gives peft's `init_lora_weights` (True, False or "gaussian") with peft's numbers for
        the same seed; with False, B is random too.
        """
        where = {"device": self.weight.device, "dtype": self.weight.dtype}
        a, b = LoraMatrix(self.in_features, rank, **where), LoraMatrix(rank, self.out_features, **where)
        if initial is True:
            a.reset_parameters()  # peft draws A twice
        elif initial == "gaussian":
            nn.init.normal_(a.weight, std=1 / rank)
        if initial is not False:
            nn.init.zeros_(b.weight)
        self.adapters[name] = Lora(a, b, scaling, dropout)
        self.activate([name])

    def activate(self, names: Sequence[str]) -> None:
        """Make these adapters the active ones; names that this layer does not have are skipped."""
        self._active = tuple(self.adapters[name] for name in names if name in self.adapters)
        self.lora_A, self.lora_B = (self._active[0].a, self._active[0].b) if self._active else (None, None)
        further = [matrix for one in self._active[1:] for matrix in (one.a, one.b)]
        self.lora_more = nn.ModuleList(further) if further else None
        self._scaling_tensor = None

    def forward(self, x: Tensor, adapter_index: Tensor | None = None) -> Tensor:
        """`(..., in_features)` → `(..., out_features)`.

        Args:
            x: rows, in the weight's dtype.
            adapter_index: `(rows,)` int32, 0 for rows with the adapter and −1 for rows without; None: all rows use it.
        """
        lora_a = self.lora_A
        if lora_a is None or not self.adapter_enabled:
            return F.linear(x, self.weight, self.bias)
        a, b, weight = lora_a.weight, self.lora_B.weight, self.weight
        if self._needs_parts(x, a.dtype != weight.dtype):
            return self._in_parts(x, adapter_index)
        if x.dim() != 2:
            return self.forward(x.reshape(-1, self.in_features), adapter_index).view(*x.shape[:-1], self.out_features)
        tensors = (x, weight, self.bias, a.unsqueeze(0), b.unsqueeze(0))
        if (dtype := autocast_dtype(x.device)) is not None:
            tensors = cast(tensors, dtype)
        return OPERATIONS["lora_linear"].run(*tensors, self._scaling_on(x.device), adapter_index)

    def _needs_parts(self, x: Tensor, differs: bool) -> bool:
        """Whether base and adapter cannot be one operation: several adapters, of another dtype (differs), with dropout, or with hooks."""
        # With dropout only the adapter's input changes, so base and adapter no longer share x.
        if differs or len(self._active) > 1 or (self.training and self._active[0].dropout):
            return True
        return x.dim() == 3 and have_hooks(self.lora_A, self.lora_B)  # a model with hooks runs padded

    def _in_parts(self, x: Tensor, adapter_index: Tensor | None) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        for one in self._active:
            product = one.product(x, self.training)
            if adapter_index is not None:
                product = torch.where((adapter_index >= 0).view(*x.shape[:-1], 1), product, 0.0)
            out = (out + product).to(out.dtype)
        return out

    def _scaling_on(self, device: torch.device) -> Tensor:
        # Not a buffer, because checkpoints do not have it. Cached, because a new tensor for each call would be a kernel launch.
        cached, dtype = self._scaling_tensor, torch.promote_types(self.weight.dtype, torch.float32)
        if cached is None or cached.device != device or cached.dtype != dtype:
            with torch.inference_mode(False):  # a tensor from inference mode could not be used in a later backward pass
                self._scaling_tensor = on_device([self.scaling], device, dtype)
        return self._scaling_tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoraLinear":
        for one in self.adapters.values():
            if one not in self._active:
                one.a._apply(fn), one.b._apply(fn)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the products of the active adapters to the weight, which affects all rows, and remove these adapters."""
        if not self._active:
            return
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        for one in self._active:
            self.weight.copy_((self.weight.to(wide) + one.delta()).to(self.weight.dtype))
        self.adapters = {name: one for name, one in self.adapters.items() if one not in self._active}
        self.activate([])

    def extra_repr(self) -> str:
        if self.lora_A is None:
            return super().extra_repr()
        backend = OPERATIONS["lora_linear"].backend(self.weight)
        return f"{super().extra_repr()}, lora_rank={self.lora_A.out_features}, scaling={self.scaling:g}, {backend}"


def attach_adapter(model: nn.Module, config: AdapterConfig, modules: Iterable[str], name: str = "default") -> None:
    """Attach an adapter to the modules at these paths, under a name.

    Raises:
        UnsupportedError: a path that is not a linear layer of the model; nothing is attached then.
    """
    found = dict(model.named_modules())
    attach_to({path: found.get(path) for path in modules}, config, name)


def attach_to(modules: Mapping[str, nn.Module | None], config: AdapterConfig, name: str, initial: bool | str | None = None) -> None:
    """As `attach_adapter`, for modules by their paths in the whole model; `initial` as for `LoraLinear.attach`."""
    for path, module in modules.items():
        if not isinstance(module, LoraLinear):
            raise UnsupportedError(
                got=f"an adapter for {path!r}, " + ("not a module of this model" if module is None else f"a {type(module).__name__}"),
                expected="adapters of linear layers of the encoder, the projector or the language model",
                remedy="Merge the adapter into the weights with peft and load the merged folder",
            )
    for path, module in modules.items():
        module.attach(config.rank(path), config.scaling(path), config.lora_dropout, name, initial)


def merge_adapter(model: nn.Module) -> None:
    """Merge a model's active adapters into its weights. Requests without audio then use them too."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.merge()
