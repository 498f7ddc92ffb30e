"""What one kernel file declares, and what all of them share: the choice of backend, argument checks, the cases.

A file `<op>.py` answers four questions about one operation (what it computes, how fast, at what cost, on which shapes) and
gathers the answers in one `Operation`. Tests, benchmarks and the compile audit are loops over those.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

import torch

from granite_kernels.errors import KernelError
from granite_kernels.launch import recording

IMPLS = ("triton", "torch")
CHOICE = "GRANITE_SPEECH_KERNELS"
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cost:
    """What a call cannot avoid: FLOPs (2 per multiply-add) and bytes (every tensor that takes part moved once)."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Draw:
    """Where a case takes its tensors from: one seed gives the same numbers on every device.

    Without `values`, and on the meta device, floating-point tensors have none: the largest cases would take seconds to draw.
    """

    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device
    values: bool = True

    def normal(self, *size: int, std: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        if not self.values or self.device.type == "meta":
            return torch.empty(size, device="meta", dtype=dtype or self.dtype)
        return (torch.randn(size, generator=self.generator) * std).to(self.device, dtype or self.dtype)

    def int32(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def permutation(self, n: int) -> list[int]:
        return torch.randperm(n, generator=self.generator).tolist()

    def cu_seqlens(self, lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class Case:
    """A shape that matters.

    Args:
        name: unique among the operation's cases; a test id.
        make: `make(draw, **shape)` builds the arguments of the call as a dict. Views of larger tensors where products
            would pass views, and NaN in every element that the operation must not read.
        shape: the sizes, by name.
        released: a released checkpoint's shape: meant for benchmarks and GPUs, too large for a CPU test.
    """

    name: str
    make: Callable[..., dict[str, Any]]
    shape: Mapping[str, Any] = field(default_factory=dict)
    released: bool = False

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments of one call, keyword by keyword."""
        draw = Draw(torch.Generator().manual_seed(seed), dtype, torch.device(device))
        return self.make(draw, **self.shape)

    def sizes(self, dtype: torch.dtype) -> dict[str, Any]:
        """The same without floating-point values, which is all that a cost asks for; index tensors are on the CPU."""
        draw = Draw(torch.Generator(), dtype, torch.device("cpu"), values=False)
        return self.make(draw, **self.shape)


@dataclass(frozen=True)
class Operation:
    """One operation and its four answers.

    Args:
        name: the stem of its file, its public function, its test and its row in the catalogue.
        call: the public function, which checks its arguments and takes `impl`.
        reference: the same arguments without `impl`; plain PyTorch, and the whole of `impl="torch"`.
        cost: the same arguments as the reference; returns a `Cost`. Reads index tensors on the host.
        cases: the shapes that matter.
        differentiable: the arguments that a gradient flows to, in the order of the call; empty for inference only.
        packed: the arguments whose rows beyond `cu_seqlens[-1]` are padding; empty where every row counts.
        triton: the same arguments as the reference, through the torch.library operation that launches the Triton kernels;
            None where the package triton is not installed.
        library: the same arguments; prepares the best single call of a library's that does a part of the work, and returns a
            function of no arguments that makes it: what benchmarks hold a kernel against.
    """

    name: str
    call: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    cost: Callable[..., Cost]
    cases: tuple[Case, ...]
    differentiable: tuple[str, ...] = ()
    packed: tuple[str, ...] = ()
    triton: Callable[..., torch.Tensor] | None = None
    library: Callable[..., Callable[[], torch.Tensor]] | None = None

    def resolve(self, impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        """The backend that a call uses: "triton" or "torch".

        None asks the environment variable GRANITE_SPEECH_KERNELS, and where that is not set for the fastest there is: Triton
        for CUDA tensors in a dtype that it serves, PyTorch for others.

        Raises:
            KernelError: an `impl` or a value of the variable that does not exist, or "triton" where it cannot run. Nothing
                falls back.
        """
        said = f"impl={impl!r}"
        if impl is None and (impl := _choice()) is not None:
            said = f"{CHOICE}={impl}"
        if impl is None:
            on_gpu = device.type == "cuda" or (device.type == "meta" and recording())
            return "triton" if on_gpu and dtype in TRITON_DTYPES and self.triton is not None else "torch"
        if impl not in IMPLS:
            remedy = "Leave it out to let the device decide"
            raise KernelError(got=f"{self.name}: {said}", expected=f"one of {', '.join(map(repr, IMPLS))}, or nothing", remedy=remedy)
        if impl == "triton":
            self._check_triton(said, device, dtype)
        return impl

    def _check_triton(self, said: str, device: torch.device, dtype: torch.dtype) -> None:
        torch_instead = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        if self.triton is None:
            raise KernelError(got=f"{self.name}: {said} without the package triton", expected="it installed", remedy=torch_instead)
        if dtype not in TRITON_DTYPES:
            served = ", ".join(map(str, TRITON_DTYPES))
            raise KernelError(got=f"{self.name}: {said} for {dtype}", expected=f"one of {served}", remedy=torch_instead)
        if device.type == "cpu" and not _interpreted():
            remedy = f"{torch_instead}, or set TRITON_INTERPRET=1 before Python starts"
            raise KernelError(got=f"{self.name}: {said} for CPU tensors", expected="CUDA tensors, or Triton's interpreter", remedy=remedy)

    def select(self, impl: str | None, tensor: torch.Tensor) -> Callable[..., torch.Tensor]:
        """The function behind `resolve`'s answer for calls on tensors like this one."""
        return self.triton if self.resolve(impl, tensor.device, tensor.dtype) == "triton" else self.reference

    def backend(self, tensor: torch.Tensor) -> str:
        """Which backend a call on tensors like this one uses, such as "block_attention=triton": for a module's `extra_repr`.

        Printing a model never raises: a backend that was chosen and cannot run is "unavailable".
        """
        try:
            return f"{self.name}={self.resolve(None, tensor.device, tensor.dtype)}"
        except KernelError:
            return f"{self.name}=unavailable"


# Both are settled outside a traced function: torch.compile takes what they say as constants.
@torch.compiler.assume_constant_result
def _choice() -> str | None:
    return os.environ.get(CHOICE) or None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def triton_backend(name: str) -> Callable[..., torch.Tensor] | None:
    """The function `<name>_triton` of the file of that name, or None where the package triton is not installed."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return None
    return getattr(importlib.import_module(f"granite_kernels.{name}_triton"), f"{name}_triton")


class Arguments:
    """Compares the tensors of one call with the stated layout and with each other; reads no value, so never waits for a device.

    A layout is the names of the dimensions. A name means one size in the whole call: the first tensor that uses it says
    which, and `size[name]` keeps it. Dtype and device are the first tensor's unless a call to `tensor` says otherwise.
    """

    def __init__(self, operation: str):
        self.operation = operation
        self.size: dict[str, int] = {}
        self._said_by: dict[str, str] = {}
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

    def refuse(self, got: str, expected: str, remedy: str) -> NoReturn:
        raise KernelError(got=f"{self.operation}: {got}", expected=expected, remedy=remedy)

    def _check_shape(self, name: str, value: torch.Tensor, dims: list[str]) -> None:
        wanted = f"({', '.join(dims)})"
        shape = tuple(value.shape)
        if len(shape) != len(dims):
            self.refuse(f"{name} has shape {shape}", f"{len(dims)} dimensions {wanted}", f"Reshape {name}")
        for dim, size in zip(dims, shape, strict=True):
            if self.size.setdefault(dim, size) != size:
                said = f"{dim} = {self.size[dim]} as in {self._said_by[dim]}"
                self.refuse(f"{name} has shape {shape}", f"{wanted} with {said}", f"Check how {name} and {self._said_by[dim]} were made")
            self._said_by.setdefault(dim, name)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that references compute in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def bounds(cu_seqlens: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """First row and end of every packed sequence, read once. For references and costs: a CUDA tensor is waited for.

    Raises:
        KernelError: offsets that do not start at 0, fall, or pass the last row.
    """
    offsets = cu_seqlens.tolist()
    pairs = list(pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] > rows or any(end < start for start, end in pairs):
        raise KernelError(
            got=f"cu_seqlens {offsets if len(offsets) <= 8 else [*offsets[:4], '…', *offsets[-3:]]} for {rows} rows",
            expected=f"offsets that start at 0, never fall, and end at {rows} or before",
            remedy="Build them as the cumulative sum of the lengths, with a leading 0",
        )
    return pairs


def join(pieces: list[torch.Tensor], padding: torch.Tensor) -> torch.Tensor:
    """Pieces of a packed result one behind the other, and zeros for the rows that are padding, whatever these hold.

    The zeros are made from those rows, so that a batch without a frame has a backward; a lone piece is not copied.
    """
    if len(pieces) == 1 and padding.shape[0] == 0:
        return pieces[0]
    return torch.cat([*pieces, padding.masked_fill(torch.ones((), dtype=torch.bool, device=padding.device), 0)])


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements of these tensors, whatever their strides."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
