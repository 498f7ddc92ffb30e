"""The parts of a language model's layer as few products read them: projections of the same states, on weights side by side.

Made anew from the modules whenever these have changed; no weight is copied but small ones (`Product.wide`).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from granite_kernels.int8_cpu import PackedInt8
from granite_kernels.paths import Path, product_path
from granite_kernels.split_linear import parts_for
from torch import Tensor, nn

from granite_speech.modules.activations import Activation
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.decoder_layers import GraniteAttention, GraniteDecoderLayer, GraniteMLP, GraniteRMSNorm
from granite_speech.modules.few_sizes import linear
from granite_speech.modules.int8_weight import PackedRows, whole_of
from granite_speech.modules.quantized import dequantized
from granite_speech.modules.side_by_side import is_plain, side_by_side

__all__ = ["Adapter", "Layer", "Product", "can_be_read"]

# Elements of a weight, and rows, for which a CPU multiplies faster in float32 than in fewer bits.
_SMALL, _FEW = 1 << 18, 8

_CHILDREN = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapter:
    """The low-rank part of q, k and v: B and scaling of each, None and 0 for those without."""

    b: tuple[Tensor | None, Tensor | None, Tensor | None]
    scaling: tuple[float, float, float]


@dataclass(frozen=True)
class Product:
    """Projections of the same states.

    Attributes:
        weight: `(out, in)`, the projections' weights side by side; int8 with `scale`.
        bias: `(out,)`.
        scale: `(out,)` float32.
        lora_a: `(rank, in)`, the adapters' A side by side.
        packed: the int8 weight as a CPU multiplies it; `weight` then has no values.
        dtype: of the states.
        joined: `(out + rank, in)`, if weight and lora_a lie side by side and one library product can compute both.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    lora_a: Tensor | None = None
    joined: Tensor | None = None
    packed: PackedInt8 | None = None
    dtype: torch.dtype = torch.float32

    @cached_property
    def wide(self) -> Tensor | None:
        """A float32 copy of `joined` or `weight`, where PyTorch's product of few rows is faster with that: of a small weight in fewer bits,
        on a CPU, where to prepare a product in bfloat16 takes several times as long as a small one in float32."""
        weight = self.weight if self.joined is None else self.joined
        is_small = weight.numel() <= _SMALL and weight.itemsize < 4 and self.packed is None and self.bias is None
        if weight.device.type != "cpu" or not is_small:
            return None
        return weight.float() if self.scale is None else dequantized(weight, self.scale, self.dtype).float()

    def fused(self, x: Tensor, norm: GraniteRMSNorm | None = None, **options: Any) -> Tensor:
        """One launch for few rows; options as for `fused_linear`."""
        norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
        residual = options.pop("residual", None)
        run = OPERATIONS["fused_linear"].run
        return run(x, self.weight, self.bias, norm_weight, residual, self.lora_a, self.scale, eps=eps, **options)

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """By the library: the product, and x·Aᵀ of the adapters."""
        wide = self.wide if x.shape[0] <= _FEW else None
        if self.joined is not None and wide is not None:
            return F.linear(x.float(), wide).to(x.dtype).split((self.weight.shape[0], self.lora_a.shape[0]), dim=1)
        if self.joined is not None:
            return linear(x, self.joined).split((self.weight.shape[0], self.lora_a.shape[0]), dim=1)
        low = None if self.lora_a is None else linear(x, self.lora_a)
        if self.packed is not None:
            return self.packed.linear(x, self.bias), low
        if wide is not None:
            return F.linear(x.float(), wide).to(x.dtype), low
        weight = self.weight if self.scale is None else dequantized(self.weight, self.scale, x.dtype)
        return linear(x, weight, self.bias), low

    def gated(self, x: Tensor) -> Tensor:
        """SiLU of the first half of the product times the second half."""
        if self.scale is not None or OPERATIONS["silu_linear"].resolve(None, x.device, x.dtype) == "torch":
            return OPERATIONS["silu_product"].run(self.plain(x)[0])
        return OPERATIONS["silu_linear"].run(x, self.weight, self.bias, gated=True)

    def partial(self, x: Tensor, rows: int) -> Tensor:
        """The product, or its partial sums where `add_rms_norm` is faster with them."""
        outputs, inputs = self.weight.shape
        is_split = product_path(rows, inputs, outputs, summed=self.bias is None and self.scale is None) is Path.SPLIT
        if not is_split or OPERATIONS["split_linear"].resolve(None, x.device, x.dtype) != "triton":
            return self.plain(x)[0]
        return OPERATIONS["split_linear"].run(x, self.weight, parts=parts_for(rows, inputs, outputs))


