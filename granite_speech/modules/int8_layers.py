"""Which layers of a model get int8 weights: on a CPU that multiplies 8-bit integers more than on a GPU.

| part | int8 on a GPU | int8 on a CPU with VNNI or AMX | why |
|---|---|---|---|
| language model's layers | yes | yes | a step reads every weight once |
| encoder's blocks, projector | no | yes | a GPU is at least as fast in 16 bits; a CPU multiplies twice as much |
| encoder's first and last layer, embedding, head, norms, adapters | no | no | little time, and what they lose reaches every result |

The head keeps its weight, but a CPU that can multiply 8-bit integers gets a rounded copy, to find the few tokens among which the best is
(`FusedLayers.candidates`); the weight itself decides between these.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from weakref import WeakKeyDictionary

import torch
from granite_kernels.int8_cpu import PackedInt8
from torch import Tensor, nn

from granite_speech.modules.int8_weight import Int8Weight, PackedRows, is_packable, stand_in
from granite_speech.modules.quantized import int8_rows, projections
from granite_speech.modules.side_by_side import sets, side_by_side

__all__ = ["layers_to_round", "pack", "pack_layers", "packed_head", "round_to_int8"]

_KEPT = ("input_linear", "out", "out_mid")  # of the encoder
_PARTS = ("encoder", "projector")

# The rounded copy of a head, and of which values it is one.
_heads: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], PackedInt8]] = WeakKeyDictionary()


def layers_to_round(model: nn.Module, device: torch.device) -> Iterator[list[Int8Weight]]:
    """The layers that get int8 weights if the model is on this device; projections of the same states together.

    Args:
        model: a whole model, or one with a `decoder`, `encoder` or `projector` alone.
        device: where the weights will be.
    """
    decoder = getattr(model, "decoder", None)
    if decoder is not None:
        rounded = set(projections(decoder))
        yield from (modules for modules in _products(decoder) if modules[0] in rounded)
    for part in (getattr(model, name, None) for name in _PARTS):
        kept = [getattr(part, name, None) for name in _KEPT]
        for modules in () if part is None else _products(part):
            if modules[0] not in kept and is_packable([one.weight for one in modules], device):
                yield modules


def pack_layers(model: nn.Module) -> None:
    """Pack every int8 weight that can be packed, those of projections of the same states together. Does nothing the second time."""
    if not _has_int8(model):
        return
    for part in (getattr(model, name, None) for name in ("decoder", *_PARTS)):
        for modules in () if part is None else _products(part):
            pack(modules)
    decoder, head = getattr(model, "decoder", None), getattr(model, "lm_head", None)
    if decoder is not None and type(head) is nn.Linear and packed_head(head) is None:
        is_wanted = any(one.packed is not None for one in projections(decoder)) and head.weight.is_floating_point()
        if is_wanted and not head.weight.is_inference() and is_packable([head.weight], head.weight.device):
            _heads[head] = _version(head.weight), PackedInt8(*int8_rows(head.weight.detach()))


def _has_int8(model: nn.Module) -> bool:
    """Whether to look further: this runs before every request. A language model has int8 weights in all layers or in none."""
    decoder = getattr(model, "decoder", None)
    if decoder is None:
        return True
    return any(getattr(one, "weight_scale", None) is not None for one in islice(projections(decoder), 1))


def packed_head(head: nn.Module) -> PackedInt8 | None:
    """The rounded copy of a head's weight, if there is one and it is current."""
    version, packed = _heads.get(head, (None, None))
    return packed if packed is not None and version == _version(head.weight) else None


def _version(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


def _products(part: nn.Module) -> Iterator[list[Int8Weight]]:
    """The layers of a part; projections of the same states together."""
    together = list(sets(part))
    yield from together
    grouped = {id(one) for modules in together for one in modules}
    yield from ([one] for one in part.modules() if isinstance(one, Int8Weight) and id(one) not in grouped)


@torch.no_grad()
def pack(modules: Sequence[Int8Weight]) -> None:
    """Pack the int8 weights of projections of the same states as one matrix. Does nothing if they are packed, or cannot be.

    The plain weights are freed, so at most one such matrix is in memory twice.
    """
    scales = [one.weight_scale for one in modules]
    if any(one is None for one in scales) or any(one.packed is not None for one in modules):
        return
    weights = [one.weight.detach().flatten(1) for one in modules]
    if not is_packable(weights, weights[0].device):
        return
    joined = side_by_side(*weights)
    whole = PackedInt8(torch.cat(weights) if joined is None else joined, torch.cat(scales))
    del weights, joined
    first = 0
    for one in modules:
        last = first + one.weight.shape[0]
        one.packed, one.weight = PackedRows(whole, slice(first, last)), stand_in(one.weight)
        first = last


@torch.no_grad()
def round_to_int8(model: nn.Module) -> None:
    """Give a model in memory the int8 weights that `from_pretrained(quantize="int8")` would give it on its device."""
    for modules in list(layers_to_round(model, next(model.parameters()).device)):
        for module in modules:
            if module.weight_scale is None:
                module.store_int8(module.weight.detach())
        pack(modules)
    pack_layers(model)
