"""The low-rank adapter for requests with audio.

The model's linear layers are `LoraLinear`: ordinary until an adapter is attached, and then `x Wᵀ + b + scaling · (x Aᵀ) Bᵀ` for the
rows that use it. A tensor says which rows do, so a batch may mix requests with and without audio.

LoRA: Hu et al., arXiv 2106.09685.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from torch import Tensor, nn

from granite_speech.errors import UnsupportedError
from granite_speech.modules.adapter_config import AdapterConfig
from granite_speech.modules.autocast import autocast_dtype, cast
from granite_speech.modules.few_sizes import with_few_sizes
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.int8_weight import Int8Weight
from granite_speech.modules.quantized import refuse_quantized
from granite_speech.modules.transfers import on_device

__all__ = ["Lora", "LoraLinear", "LoraMatrix", "attach_adapter", "attach_to", "merge_adapter"]


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


class LoraLinear(Int8Weight, nn.Linear):
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
        self.lora_A: LoraMatrix | None = None
        self.lora_B: LoraMatrix | None = None
        self.lora_more: nn.ModuleList | None = None  # A and B of further active adapters
        self.adapters: dict[str, Lora] = {}
        self.adapter_enabled = True
        self._active: tuple[Lora, ...] = ()
        self._scaling_tensor: Tensor | None = None

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter changes the result of rows that use it."""
        return self.lora_A is not None and self.adapter_enabled

    @property
    def scaling(self) -> float:
        """Of the active adapter."""
        return self._active[0].scaling if self._active else 0.0

    @property
    def lora_dropout(self) -> float:
        """Of the active adapter."""
        return self._active[0].dropout if self._active else 0.0

    def attach(self, rank: int, scaling: float, dropout: float = 0.0, name: str = "default", initial: bool | str | None = None) -> None:
        """Add an adapter on the weight's device and in the activations' dtype, and make it the active one.

        B is zero, so it changes nothing yet. `initial` gives peft's `init_lora_weights` (True, False or "gaussian") with peft's numbers for
        the same seed; with False, B is random too.
        """
        where = {"device": self.weight.device, "dtype": self.activation_dtype}
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
            x: rows, in the activations' dtype.
            adapter_index: `(rows,)` int32, 0 for rows with the adapter and −1 for rows without; None: all rows use it.
        """
        lora_a = self.lora_A
        if lora_a is None or not self.adapter_enabled:
            return self.product(x)
        a, b = lora_a.weight, self.lora_B.weight
        if self._needs_parts(x, a.dtype != (x.dtype if self._dtype else self.weight.dtype)):
            return self._in_parts(x, adapter_index)
        if x.dim() != 2:
            return self.forward(x.reshape(-1, self.in_features), adapter_index).view(*x.shape[:-1], self.out_features)
        rows, x = x.shape[0], with_few_sizes(x)
        if adapter_index is not None and len(x) > rows:
            adapter_index = F.pad(adapter_index, (0, len(x) - rows), value=-1)
        tensors = (x, self.matrix(x.dtype), self.bias, a.unsqueeze(0), b.unsqueeze(0))
        if (dtype := autocast_dtype(x.device)) is not None:
            tensors = cast(tensors, dtype)
        return OPERATIONS["lora_linear"].run(*tensors, self._scaling_on(x.device), adapter_index)[:rows]

    def _needs_parts(self, x: Tensor, differs: bool) -> bool:
        """Whether base and adapter cannot be one operation: several adapters, of another dtype (differs), with dropout, with hooks, or with
        a packed weight."""
        # With dropout only the adapter's input changes, so base and adapter no longer share x.
        if differs or self.packed is not None or len(self._active) > 1 or (self.training and self._active[0].dropout):
            return True
        return x.dim() == 3 and have_hooks(self.lora_A, self.lora_B)  # a model with hooks runs padded

    def _in_parts(self, x: Tensor, adapter_index: Tensor | None) -> Tensor:
        out = self.product(x)
        for one in self._active:
            product = one.product(x, self.training)
            if adapter_index is not None:
                product = torch.where((adapter_index >= 0).view(*x.shape[:-1], 1), product, 0.0)
            out = (out + product).to(out.dtype)
        return out

    def _scaling_on(self, device: torch.device) -> Tensor:
        # Not a buffer, because checkpoints do not have it. Cached, because a new tensor for each call would be a kernel launch.
        cached, dtype = self._scaling_tensor, torch.promote_types(self.activation_dtype, torch.float32)
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
        refuse_quantized(self, "merge_adapter")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        for one in self._active:
            self.weight.copy_((self.weight.to(wide) + one.delta()).to(self.weight.dtype))
        self.adapters = {name: one for name, one in self.adapters.items() if one not in self._active}
        self.activate([])

    def extra_repr(self) -> str:
        plain = super().extra_repr() + (", int8" if self.weight_scale is not None else "")
        if self.lora_A is None:
            return plain
        backend = OPERATIONS["lora_linear"].backend(self.lora_A.weight)
        return f"{plain}, lora_rank={self.lora_A.out_features}, scaling={self.scaling:g}, {backend}"


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
    """Merge a model's active adapters into its weights. Requests without audio then use them too.

    Raises:
        UnsupportedError: int8 weights.
    """
    refuse_quantized(model, "merge_adapter")
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.merge()
