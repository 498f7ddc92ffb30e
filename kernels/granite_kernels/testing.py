"""Tolerances, and inputs that catch errors which random contiguous ones hide. Shared by tests and benchmarks.

The truth is the reference in float64 on the same rounded inputs. A kernel's error may be a small factor times that of eager
PyTorch in the same dtype, plus a floor. There is no other criterion. An operation on integers has no other inputs for a truth,
so its truth is the reference itself; its own tests compare that with float64.
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
    """Distance from the truth: `rms` relative to its RMS, `max` relative to its largest magnitude (absolute if those are 0)."""

    rms: float
    max: float


@dataclass(frozen=True)
class Tolerance:
    """An error may be `factor` times eager PyTorch's plus `floor`."""

    rms_factor: float
    rms_floor: float
    max_factor: float
    max_floor: float


# float32 has a fixed bound, which 3xTF32 products meet and plain TF32 products miss. The floors of the 16-bit types are a
# quarter (RMS) and half (max) of their epsilon: kernels round operands of a product, such as softmax weights and their
# gradients, where the references round only what they return. float64 is for tests of references against independent code.
TOLERANCES = {
    torch.float64: Tolerance(0.0, 1e-12, 0.0, 1e-12),
    torch.float32: Tolerance(0.0, 1e-5, 0.0, 1e-5),
    torch.float16: Tolerance(1.25, 2.0**-12, 2.0, 2.0**-11),
    torch.bfloat16: Tolerance(1.25, 2.0**-9, 2.0, 2.0**-8),
}


def error(actual: torch.Tensor, truth: torch.Tensor) -> Error:
    """The distance of `actual` from `truth`, in float64. NaN in either makes the error NaN, which no tolerance allows."""
    if actual.shape != truth.shape:
        raise ValueError(f"actual has shape {tuple(actual.shape)}, the truth has {tuple(truth.shape)}")
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
    """Fails unless `actual` is within tolerance of `truth`, given the error of `eager` in the same dtype.

    `dtype` is the dtype that the call computed in, if that is not the result's: in a bfloat16 call the float32 gradient of a
    float32 parameter is held to bfloat16's tolerance.
    """
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{name} is {actual.dtype}, eager PyTorch gives {eager.dtype}")
    tolerance = TOLERANCES[dtype or actual.dtype]
    ours, theirs = error(actual, truth), error(eager, truth)
    rms_limit = tolerance.rms_factor * theirs.rms + tolerance.rms_floor
    max_limit = tolerance.max_factor * theirs.max + tolerance.max_floor
    # "not … <=" so that NaN fails.
    if not (ours.rms <= rms_limit and ours.max <= max_limit):
        raise AssertionError(
            f"{name} in {dtype or actual.dtype}: RMS error {ours.rms:.3g}, limit {rms_limit:.3g}; "
            f"max error {ours.max:.3g}, limit {max_limit:.3g} (eager PyTorch: {theirs.rms:.3g}, {theirs.max:.3g})"
        )


def assert_operation_accurate(operation: Operation, inputs: dict[str, Any], impl: str | None = None) -> None:
    """Fails unless results, gradients and changed arguments of one call are within tolerance; integers must be equal."""
    assert_as_expected(operation, inputs, expectations(operation, inputs), impl)


