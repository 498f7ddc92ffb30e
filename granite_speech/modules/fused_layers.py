"""The language model's layers in few launches, for passes that fill a cache without gradients: `generate` and the engine.

`GraniteModel.run` calls one module after another, which a hook can see and a backward can follow. Here the projections that read the
same states are one product, on weights that lie side by side (`side_by_side.py`), and what is between two products is one launch:

| | up to 8 rows of one token (a decode step) | more rows |
|---|---|---|
| 1 | norm, q, k, v and the adapter's A | q, k, v and A, by the library |
| 2 | the adapter's B, rotary, cache write, attention | the same, or without attention in a prompt, which then is a launch of its own |
| 3 | o and residual | o, by the library |
| 4 | norm, gate, up and their SiLU product | residual and norm |
| 5 | down and residual | gate and up, by the library; their SiLU product; down, by the library; residual and norm |

`granite_kernels.paths` says which column a product uses. On a CPU, and in any dtype that the kernels do not have, the second column runs
on the operations' references.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from granite_kernels import OPERATIONS
from granite_kernels.launch import early_launches
from granite_kernels.matvec import MAX_HEAD_INPUTS
from granite_kernels.paths import Path, product_path
from granite_kernels.split_linear import parts_for
from torch import Tensor, nn

from granite_speech.modules.activations import Activation
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.cache import CacheStep, PagePool
from granite_speech.modules.decoder_layers import GraniteAttention, GraniteDecoderLayer, GraniteMLP, GraniteRMSNorm
from granite_speech.modules.quantized import dequantized
from granite_speech.modules.rotary import Rotary, rotary_embedding
from granite_speech.modules.side_by_side import is_plain, padded_rows, side_by_side
from granite_speech.modules.snapshot import Snapshot
from granite_speech.modules.tokens import Tokens

__all__ = ["FusedLayers", "LayersInUse", "States", "can_be_read", "uses_kernels"]

_MOST_HEAD_DIM = 128  # of the attention kernels
_CHILDREN = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class States:
    """What the last layer leaves.

    Attributes:
        hidden: `(rows, hidden)` before the final norm.
        normed: after it; None if the norm is part of the next product.
    """

    hidden: Tensor
    normed: Tensor | None


@dataclass(frozen=True)
class _Adapter:
    """The low-rank part of q, k and v: B and scaling of each, None and 0 for those without."""

    b: tuple[Tensor | None, Tensor | None, Tensor | None]
    scaling: tuple[float, float, float]


@dataclass(frozen=True)
class _Product:
    """Projections of the same states.

    Attributes:
        weight: `(out, in)`, the projections' weights side by side; int8 with `scale`.
        bias: `(out,)`.
        scale: `(out,)` float32.
        lora_a: `(rank, in)`, the adapters' A side by side.
        joined: `(out + rank, in)`, if weight and lora_a lie side by side and one library product can compute both.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    lora_a: Tensor | None = None
    joined: Tensor | None = None

    def fused(self, x: Tensor, norm: GraniteRMSNorm | None = None, **options: Any) -> Tensor:
        """One launch for few rows; options as for `fused_linear`."""
        norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
        residual = options.pop("residual", None)
        run = OPERATIONS["fused_linear"].run
        return run(x, self.weight, self.bias, norm_weight, residual, self.lora_a, self.scale, eps=eps, **options)

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """By the library: the product, and x·Aᵀ of the adapters."""
        if self.joined is not None:
            return F.linear(x, self.joined).split((self.weight.shape[0], self.lora_a.shape[0]), dim=1)
        low = None if self.lora_a is None else F.linear(x, self.lora_a)
        weight = self.weight if self.scale is None else dequantized(self.weight, self.scale, x.dtype)
        return F.linear(x, weight, self.bias), low

    def partial(self, x: Tensor, rows: int) -> Tensor:
        """The product, or its partial sums where `add_rms_norm` is faster with them."""
        outputs, inputs = self.weight.shape
        is_split = product_path(rows, inputs, outputs, summed=self.bias is None and self.scale is None) is Path.SPLIT
        if not is_split or OPERATIONS["split_linear"].resolve(None, x.device, x.dtype) != "triton":
            return self.plain(x)[0]
        return OPERATIONS["split_linear"].run(x, self.weight, parts=parts_for(rows, inputs, outputs))


