"""Weights that lie one after another in memory, so that one launch reads several projections as one matrix.

    arrange(decoder, head); arrange(encoder)                            # before a request; does nothing the second time
    side_by_side(q_proj.weight, k_proj.weight, v_proj.weight)           # (q + k + v, in), or None

Parameters stay what they were: the same objects under the same names. Only their memory moves. Each keeps a storage of exactly its own
size, which is a window on the common one. Programs that save a model look for shared storages, and some of them drop every tensor but the
first (Accelerate's `save_model`), or write the whole storage once for each of its tensors (pickle).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from weakref import WeakValueDictionary

import torch
from granite_kernels.launch import has_memory, recording
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from granite_speech.modules.adapter import LoraLinear

__all__ = ["arrange", "destinations", "is_plain", "padded_rows", "sets", "side_by_side"]

# Projections of the same states: the module that has them, and their names.
_TOGETHER = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj"), "attn": ("to_q", "to_kv")}
_MULTIPLE = 64  # of the head's rows: the library's product with an odd number of rows is slow
_DEVICES = ("cpu", "cuda")
_PLAIN = (nn.Parameter, Tensor, FakeTensor)

# The common storage by the address of each tensor in it. It lives as long as one of its tensors, and so does its entry.
_common: WeakValueDictionary[int, UntypedStorage] = WeakValueDictionary()
_padded: WeakValueDictionary[int, UntypedStorage] = WeakValueDictionary()  # of a head, with rows of zeros after its last


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is no more than its values in memory: other classes (quantized, distributed) compute in their own way."""
    return type(tensor) in _PLAIN and tensor.layout == torch.strided


def side_by_side(*tensors: Tensor) -> Tensor | None:
    """Matrices or vectors as one, without a copy.

    Args:
        tensors: `(rows, in)` each, or `(rows,)`, as `arrange` leaves them.

    Returns:
        `(sum of rows, in)` or `(sum of rows,)`, without gradients; None unless the tensors are plain ones that lie one after another in
        one storage.
    """
    first, rows = tensors[0], 0
    dtype, width = first.dtype, first.shape[1:]
    for one in tensors:
        if not is_plain(one) or one.dtype != dtype or one.shape[1:] != width or not one.is_contiguous():
            return None
        rows += one.shape[0]
    place = _place(tensors)
    return None if place is None else _view(*place, first, rows)