def expectations(operation: Operation, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a call is compared with: eager PyTorch's results, gradients and changed arguments, and their truth."""
    eager = outcome_of(operation, operation.reference, inputs)
    return eager, outcome_of(operation, operation.reference, in_float64(inputs), rounding=working_dtype(inputs))


def assert_as_expected(
    operation: Operation,
    inputs: dict[str, Any],
    expected: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
    impl: str | None = None,
) -> None:
    """`assert_operation_accurate` with the `expectations` of these inputs, for several calls on them."""
    dtype, (eager, truth) = working_dtype(inputs), expected
    actual = outcome_of(operation, partial(operation.call, impl=impl), inputs)
    for name in truth:
        if truth[name].is_floating_point():
            assert_accurate(actual[name], eager[name], truth[name], f"{operation.name}: {name}", dtype)
        elif not torch.equal(actual[name], truth[name]):
            raise AssertionError(f"{operation.name}: {name} is {actual[name]}, expected {truth[name]}")


def outcome_of(operation: Operation, function: Callable[..., Any], inputs: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    """`outcome` of a function with the operation's arguments."""
    return outcome(function, inputs, operation.differentiable, mutates=operation.mutates, **options)


def assert_same_bits(operation: Operation, inputs: dict[str, Any], impl: str | None = None) -> None:
    """Fails unless each sequence gets the same bits alone, in this batch, in the batch reversed, and in it twice over."""
    name = next(name for name in inputs if name.startswith("cu_seqlens"))
    lengths = [length // inputs.get("stride", 1) for length in inputs[name].diff().tolist()]
    everything = list(range(len(lengths)))
    with torch.no_grad():
        expected = operation.call(**inputs, impl=impl)[: sum(lengths)].split(lengths)
        for order in [*([one] for one in everything), everything[::-1], everything * 2] if everything else []:
            out = operation.call(**with_sequences(operation, inputs, order), impl=impl)
            parts = [lengths[one] for one in order]
            for place, (sequence, rows) in enumerate(zip(order, out[: sum(parts)].split(parts), strict=True)):
                if not torch.equal(rows, expected[sequence]):
                    raise AssertionError(f"{operation.name}: sequence {sequence} gets other bits at position {place} of the batch {order}")


def outcome(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    wrt: tuple[str, ...] = (),
    *,
    rounding: torch.dtype | None = None,
    seed: int = 1,
    mutates: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """The result of `function(**inputs)` as "out", and the gradient of each tensor named in `wrt` as "grad <name>".

    Several results are "out 0", "out 1" and so on. The arguments in `mutates` are copied first, so that `inputs` stays as it is, and
    the copies after the call are "after <name>", with zeros in place of NaN that was there before.

    The incoming gradient is random, and the same in every dtype and on every device except for rounding: to the result's
    dtype, or to `rounding`, so that a float64 truth gets the same gradient as the narrower call. An argument that the result
    does not depend on has a gradient of zeros.
    """
    before = {name: inputs[name] for name in mutates if inputs.get(name) is not None}
    inputs = {**inputs, **{name: _copied(one) for name, one in before.items()}}
    leaves = {name: inputs[name].detach().requires_grad_() for name in wrt if inputs[name] is not None}
    with torch.set_grad_enabled(bool(leaves)):
        out = function(**{**inputs, **leaves})
    results = {f"out {number}": one for number, one in enumerate(out)} if isinstance(out, tuple) else {"out": out}
    if not leaves:
        return results | {f"after {name}": _changed(inputs[name], before[name]) for name in before}
    rng = torch.Generator().manual_seed(seed)
    incoming = [torch.randn(one.shape, generator=rng).to(rounding or one.dtype).to(one.device, one.dtype) for one in results.values()]
    gradients = torch.autograd.grad(list(results.values()), list(leaves.values()), incoming, allow_unused=True, materialize_grads=True)
    results = {name: one.detach() for name, one in results.items()}
    return results | {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def working_dtype(inputs: dict[str, Any]) -> torch.dtype:
    """The dtype of the first floating-point argument; float32, as in `Operation.select`, if there is none."""
    return next((value.dtype for value in inputs.values() if _is_float(value)), torch.float32)


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64, from which the truth is computed."""
    return {name: value.double() if _is_float(value) else value for name, value in inputs.items()}


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a view into the middle of a larger tensor filled with poison (NaN, or the lowest integer).

    Only the last stride is still 1, so code that assumes a contiguous tensor reads poison.
    """
    poison = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
    view = tensor.new_full([size + 3 for size in tensor.shape], poison)
    for dim, size in enumerate(tensor.shape):
        view = view.narrow(dim, 1, size)
    return view.copy_(tensor)


def strided_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """`strided` applied to every tensor of a call."""
    return {name: strided(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def with_sequences(operation: Operation, inputs: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """The same call on the sequences of `order`, which may repeat them, without padding rows."""
    name = next(name for name in inputs if name.startswith("cu_seqlens"))
    offsets = inputs[name].tolist()
    spans = [slice(offsets[sequence], offsets[sequence + 1]) for sequence in order]
    changed = {packed: torch.cat([inputs[packed][span] for span in spans]) for packed in operation.packed}
    lengths = torch.tensor([0, *(span.stop - span.start for span in spans)]).cumsum(0).to(inputs[name])
    # Every other index tensor has one entry per sequence, or is computed from the offsets if omitted.
    others = {other: value for other, value in inputs.items() if other != name and _is_index(value)}
    each = {other: None if other.startswith("cu_seqlens") else value[order] for other, value in others.items()}
    return {**inputs, **changed, **each, name: lengths}


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Makes `torch.empty` return NaN (for integers the highest value), which exposes output that was never written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    # PyTorch fills new memory only in deterministic mode. warn_only, because some operations have no such mode.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, and with poison between its elements if there was any."""
    base = tensor._base if tensor._base is not None else tensor
    return base.clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _changed(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """An argument after a call, where poison that nothing overwrote must not count as an error."""
    return after.masked_fill(before.isnan() & after.isnan(), 0)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_index(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()