@dataclass(frozen=True)
class _Layer:
    """One layer. `o`, or `gate_up` and `down`, are None if a projection there has an adapter: then the modules compute them."""

    module: GraniteDecoderLayer
    qkv: _Product
    adapter: _Adapter
    o: _Product | None
    gate_up: _Product | None
    down: _Product | None

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

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype) -> Self | None:
        """None unless it is one that computes in this dtype."""
        # Not by attribute, which takes ten times as long: this runs before every request.
        if type(module) is not LoraLinear or module.activation_dtype != dtype:
            return None
        own, scale = module._parameters, module._buffers["weight_scale"]
        if not module.has_adapter:
            return cls(own["weight"], own["bias"], scale)
        a, b = module.lora_A._parameters["weight"], module.lora_B._parameters["weight"]
        if not can_be_read(a, dtype) or not can_be_read(b, dtype):
            return None
        return cls(own["weight"], own["bias"], scale, a, b, module.scaling, module.lora_more is not None)


def can_be_read(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels can read a weight, which they do by its address, as of this dtype."""
    return weight.dtype == dtype and is_plain(weight) and weight.is_contiguous()


def _product(*projections: _Projection) -> _Product | None:
    """The product of these projections; None if their weights do not lie side by side."""
    found = []
    for tensors in zip(*((one.weight, one.bias, one.scale) for one in projections), strict=True):
        present = [one for one in tensors if one is not None]
        found.append(_joined(present) if len(present) == len(tensors) else None)
        if present and found[-1] is None:
            return None  # also with a bias of some of them alone
    weight, bias, scale = found
    matrices = [one.lora_a for one in projections if one.lora_a is not None]
    if not matrices:
        return _Product(weight, bias, scale)
    lora_a = side_by_side(*matrices)
    joined = side_by_side(weight, lora_a) if lora_a is not None and bias is None and scale is None else None
    return None if lora_a is None else _Product(weight, bias, scale, lora_a, joined)


def _joined(tensors: list[Tensor]) -> Tensor | None:
    if len(tensors) > 1:
        return side_by_side(*tensors)
    [one] = tensors
    return one.detach() if can_be_read(one, one.dtype) else None


def _adapter(*projections: _Projection) -> _Adapter | None:
    """The adapters of q, k and v; None if one of them has several."""
    if any(one.has_more for one in projections):
        return None
    return _Adapter(tuple(one.lora_b for one in projections), tuple(one.scaling for one in projections))


@dataclass(frozen=True)
class FusedLayers:
    """Layers and head of a language model, as they are now. Made for one pass, or for a step that runs many times.

    Attributes:
        decoder: the model without head.
        layers: its layers.
        head: `(vocabulary, hidden)`.
        padded_head: the same with rows that the library's product needs to be fast, `(more, hidden)`.
        divisor: of the logits.
    """

    decoder: Any
    layers: tuple[_Layer, ...]
    head: Tensor | None
    padded_head: Tensor | None
    divisor: float

    @classmethod
    def of(cls, decoder: nn.Module, head: nn.Module | None = None, divisor: float = 1.0) -> Self | None:
        """None if a module is not the usual one, or if weights do not lie side by side. Hooks are the caller's concern."""
        # By name, because the module of GraniteModel imports this one.
        usual = type(decoder).__module__ == "granite_speech.modules.language_model" and not decoder.training
        if not usual or type(decoder.norm) is not GraniteRMSNorm or len(decoder.layers) == 0:
            return None
        norm = decoder.norm.weight
        if not can_be_read(norm, norm.dtype):
            return None
        if head is not None and (type(head) is not nn.Linear or head.bias is not None or not can_be_read(head.weight, norm.dtype)):
            return None
        layers = []
        for module in decoder.layers:
            layer = _Layer.of(module, norm.dtype) if type(module) is GraniteDecoderLayer else None
            if layer is None:
                return None
            layers.append(layer)
        weight = None if head is None else head.weight
        padded = None if weight is None else padded_rows(weight)
        return cls(decoder, tuple(layers), weight, weight if padded is None else padded, divisor)

    def _are_matvecs(self, rows: int) -> bool:
        """Whether every product of a layer is one launch that reads the weight once, for this many rows."""
        if self.head.shape[1] > MAX_HEAD_INPUTS or not all(one.is_fused for one in self.layers):
            return False
        first = self.layers[0]
        shapes = [one.weight.shape for one in (first.qkv, first.o, first.gate_up, first.down)]
        return all(product_path(rows, inputs, outputs, summed=False) is Path.MATVEC for outputs, inputs in shapes)

    def prompt(self, embeddings: Tensor, tokens: Tokens) -> Tensor:
        """Packed embeddings, before the embedding multiplier, to `(total_tokens, hidden)` states after the final norm.

        Args:
            embeddings: `(total_tokens, hidden)`.
            tokens: their layout, with a `step`.
        """
        x = embeddings * self.decoder.embedding_multiplier
        frequencies = self.decoder.rotary_emb.frequencies(x.device)
        cos, sin = (one.squeeze(1) for one in rotary_embedding(frequencies, tokens.positions, x.dtype))
        return self._many_rows(x, (cos, sin), tokens, None).normed

    def step(self, x: Tensor, rotary: Rotary, tokens: Tokens, counters: Tensor) -> States:
        """One new token of each sequence.

        Args:
            x: `(rows, hidden)` multiplied embeddings.
            rotary: cosine and signed sine of the positions, `(rows, head_dim)` each.
            tokens: the layout.
            counters: `(rows * heads,)` int32 zeros, which stay zero.
        """
        if uses_kernels(tokens.step.pool) and self._are_matvecs(x.shape[0]):
            return self._few_rows(x, rotary, tokens, counters)
        return self._many_rows(x, rotary, tokens, counters)

    def _few_rows(self, x: Tensor, rotary: Rotary, tokens: Tokens, counters: Tensor) -> States:
        first = self.layers[0]
        # Not early: the launches after it read the step's state, which the launch before it writes, without waiting.
        projected = first.qkv.fused(x, first.module.input_layernorm)
        with early_launches():
            for layer in self.layers:
                if layer is not first:
                    projected = layer.qkv.fused(x, layer.module.input_layernorm)
                width, multiplier = layer.qkv.weight.shape[0], layer.module.residual_multiplier
                low = None if layer.qkv.lora_a is None else projected[:, width:]
                attended = self._attend_step(layer, projected[:, :width], low, rotary, tokens, counters)
                x = layer.o.fused(attended.flatten(1), residual=x, multiplier=multiplier)
                hidden = layer.gate_up.fused(x, layer.module.post_attention_layernorm, gated=True)
                x = layer.down.fused(hidden, residual=x, multiplier=multiplier)
        return States(x, None)

    def _many_rows(self, x: Tensor, rotary: Rotary, tokens: Tokens, counters: Tensor | None) -> States:
        normed = self.layers[0].module.input_layernorm(x)
        norms = [*(one.module.input_layernorm for one in self.layers[1:]), self.decoder.norm]
        for layer, next_norm in zip(self.layers, norms, strict=True):
            projected, low = layer.qkv.plain(normed)
            if counters is None:
                attended = self._attend_prompt(layer, projected, low, rotary, tokens)
            else:
                attended = self._attend_step(layer, projected, low, rotary, tokens, counters)
            x, normed = self._after_attention(layer, x, attended.flatten(1), tokens)
            x, normed = self._after_mlp(layer, x, normed, next_norm, tokens)
        return States(x, normed)

    def _after_attention(self, layer: _Layer, x: Tensor, attended: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        if layer.o is None:
            delta = layer.module.self_attn.o_proj(attended, adapter_index=tokens.adapter_index)
        else:
            delta = layer.o.partial(attended, x.shape[0])
        return _add(layer, x, delta, layer.module.post_attention_layernorm)

    def _after_mlp(self, layer: _Layer, x: Tensor, normed: Tensor, norm: GraniteRMSNorm, tokens: Tokens) -> tuple[Tensor, Tensor]:
        if layer.gate_up is None:
            delta = layer.module.mlp(normed, adapter_index=tokens.adapter_index)
        else:
            hidden = OPERATIONS["silu_product"].run(layer.gate_up.plain(normed)[0])
            delta = layer.down.partial(hidden, x.shape[0])
        return _add(layer, x, delta, norm)

    def _attend_step(self, layer: _Layer, qkv: Tensor, low: Tensor | None, rotary: Rotary, tokens: Tokens, counters: Tensor) -> Tensor:
        """`(rows, heads, head_dim)`: the adapter, rotary, cache write and attention of one new token of each sequence, in one launch."""
        step, pools = tokens.step, _pools(tokens.step, layer)
        arguments = qkv, *rotary, *pools, step.block_table, step.kv_lens, counters, low, *layer.adapter.b, tokens.adapter_index
        return OPERATIONS["decode_attention"].run(*arguments, scale=layer.module.self_attn.scaling, **self._options(layer))

    def _attend_prompt(self, layer: _Layer, qkv: Tensor, low: Tensor | None, rotary: Rotary, tokens: Tokens) -> Tensor:
        """As `_attend_step` for any number of tokens of each sequence."""
        step, segments, pools = tokens.step, tokens.segments, _pools(tokens.step, layer)
        arguments = qkv, *rotary, step.slots, *pools, low, *layer.adapter.b, tokens.adapter_index
        q = OPERATIONS["rotary_write"].run(*arguments, **self._options(layer))
        extent = {"max_query_len": segments.longest, "scale": layer.module.self_attn.scaling}
        return OPERATIONS["paged_attention"].run(q, *pools, step.block_table, step.kv_lens, segments.cu_seqlens, **extent)

    def _options(self, layer: _Layer) -> dict[str, Any]:
        names = ("scaling_q", "scaling_k", "scaling_v")
        return dict(zip(names, layer.adapter.scaling, strict=True)) | {"num_heads": self.decoder.config.num_attention_heads}

    def logits(self, states: States) -> Tensor:
        """`(rows, vocabulary)`, divided by `divisor`."""
        if states.normed is None:
            head = _Product(self.head)
            with early_launches():
                return head.fused(states.hidden, self.decoder.norm, multiplier=1 / self.divisor)
        return self.scores(states) / self.divisor

    def scores(self, states: States) -> Tensor:
        """`(rows, vocabulary)` logits that are not divided."""
        return F.linear(states.normed, self.padded_head)[:, : self.head.shape[0]]

    def candidates(self, states: States) -> tuple[Tensor, Tensor | None]:
        """Scores and token ids, `(rows, candidates)` each, among which the best token is; None for the ids: the columns."""
        if states.normed is not None:
            return self.scores(states), None
        norm = self.decoder.norm
        run = OPERATIONS["head_argmax"].run
        return run(states.hidden, self.head, norm.weight, eps=norm.variance_epsilon, divisor=self.divisor)


def uses_kernels(pool: PagePool) -> bool:
    """Whether the operations run as kernels on these pages, and not as references."""
    keys = pool.keys[0]
    return keys.shape[-1] <= _MOST_HEAD_DIM and OPERATIONS["decode_attention"].resolve(None, keys.device, keys.dtype) == "triton"


class LayersInUse:
    """The layers of a decoder without head, for many passes: on a CPU, finding them for each would cost more than fusing saves."""

    def __init__(self, decoder: nn.Module):
        self._decoder = decoder
        self._find()

    def _find(self) -> None:
        self._snapshot = Snapshot(self._decoder)
        self._layers = None if self._snapshot.have_hooks() else FusedLayers.of(self._decoder)

    def now(self) -> FusedLayers | None:
        """Found again if the model has changed; None as for `FusedLayers.of`, and with hooks."""
        if not self._snapshot.is_current():
            self._find()
        return self._layers


def _add(layer: _Layer, x: Tensor, delta: Tensor, norm: GraniteRMSNorm) -> tuple[Tensor, Tensor]:
    """The residual sum, and its norm."""
    options = {"eps": norm.variance_epsilon, "multiplier": layer.module.residual_multiplier}
    return OPERATIONS["add_rms_norm"].run(x, delta, norm.weight, **options)


def _pools(step: CacheStep, layer: _Layer) -> tuple[Tensor, Tensor]:
    number = layer.module.self_attn.layer_idx
    return step.pool.keys[number], step.pool.values[number]
