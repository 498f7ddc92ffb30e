"""What a kernel file declares, and what all of them share: the choice of backend, argument checks, test cases.

A file `<op>.py` says what an operation computes, how it is computed fast, what it must cost and which shapes matter, in one
`Operation`. Tests, benchmarks and the compile audit loop over those.
"""

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

import torch

from granite_kernels.errors import KernelError
from granite_kernels.launch import is_plain, recording

IMPLS = ("triton", "torch")
CHOICE = "GRANITE_SPEECH_KERNELS"
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Results = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Cost:
    """The least work of a call: FLOPs (2 per multiply-add), and bytes with every tensor moved once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Draw:
    """Makes a case's tensors: one seed gives the same numbers on every device.

    Without `values`, and on the meta device, floating-point tensors are meta tensors: random values for the largest cases would
    take seconds.
    """

    rng: torch.Generator
    dtype: torch.dtype
    device: torch.device
    values: bool = True

    def normal(self, *size: int, std: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        if not self.values or self.device.type == "meta":
            return torch.empty(size, device="meta", dtype=dtype or self.dtype)
        return (torch.randn(size, generator=self.rng) * std).to(self.device, dtype or self.dtype)

    def int32(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def permutation(self, n: int) -> list[int]:
        return torch.randperm(n, generator=self.rng).tolist()

    def cu_seqlens(self, lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class Case:
    """A shape that matters.

    Args:
        name: unique among the operation's cases; a test id.
        make: `make(draw, **shape)` builds the arguments of the call as a dict. Views of larger tensors where a model
            passes views, and NaN in every element that the operation must not read.
        shape: the sizes, by name.
        released: a released checkpoint's shape, for benchmarks and GPUs: too large for a CPU test.
    """

    name: str
    make: Callable[..., dict[str, Any]]
    shape: Mapping[str, Any] = field(default_factory=dict)
    released: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments of one call, by name."""
        draw = Draw(torch.Generator().manual_seed(seed), dtype, torch.device(device))
        return self.make(draw, **self.shape)

    def sizes(self, dtype: torch.dtype) -> dict[str, Any]:
        """`inputs` with meta tensors for the floating-point ones; index tensors are on the CPU. Enough for a cost."""
        draw = Draw(torch.Generator(), dtype, torch.device("cpu"), values=False)
        return self.make(draw, **self.shape)


