"""How a result is judged, and inputs that catch what random contiguous ones do not. Shared by the tests and the benchmarks.

Truth is the reference run in float64 on the same rounded inputs. A kernel may be as wrong as eager PyTorch in the same dtype
is, times a small factor, plus a floor; nothing else decides whether it is right.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from granite_kernels.op import Operation


@dataclass(frozen=True)
class Error:
    """Distance from the truth: `rms` over the truth's RMS, `max` over the truth's largest magnitude (absolute where that is 0)."""

    rms: float
    max: float


@dataclass(frozen=True)
class Tolerance:
    """An error may be `factor` times eager PyTorch's plus `floor`."""

    rms_factor: float
    rms_floor: float
    max_factor: float
    max_floor: float


# The one table. float32 has an absolute bound, which 3xTF32 products hold and plain TF32 products miss. The floors of the
# narrow types are a quarter (RMS) and half (max) of their epsilon: one or two more roundings of an operand, such as softmax
# weights and their gradients on their way into a product, where the references round only what they return. float64 is there
# for tests of the references against independent code.
TOLERANCES = {
    torch.float64: Tolerance(0.0, 1e-12, 0.0, 1e-12),
    torch.float32: Tolerance(0.0, 1e-5, 0.0, 1e-5),
    torch.float16: Tolerance(1.25, 2.0**-12, 2.0, 2.0**-11),
    torch.bfloat16: Tolerance(1.25, 2.0**-9, 2.0, 2.0**-8),
}


def error(actual: torch.Tensor, truth: torch.Tensor) -> Error:
    """The distance of `actual` from `truth`, in float64. NaN in either is an error of NaN, which no tolerance allows."""
    if actual.shape != truth.shape:
        raise ValueError(f"actual has shape {tuple(actual.shape)}, the truth {tuple(truth.shape)}")
    if truth.numel() == 0:
        return Error(0.0, 0.0)
    truth = truth.detach().to(torch.float64)
    difference = actual.detach().to(truth.device, torch.float64) - truth
    rms_scale = truth.square().mean().sqrt().item() or 1.0
    max_scale = truth.abs().max().item() or 1.0
    return Error(difference.square().mean().sqrt().item() / rms_scale, difference.abs().max().item() / max_scale)


def assert_accurate(
    actual: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, name: str = "result", dtype: torch.dtype | None = None
) -> None:
    """Fails unless `actual` is within tolerance of `truth`, given what `eager` reaches in the same dtype.

    `dtype` is the dtype the call computed in, where that is not the result's own: the float32 gradient of a float32 parameter
    in a bfloat16 call is judged as bfloat16.
    """
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{name} is {actual.dtype}, eager PyTorch gives {eager.dtype}")
    tolerance = TOLERANCES[dtype or actual.dtype]
    ours, theirs = error(actual, truth), error(eager, truth)
    rms_limit = tolerance.rms_factor * theirs.rms + tolerance.rms_floor
    max_limit = tolerance.max_factor * theirs.max + tolerance.max_floor
    # Written so that NaN fails.
    if not (ours.rms <= rms_limit and ours.max <= max_limit):
        raise AssertionError(
            f"{name} in {dtype or actual.dtype}: RMS error {ours.rms:.3g} of at most {rms_limit:.3g}, "
            f"max error {ours.max:.3g} of at most {max_limit:.3g} (eager PyTorch: {theirs.rms:.3g}, {theirs.max:.3g})"
        )


def assert_operation_accurate(operation: Operation, inputs: dict[str, Any], impl: str | None = None) -> None:
    """Result and gradients of one call, against the truth and against the reference in the call's own dtype."""
    dtype = working_dtype(inputs)
    wrt = operation.differentiable
    actual = outcome(partial(operation.call, impl=impl), inputs, wrt)
    eager = outcome(operation.reference, inputs, wrt)
    truth = outcome(operation.reference, in_float64(inputs), wrt, rounding=dtype)
    for name in truth:
        assert_accurate(actual[name], eager[name], truth[name], f"{operation.name}: {name}", dtype)


def assert_same_bits(operation: Operation, inputs: dict[str, Any], impl: str | None = None) -> None:
    """Every sequence alone, and all in the batch as it is, in that batch turned round, and twice over: always the same bits."""
    name = next(name for name in inputs if name.startswith("cu_seqlens"))
    lengths = inputs[name].diff().tolist()
    everyone = list(range(len(lengths)))
    with torch.no_grad():
        expected = operation.call(**inputs, impl=impl)[: sum(lengths)].split(lengths)
        for order in [*([one] for one in everyone), everyone[::-1], everyone * 2] if everyone else []:
            out = operation.call(**with_sequences(operation, inputs, order), impl=impl)
            for place, (sequence, rows) in enumerate(zip(order, out.split([lengths[one] for one in order]), strict=True)):
                if not torch.equal(rows, expected[sequence]):
                    raise AssertionError(f"{operation.name}: sequence {sequence} is another at place {place} of the batch {order}")


def outcome(
    function: Callable[..., torch.Tensor],
    inputs: dict[str, Any],
    wrt: tuple[str, ...] = (),
    *,
    rounding: torch.dtype | None = None,
    seed: int = 1,
) -> dict[str, torch.Tensor]:
    """The result of `function(**inputs)` as "out", and for each name in `wrt` that is a tensor its gradient as "grad <name>".

    The gradient that comes in is random, and the same in every dtype and on every device but for its rounding: to the result's
    dtype, or to `rounding`, by which a float64 truth gets the very gradient that a narrower call got. An argument that the
    result does not depend on has a gradient of zeros.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in wrt if inputs[name] is not None}
    with torch.set_grad_enabled(bool(leaves)):
        out = function(**{**inputs, **leaves})
    if not leaves:
        return {"out": out}
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    incoming = incoming.to(rounding or out.dtype).to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), incoming, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **{f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def working_dtype(inputs: dict[str, Any]) -> torch.dtype:
    """The dtype of a call: its first floating-point argument's."""
    return next(value.dtype for value in inputs.values() if _is_float(value))


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64: what the truth is computed from."""
    return {name: value.double() if _is_float(value) else value for name, value in inputs.items()}


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a view into the middle of a larger tensor, with poison (NaN, or the lowest integer) all around.

    Only the last stride stays 1: code that takes a tensor for contiguous reads the poison.
    """
    poison = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
    view = tensor.new_full([size + 3 for size in tensor.shape], poison)
    for dim, size in enumerate(tensor.shape):
        view = view.narrow(dim, 1, size)
    return view.copy_(tensor)


def strided_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """`strided` for every tensor of a call."""
    return {name: strided(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def with_sequences(operation: Operation, inputs: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The same call on these of its sequences, in this order, one as often as it is named, without padding rows."""
    name = next(name for name in inputs if name.startswith("cu_seqlens"))
    offsets = inputs[name].tolist()
    spans = [slice(offsets[sequence], offsets[sequence + 1]) for sequence in order]
    changed = {packed: torch.cat([inputs[packed][span] for span in spans]) for packed in operation.packed}
    lengths = torch.tensor([0, *(span.stop - span.start for span in spans)]).cumsum(0).to(inputs[name])
    # What else is of whole numbers has an entry for each sequence.
    each = {other: value[order] for other, value in inputs.items() if other != name and _is_index(value)}
    return {**inputs, **changed, **each, name: lengths}


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within it `torch.empty` gives NaN (the highest value, for integers): an output element that nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    # PyTorch fills fresh memory only in its deterministic mode; an operation without such a mode runs all the same.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_index(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()