def padded_rows(weight: Tensor, multiple: int = _MULTIPLE) -> Tensor | None:
    """The head's weight with rows of zeros after its last.

    Args:
        weight: `(rows, in)`.
        multiple: of the result's rows.

    Returns:
        `(rows rounded up, in)`, without gradients and without a copy; None if there are no such rows in memory.
    """
    rows = -(-weight.shape[0] // multiple) * multiple
    if rows == weight.shape[0]:
        return weight.detach()
    if not weight.is_contiguous():
        return None
    is_real = has_memory(weight)
    storage = _padded.get(weight.data_ptr()) if is_real else weight.untyped_storage()
    begins = storage is not None and (storage.data_ptr() == weight.data_ptr() if is_real else weight.storage_offset() == 0)
    return _view(storage, 0, weight, rows) if begins and rows * weight[0].nbytes <= storage.nbytes() else None


def arrange(layered: nn.Module, head: nn.Module | None = None) -> None:
    """Put the weights of each layer side by side where they are not yet, and rows of zeros after the head's.

    The storages of a language model's layer are q | k | v | A of q | A of k | A of v and gate | up | A of gate | A of up, with the active
    adapter's A; that of an encoder's block is q | k | v. Biases and the scales of int8 weights likewise. Matrices of another dtype than the
    weights have a storage of their own. At most one layer, or the head, is in memory twice.

    Left where they are: parameters that are not plain ones, that are without values or in shared memory, or whose memory somebody else
    refers to (a state dict in use; the large buffers of FSDP and DeepSpeed); and modules that are not this package's own linear layers.

    Args:
        layered: the language model without its head, or the encoder.
        head: the language model's head; padded if it is an `nn.Linear`.
    """
    for modules in sets(layered):
        for slots in _slots(modules):
            if _place(slots) is None and all(map(_can_move, slots)) and len({one.device for one in slots}) == 1:
                before = _common.get(slots[0].data_ptr()) if has_memory(slots[0]) else None
                _move(slots, _allocate)
                _move_out(modules, before)
    weight = head.weight if type(head) is nn.Linear else None
    if weight is not None and padded_rows(weight) is None and _can_move(weight):
        _move([weight], _allocate_padded)


def destinations(
    layered: nn.Module, head: nn.Module | None, dtype_of: Callable[[Tensor], torch.dtype | None], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Memory for the values of a model on the meta device, side by side as `arrange` would put them.

    Args:
        layered, head: as for `arrange`.
        dtype_of: the dtype that a parameter will have; None for one that gets no value.
        device: where the weights go.

    Yields:
        A parameter of the model and the tensor to read its values into, in the order of the layers.
    """
    if device.type not in _DEVICES:
        return
    for modules in sets(layered):
        for slots in _slots(modules, dtype_of):
            yield from zip(slots, _allocate(slots, dtype_of(slots[0]), device), strict=True)
    if type(head) is nn.Linear and (dtype := dtype_of(head.weight)) is not None:
        yield head.weight, *_allocate_padded([head.weight], dtype, device)


def sets(layered: nn.Module) -> Iterator[list[LoraLinear]]:
    """The projections of the same input, for each layer."""
    for layer in getattr(layered, "layers", ()):  # a decoder that was put in its place may be of another kind
        for parent, names in _TOGETHER.items():
            children = getattr(layer._modules.get(parent), "_modules", {})
            found = [children.get(name) for name in names]
            if all(type(one) is LoraLinear for one in found):
                yield found


def _slots(modules: list[LoraLinear], dtype_of: Callable[[Tensor], torch.dtype | None] | None = None) -> Iterator[list[Tensor]]:
    """What goes into each storage of these projections, in order: tensors of one dtype."""
    # Not by attribute, which takes ten times as long: this runs before every request.
    dtype_of = _dtype if dtype_of is None else dtype_of
    weights = [one._parameters["weight"] for one in modules]
    matrices = [one._parameters["weight"] for one in (one._modules.get("lora_A") for one in modules) if one is not None]
    dtype = dtype_of(weights[0])
    others = [one for one in matrices if dtype_of(one) != dtype]
    groups = [weights + [one for one in matrices if dtype_of(one) == dtype], others]
    groups += [[one._parameters["bias"] for one in modules], [one._buffers["weight_scale"] for one in modules]]
    for slots in groups:
        if len(slots) > 1 and all(one is not None for one in slots) and _have_one_dtype(slots, dtype_of):
            yield slots


def _dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype


def _have_one_dtype(slots: list[Tensor], dtype_of: Callable[[Tensor], torch.dtype | None]) -> bool:
    dtypes = set(map(dtype_of, slots))
    return len(dtypes) == 1 and None not in dtypes


def _place(tensors: Sequence[Tensor]) -> tuple[UntypedStorage, int] | None:
    """The storage in which tensors lie one after another, and the number of elements before them; None if they do not."""
    first = tensors[0]
    if not has_memory(first):  # without memory, and so without addresses
        storage, at = first.untyped_storage(), first.storage_offset()
        for one in tensors:
            if one.untyped_storage()._cdata != storage._cdata or one.storage_offset() != at:
                return None
            at += one.numel()
        return storage, first.storage_offset()
    start = at = first.data_ptr()
    for one in tensors:
        if one.data_ptr() != at:
            return None
        at += one.nbytes
    storage = _common.get(start)
    storage = first.untyped_storage() if storage is None else storage
    origin = storage.data_ptr()
    return (storage, (start - origin) // first.itemsize) if at <= origin + storage.nbytes() else None


def _can_move(tensor: Tensor) -> bool:
    """Whether nobody else relies on where the values of a parameter or buffer are."""
    # On the meta device only while launches are recorded, which must be those of the model with its weights side by side.
    can_hold = tensor.device.type in _DEVICES or (tensor.is_meta and recording())
    if not is_plain(tensor) or not tensor.is_contiguous() or not can_hold or tensor.numel() == 0:
        return False
    if not has_memory(tensor):
        return True
    # The parameter's and that of `storage`. A third is a view of the values, or a larger buffer that they are part of.
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= 2 and not (tensor.device.type == "cpu" and storage.is_shared())


def _allocate(slots: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tensors of the shapes of `slots`, side by side, without values."""
    common = torch.empty(sum(one.shape[0] for one in slots), *slots[0].shape[1:], dtype=dtype, device=device)
    return [_window(part, _common) for part in common.split([one.shape[0] for one in slots])]


def _allocate_padded(slots: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The same for a head's weight alone, with rows of zeros after it."""
    rows, *width = slots[0].shape
    common = torch.empty(-(-rows // _MULTIPLE) * _MULTIPLE, *width, dtype=dtype, device=device)
    common[rows:].zero_()
    return [_window(common[:rows], _padded)]


def _window(part: Tensor, table: WeakValueDictionary[int, UntypedStorage]) -> Tensor:
    """The same memory as a tensor with a storage of its own, which keeps the common one alive."""
    if not has_memory(part):
        return part
    table[part.data_ptr()] = part.untyped_storage()
    return from_dlpack(to_dlpack(part))


@torch.inference_mode(False)
@torch.no_grad()
def _move(slots: Sequence[Tensor], allocate: Callable[[Sequence[Tensor], torch.dtype, torch.device], list[Tensor]]) -> None:
    places = allocate(slots, slots[0].dtype, slots[0].device)
    for slot, place in zip(slots, places, strict=True):
        place.copy_(slot.data)
    if places[0].is_cuda and has_memory(places[0]):
        torch.cuda.current_stream(places[0].device).synchronize()  # other streams may read the new memory next, and write to the old
    for slot, place in zip(slots, places, strict=True):
        if slot.is_inference():  # it was made in inference mode, and would be broken by memory of any other kind
            with torch.inference_mode():
                place = torch.empty(0, dtype=place.dtype, device=place.device).set_(place)
        slot.data = place


@torch.no_grad()
def _move_out(modules: list[LoraLinear], storage: UntypedStorage | None) -> None:
    """Give matrices of adapters that are no longer active memory of their own, or they would keep all of this storage."""
    if storage is None:
        return
    addresses = range(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
    for matrix in (one.a.weight for module in modules for one in module.adapters.values()):
        if matrix.data_ptr() in addresses:
            matrix.data = matrix.data.clone()


def _view(storage: UntypedStorage, offset: int, like: Tensor, rows: int) -> Tensor:
    # A caller may keep it, so it must not be one of inference mode. Leaving that mode takes as long as the rest.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        return torch.empty(0, dtype=like.dtype, device=like.device).set_(storage, offset, (rows, *like.shape[1:]), like.stride())