@dataclass(frozen=True)
class Operation:
    """One operation. All its functions take the same arguments, in the same order; only `call` has `impl` as well.

    A call returns a tensor, or a tuple of tensors.

    Args:
        name: the name of its file, its public function, its tests and its row in the catalogue.
        call: the public function, which checks its arguments.
        reference: plain PyTorch, and all that `impl="torch"` runs.
        has_cpu: whether there is a faster function in PyTorch for CPU tensors without gradients, `<op>_cpu` in the file of that name.
            It takes any call that the reference takes, and passes those on that it is not faster for.
        cost: returns a `Cost`. Reads index tensors on the host.
        cases: the shapes that matter.
        differentiable: the arguments that have gradients, in the order of the call; empty for inference only.
        packed: the arguments whose rows from `cu_seqlens[-1]` on are padding; empty if every row counts.
        mutates: the arguments that a call writes to.
        wide: the floating-point arguments whose dtype is their own, and not that of the others.
        triton: the torch.library operation that launches the Triton kernels; None if triton is not installed. Its attribute
            `launcher`, if it has one, launches them directly.
        library: prepares the best single library call for part of the work, and returns a function of no arguments that makes
            it. Benchmarks compare the kernels with it.
    """

    name: str
    call: Callable[..., Results]
    reference: Callable[..., Results]
    cost: Callable[..., Cost]
    cases: tuple[Case, ...]
    differentiable: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    triton: Callable[..., Results] | None = None
    library: Callable[..., Callable[[], torch.Tensor]] | None = None
    has_cpu: bool = False

    def resolve(self, impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        """The backend that a call uses: "triton" or "torch".

        None means the environment variable GRANITE_SPEECH_KERNELS. If that is not set either, CUDA tensors in a dtype that
        the kernels support use Triton, and others PyTorch.

        Raises:
            KernelError: `impl` or the variable has another value, or "triton" cannot run. Nothing falls back.
        """
        chosen = f"impl={impl!r}"
        if impl is None and (impl := _choice()) is not None:
            chosen = f"{CHOICE}={impl}"
        if impl is None:
            on_gpu = device.type == "cuda" or (device.type == "meta" and recording())
            return "triton" if on_gpu and dtype in TRITON_DTYPES and self.triton is not None else "torch"
        if impl not in IMPLS:
            remedy = "Omit it to let the device decide"
            raise KernelError(got=f"{self.name}: {chosen}", expected=f"one of {', '.join(map(repr, IMPLS))}, or nothing", remedy=remedy)
        if impl == "triton":
            self._check_triton(chosen, device, dtype)
        return impl

    def _check_triton(self, chosen: str, device: torch.device, dtype: torch.dtype) -> None:
        torch_instead = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        if self.triton is None:
            raise KernelError(got=f"{self.name}: {chosen} without triton installed", expected="the package triton", remedy=torch_instead)
        if dtype not in TRITON_DTYPES:
            supported = ", ".join(map(str, TRITON_DTYPES))
            raise KernelError(got=f"{self.name}: {chosen} for {dtype}", expected=f"one of {supported}", remedy=torch_instead)
        if device.type == "cpu" and not _interpreted():
            remedy = f"{torch_instead}, or set TRITON_INTERPRET=1 before Python starts"
            raise KernelError(got=f"{self.name}: {chosen} for CPU tensors", expected="CUDA tensors, or Triton's interpreter", remedy=remedy)

    def select(self, impl: str | None, tensor: torch.Tensor) -> Callable[..., Results]:
        """The function of the backend that a call with this tensor uses. Given integers, a call computes in float32."""
        if impl is None and tensor.device.type == "cpu" and _choice() is None:  # as `resolve`; a step of one token calls this often
            return self.on_cpu if self.has_cpu else self.reference
        dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
        return self.triton if self.resolve(impl, tensor.device, dtype) == "triton" else self.reference

    def on_cpu(self, *args: Any, **options: Any) -> Results:
        """What a call on CPU tensors computes by default: the reference, unless there is a faster function and nobody but the caller
        sees the call (autograd, torch.compile, fake tensors, a dispatch mode)."""
        if torch.compiler.is_compiling() or not is_plain(args) or (torch.is_grad_enabled() and any(map(_requires_grad, args))):
            return self.reference(*args, **options)
        return self.cpu(*args, **options)

    @functools.cached_property
    def cpu(self) -> Callable[..., Results]:
        """The function for CPU tensors. Imported when it is first called, because its file imports the operation's."""
        return getattr(importlib.import_module(f"granite_kernels.{self.name}_cpu"), f"{self.name}_cpu")

    def run(self, *args: Any, **options: Any) -> Any:
        """`call` for modules, which know that their arguments are right: the same arguments without `impl`, and no checks.

        Checks and the dispatcher take longer than a kernel for one token. Where something has to see the call (autograd,
        torch.compile, fake tensors, a dispatch mode), it is an ordinary one.
        """
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(map(_requires_grad, args))):
            return self.call(*args, **options)
        function = self.select(None, args[0])
        launcher = getattr(function, "launcher", None)  # a reference has none, nor has a test's substitute
        if launcher is not None and is_plain(args):
            return launcher(*args, **options)
        return function(*args, **options)

    def backend(self, tensor: torch.Tensor) -> str:
        """The backend that a call with this tensor uses, such as "block_attention=triton", for a module's `extra_repr`.

        "unavailable" if the chosen backend cannot run: printing a model never raises.
        """
        try:
            return f"{self.name}={self.resolve(None, tensor.device, tensor.dtype)}"
        except KernelError:
            return f"{self.name}=unavailable"


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