@dataclass(frozen=True)
class Layer:
    """One layer. `o`, or `gate_up` and `down`, are None if a projection there has an adapter: then the modules compute them."""

    module: GraniteDecoderLayer
    qkv: Product
    adapter: Adapter
    o: Product | None
    gate_up: Product | None
    down: Product | None

    @classmethod
    def of(cls, module: GraniteDecoderLayer, dtype: torch.dtype) -> Self | None:
        """None if the layer cannot run here in this dtype."""
        attention, mlp, norm_1, norm_2 = (module._modules.get(name) for name in _CHILDREN)
        usual = type(attention) is GraniteAttention and type(mlp) is GraniteMLP and type(norm_1) is type(norm_2) is GraniteRMSNorm
        if not usual or not can_be_read(norm_1.weight, dtype) or not can_be_read(norm_2.weight, dtype):
            return None
        act = mlp._modules["act_fn"]
        if type(act) is not Activation or act.name not in ("silu", "swish"):
            return None
        parts = [_Projection.of(parent._modules[name], dtype) for parent, names in ((attention, _ATTENTION), (mlp, _MLP)) for name in names]
        if None in parts:
            return None
        q, k, v, o, gate, up, down = parts
        qkv, adapter = _product(q, k, v), _adapter(q, k, v)
        if qkv is None or adapter is None:
            return None
        o = _product(o) if o.lora_a is None else None
        gate_up, down = (_product(gate, up), _product(down)) if gate.lora_a is up.lora_a is down.lora_a is None else (None, None)
        if gate_up is None or down is None:
            gate_up = down = None
        return cls(module, qkv, adapter, o, gate_up, down)

    def without_copies(self) -> Self:
        """The same, with the copies of small weights to be made again."""
        products = {name: getattr(self, name) for name in ("qkv", "o", "gate_up", "down")}
        return replace(self, **{name: replace(one) for name, one in products.items() if one is not None})

    @property
    def is_fused(self) -> bool:
        return self.o is not None and self.gate_up is not None


class _Projection(NamedTuple):
    """The tensors of a `LoraLinear`, and of its adapter if that is on."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 0.0
    has_more: bool = False  # further adapters
    packed: PackedRows | None = None
    dtype: torch.dtype = torch.float32  # of the states

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Self | None:
        """None unless it is one that computes in this dtype."""
        # Not by attribute, which takes ten times as long: this runs before every request.
        if type(module) is not LoraLinear or module.activation_dtype != dtype:
            return None
        own, scale = module._parameters, module._buffers["weight_scale"]
        if not module.has_adapter:
            return cls(own["weight"], own["bias"], scale, packed=module.packed, dtype=dtype)
        a, b = module.lora_A._parameters["weight"], module.lora_B._parameters["weight"]
        if not can_be_read(a, dtype) or not can_be_read(b, dtype):
            return None
        return cls(own["weight"], own["bias"], scale, a, b, module.scaling, module.lora_more is not None, module.packed, dtype)


def can_be_read(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels can read a weight, which they do by its address, as of this dtype."""
    return weight.dtype == dtype and is_plain(weight) and weight.is_contiguous()


def _product(*projections: _Projection) -> Product | None:
    """The product of these projections; None if their weights do not lie side by side."""
    found, packed = [], None
    if any(one.packed is not None for one in projections):
        packed = whole_of([one.packed for one in projections])
        if packed is None:
            return None
    for tensors in zip(*((None if packed else one.weight, one.bias, one.scale) for one in projections), strict=True):
        present = [one for one in tensors if one is not None]
        found.append(_joined(present) if len(present) == len(tensors) else None)
        if present and found[-1] is None:
            return None  # also with a bias of some of them alone
    weight, bias, scale = found
    weight = weight if packed is None else projections[0].weight[:1].expand(packed.shape)
    matrices = [one.lora_a for one in projections if one.lora_a is not None]
    if not matrices:
        return Product(weight, bias, scale, packed=packed, dtype=projections[0].dtype)
    lora_a = side_by_side(*matrices)
    joined = side_by_side(weight, lora_a) if lora_a is not None and bias is None and scale is None else None
    return None if lora_a is None else Product(weight, bias, scale, lora_a, joined, packed, projections[0].dtype)


def _joined(tensors: list[Tensor]) -> Tensor | None:
    if len(tensors) > 1:
        return side_by_side(*tensors)
    [one] = tensors
    return one.detach() if can_be_read(one, one.dtype) else None


def _adapter(*projections: _Projection) -> Adapter | None:
    """The adapters of q, k and v; None if one of them has several."""
    if any(one.has_more for one in projections):
        return None
    return Adapter(tuple(one.lora_b for one in projections), tuple(one.scaling for one in projections))