# torch.compile treats the results of these two as constants.
@torch.compiler.assume_constant_result
def _choice() -> str | None:
    return os.environ.get(CHOICE) or None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def triton_backend(name: str) -> Callable[..., Results] | None:
    """The function `<name>_triton` of the file of that name, or None if triton is not installed."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return None
    return getattr(importlib.import_module(f"granite_kernels.{name}_triton"), f"{name}_triton")


def called_with(inputs: type[tuple]) -> Callable[[Callable[[Any], Any]], Callable[..., Any]]:
    """Decorates a function of one `inputs` named tuple. It is then called with the tuple's fields, by position or by name."""

    def decorate(function: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def with_arguments(*args: Any, **kwargs: Any) -> Any:
            return function(inputs(*args, **kwargs))

        return with_arguments

    return decorate


class Arguments:
    """Checks the tensors of one call against their layouts and each other. Reads no value, so it never waits for a device.

    A layout is the names of the dimensions. A name means one size in the whole call, set by the first tensor that uses it and
    kept in `size[name]`. Dtype and device are the first tensor's unless a call to `tensor` names others.
    """

    def __init__(self, operation: str):
        self.operation = operation
        self.size: dict[str, int] = {}
        self._set_by: dict[str, str] = {}
        self._first: tuple[str, torch.Tensor] | None = None

    def tensor(self, name: str, value: torch.Tensor, layout: str, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
        """Raises KernelError unless `value` is a tensor with this layout, dtype and device, and last stride 1."""
        if not isinstance(value, torch.Tensor):
            self.refuse(f"{name} is of type {type(value).__name__}", "a tensor", f"Pass {name} as a tensor ({layout.replace(' ', ', ')})")
        self._check_shape(name, value, layout.split())
        if self._first is None:
            self._first = (name, value)
            dtypes = dtypes or FLOAT_DTYPES
        first_name, first = self._first
        dtypes = dtypes or (first.dtype,)
        if value.dtype not in dtypes:
            allowed = " or ".join(str(dtype) for dtype in dtypes)
            source = f", the dtype of {first_name}" if dtypes == (first.dtype,) and name != first_name else ""
            self.refuse(f"{name} has dtype {value.dtype}", f"{allowed}{source}", f"Convert {name} with .to({dtypes[0]})")
        if value.device != first.device:
            self.refuse(
                f"{name} is on {value.device}", f"{first.device}, where {first_name} is", f"Move {name} with .to({str(first.device)!r})"
            )
        if value.ndim and value.stride(-1) != 1 and value.shape[-1] > 1:
            self.refuse(f"{name} has strides {tuple(value.stride())}", "a last stride of 1", f"Pass {name}.contiguous()")

    def index(self, name: str, value: torch.Tensor, layout: str) -> None:
        """`tensor` for int32 index tensors."""
        self.tensor(name, value, layout, (torch.int32,))

    def refuse_gradients(self, **tensors: torch.Tensor | None) -> None:
        """Raises KernelError if a gradient of one of these would be needed: for operations without a backward."""
        for name, one in tensors.items():
            if one is not None and one.requires_grad and torch.is_grad_enabled():
                self.refuse(f"{name}, a tensor that requires a gradient", "inference", "Call it under torch.no_grad()")

    def refuse(self, got: str, expected: str, remedy: str) -> NoReturn:
        raise KernelError(got=f"{self.operation}: {got}", expected=expected, remedy=remedy)

    def _check_shape(self, name: str, value: torch.Tensor, dims: list[str]) -> None:
        if value.ndim != len(dims):
            self.refuse(f"{name} has shape {tuple(value.shape)}", f"{len(dims)} dimensions ({', '.join(dims)})", f"Reshape {name}")
        for dim, size in zip(dims, value.shape, strict=True):
            if self.size.setdefault(dim, size) != size:
                self.refuse(
                    f"{name} has shape {tuple(value.shape)}",
                    f"({', '.join(dims)}) with {dim} = {self.size[dim]} as in {self._set_by[dim]}",
                    f"Check how {name} and {self._set_by[dim]} were made",
                )
            self._set_by.setdefault(dim, name)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that references compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def bounds(cu_seqlens: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """First row and end of every packed sequence. For references and costs, because it waits for a CUDA tensor.

    Raises:
        KernelError: the offsets do not start at 0, decrease, or exceed the number of rows.
    """
    offsets = cu_seqlens.tolist()
    pairs = list(pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] > rows or any(end < start for start, end in pairs):
        raise KernelError(
            got=f"cu_seqlens {offsets if len(offsets) <= 8 else [*offsets[:4], '…', *offsets[-3:]]} for {rows} rows",
            expected=f"offsets that start at 0, never decrease, and end at {rows} or before",
            remedy="Build them as the cumulative sum of the lengths, with a leading 0",
        )
    return pairs


def join(pieces: list[torch.Tensor], padding: torch.Tensor) -> torch.Tensor:
    """The pieces of a packed result, followed by zeros for the padding rows, whatever those hold.

    The zeros are computed from those rows, so that a batch without frames has a backward. A single piece is not copied.
    """
    if len(pieces) == 1 and padding.shape[0] == 0:
        return pieces[0]
    return torch.cat([*pieces, padding.masked_fill(torch.ones((), dtype=torch.bool, device=padding.device), 0)])


def results_of(out: Results) -> tuple[torch.Tensor, ...]:
    """What a call returns, as a tuple."""
    return out if isinstance(out, tuple) else (out,)


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements of these tensors, whatever their strides."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
