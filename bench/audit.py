"""Compiles every kernel for three architectures, without a GPU, and checks the machine code.

    python -m bench audit            compile new and changed kernels, write the table, exit 1 on a fault
    python -m bench audit --check    exit 1 if the table lacks an entry, or a sample compiles to something else

The audit calls the operations' cases on meta tensors, records their launches (`granite_kernels.launch`) and compiles each
distinct one as Triton would at its first call. The findings are committed in `kernels/audit.json`, keyed by a hash of source and
configuration. So the check fails for a kernel that spills, and for one that was changed without another audit.
"""

import ast
import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import random
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
import triton
from granite_kernels import OPERATIONS
from granite_kernels.launch import ARCHITECTURES, Launch, recorded_launches
from granite_kernels.op import TRITON_DTYPES, Case, Operation, results_of
from granite_kernels.testing import working_dtype
from granite_kernels.tiles import TABLES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import results
from bench.audit_table import Finding, line, markdown, read_table, write_table

__all__ = [
    "Configuration",
    "compile_all",
    "compile_without_gpu",
    "configuration",
    "configurations",
    "faults",
    "launches",
    "read",
    "run",
    "specialization",
    "stages",
]

KERNELS = Path(__file__).parents[1] / "kernels"
TABLE, PAGE = KERNELS / "audit.json", KERNELS / "AUDIT.md"

# The most shared memory of one program. Other chips use the tiles of 80 too, and the smallest have 99 KiB.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Operations of few rows, whose kernels load their weights before they wait for x.
MATVECS = ("fused_linear", "head_argmax")
_POINTER = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
_POINTER |= {torch.float64: "fp64", torch.bool: "i1", torch.int8: "i8", torch.uint8: "u8"}
_SHORT = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Configuration:
    """One compilation: a kernel, its constants and argument types, and an architecture."""

    operation: str
    kernel: Any
    dtype: str
    architecture: int
    constants: tuple[tuple[str, Any], ...]
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]  # arguments that are multiples of 16, or pointers to such addresses
    num_warps: int
    num_stages: int
    released: bool  # used by a case with a released checkpoint's shape

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def tile(self) -> str:
        """The tile's constants, warps and stages, as text."""
        blocks = " ".join(f"{name}={value}" for name, value in self.constants if name.isupper() and value is not None)
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}".strip()

    @property
    def key(self) -> str:
        """A hash of everything that determines the machine code: source, constants, types, tile, architecture, compiler."""
        parts = (_source(self.kernel), self.constants, self.signature, self.aligned, self.num_warps, self.num_stages)
        return hashlib.sha256(repr((*parts, self.architecture, triton.__version__)).encode()).hexdigest()[:20]


def configurations(operations: Iterable[Operation] | None = None) -> list[Configuration]:
    """Every distinct configuration of the operations' cases, forward and backward, in the dtypes that the kernels support, and of the
    released cases with the alternatives of their tiles.

    Configurations that differ only in which sizes and strides are multiples of 16 count once, as in the first case that has
    them. Released shapes come first.
    """
    found: dict[tuple, Configuration] = {}
    for operation in operations or OPERATIONS.values():
        for case in operation.cases:
            for dtype in TRITON_DTYPES:
                for architecture in ARCHITECTURES:
                    inputs = case.inputs(dtype, "meta")
                    computed = _SHORT[working_dtype(inputs)]
                    for launch in chain(launches(operation, inputs, architecture), *_alternatives(operation, case, inputs, architecture)):
                        one = configuration(operation.name, launch, computed, architecture, case.released)
                        types = tuple((name, kind) for name, kind in one.signature if kind not in ("i32", "i64", "constexpr"))
                        blocks = tuple((name, value) for name, value in one.constants if name.isupper())
                        found.setdefault((one.name, architecture, one.dtype, blocks, types, one.num_warps, one.num_stages), one)
    return list(found.values())


def _alternatives(operation: Operation, case: Case, inputs: dict[str, Any], architecture: int) -> Iterator[list[Launch]]:
    """The launches of a released case with each alternative of the tiles that it looks up."""
    for table in TABLES if case.released else ():
        if table.operation == operation.name and table.alternatives:
            with table.lookups() as keys:
                launches(operation, inputs, architecture)
            for key in keys & table.alternatives.keys():
                for tile in table.alternatives[key]:
                    with table.using({key: tile}):
                        yield launches(operation, inputs, architecture)


def launches(operation: Operation, inputs: dict[str, Any], architecture: int) -> list[Launch]:
    """The launches of a call in inference, and of a call in training with its backward."""
    with recorded_launches(architecture) as recorded:
        for _, call in stages(operation, inputs):
            call()
    return list(recorded)


def stages(operation: Operation, inputs: dict[str, Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    """A call in inference, "forward", and if there is a backward, a call in "training" and its "backward". To be called in this order."""
    yield "forward", torch.no_grad()(partial(operation.call, **inputs, impl="triton"))
    leaves = {name: inputs[name].requires_grad_() for name in operation.differentiable if inputs[name] is not None}
    if leaves:
        out: list[torch.Tensor] = []
        yield "training", lambda: out.extend(results_of(operation.call(**{**inputs, **leaves}, impl="triton")))
        yield "backward", lambda: torch.autograd.grad(out, list(leaves.values()), [*map(torch.empty_like, out)], allow_unused=True)


def configuration(operation: str, launch: Launch, dtype: str, architecture: int, released: bool) -> Configuration:
    """What Triton compiles for a launch."""
    tile = launch.tile
    return Configuration(operation, launch.kernel, dtype, architecture, *specialization(launch), tile.num_warps, tile.num_stages, released)


def specialization(launch: Launch) -> tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, str], ...], tuple[str, ...]]:
    """What Triton specialises a kernel on, given these arguments: constants, types, and which arguments are multiples of 16."""
    given = {**launch.arguments, **launch.tile.blocks}
    constants, signature, aligned = {}, {}, []
    for parameter in launch.kernel.params:
        name, value = parameter.name, given[parameter.name]
        specialised = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            constants[name], signature[name] = value, "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _POINTER[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_POINTER[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                aligned.append(name)
        else:
            signature[name] = "fp32"
    return tuple(constants.items()), tuple(signature.items()), tuple(aligned)


def _source(kernel: Any, seen: frozenset[str] = frozenset()) -> str:
    """Source of a jit function and of all that it calls, and the constants that it reads. Without line numbers, so code can move."""
    scope = kernel.fn.__globals__
    used = {node.id for node in ast.walk(ast.parse(kernel.src)) if isinstance(node, ast.Name)} - seen
    text = kernel.src
    for name in sorted(used & scope.keys()):
        if isinstance(scope[name], triton.JITFunction):
            text += _source(scope[name], seen | used)
        elif isinstance(scope[name], triton.language.constexpr):
            text += f"{name} = {scope[name].value!r}"
    return text


def compile_all(wanted: list[Configuration]) -> Iterator[tuple[Configuration, Finding]]:
    """Compile on all cores, and yield results as they become ready."""
    # Processes, because a compilation holds Python's lock. Forked, because a jit function cannot be pickled but can be inherited.
    _Inherited.wanted = wanted
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        running = {pool.submit(_compile_inherited, number): one for number, one in enumerate(wanted)}
        for done in concurrent.futures.as_completed(running):
            yield running[done], done.result()


class _Inherited:
    wanted: ClassVar[list[Configuration]] = []


def _compile_inherited(number: int) -> Finding:
    return compile_one(_Inherited.wanted[number])


def compile_one(one: Configuration) -> Finding:
    """Compile one configuration and read its machine code."""
    return read(one, compile_without_gpu(one))


def compile_without_gpu(one: Configuration) -> Any:
    """Triton's compiled kernel."""
    positions = {name: index for index, name in enumerate(one.kernel.arg_names)}
    attributes = {(positions[name],): [["tt.divisibility", 16]] for name in one.aligned}
    source = ASTSource(one.kernel, dict(one.signature), dict(one.constants), attributes)
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", one.architecture, 32), options=options)


def read(one: Configuration, compiled: Any) -> Finding:
    """Read the machine code of a compiled configuration."""
    usage, code = _disassemble(compiled.asm["cubin"])
    registers, stack, local = (int(re.search(rf"\b{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK", "LOCAL"))
    products = Counter(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|IMMA|DMMA)\b", code))
    before_wait, waits, _ = code.partition("ACQBULK")
    plain = len(re.findall(r"\btt\.dot .*dot_op<\{opIdx = 0, parent = #blocked", compiled.asm["ttgir"]))
    if not products:
        plain = compiled.asm["ttir"].count("tt.dot ")
    return Finding(
        operation=one.operation,
        kernel=one.name,
        dtype=one.dtype,
        architecture=one.architecture,
        tile=one.tile,
        released=one.released,
        registers=registers,
        spilled=stack + local,
        shared=compiled.metadata.shared,
        products=dict(sorted(products.items())),
        plain_products=plain,
        loads=_loads(code),
        early_loads=_loads(before_wait) if waits else {},
        early_stores=len(re.findall(r"\b(?:STG|RED|REDG|ATOM|ATOMG)\b", before_wait)) if waits else None,
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True) for option in ("-res-usage", "-sass")
        )
    return usage.stdout + usage.stderr, code.stdout


def _loads(code: str) -> dict[str, int]:
    """Global loads by width: to registers, to shared memory, and by the copy engine."""
    widths: Counter[str] = Counter()
    for modifiers in re.findall(r"\b(?:LDG|LDGSTS)\.([\w.]+)", code):
        width = re.search(r"\b(128|64|U16|S16|U8|S8)\b", modifiers)
        widths[width.group(1).lstrip("US") if width else "32"] += 1
    bulk = len(re.findall(r"\b(?:UTMALDG|UBLKCP)\.", code))
    return dict(sorted(widths.items(), key=lambda item: -int(item[0]))) | ({"bulk": bulk} if bulk else {})


def faults(finding: Finding) -> list[str]:
    """Reasons why a configuration must not ship."""
    wrong = []
    if finding.spilled:
        wrong.append(f"spills {finding.spilled} bytes a thread")
    if finding.shared > SHARED_LIMIT[finding.architecture]:
        wrong.append(f"needs {finding.shared} bytes of shared memory, the chip has {SHARED_LIMIT[finding.architecture]}")
    if finding.plain_products:
        wrong.append(f"{finding.plain_products} products without tensor cores")
    if not finding.loads:
        wrong.append("loads nothing: the compiler removed its body")
    if "PDL=1" in finding.tile:
        if finding.early_stores is None:
            wrong.append("does not wait for the launches before it")
        elif finding.early_stores:
            wrong.append(f"stores {finding.early_stores} times before it waits for the launches before it")
        if finding.operation in MATVECS and finding.released and not finding.early_loads.get("128"):
            wrong.append("loads no weights in 128 bits before it waits")
        if finding.early_stores is not None and finding.early_loads == finding.loads:
            wrong.append("loads nothing after it waits")
    return wrong


def run(*, check: bool, everything: bool, operations: list[str] | None, sample: int = 6) -> int:
    """Run the audit, print the findings, and return the exit status.

    Args:
        check: write nothing. Compile missing entries, which are faults, and `sample` of the others.
        everything: also compile configurations that the table already has.
        operations: names of the operations to audit, without writing anything; None for all.
    """
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled. Run the audit without it.")
    wanted = {one.key: one for one in configurations([OPERATIONS[name] for name in operations or OPERATIONS])}
    known = {} if everything else read_table(TABLE)
    missing = [one for key, one in wanted.items() if key not in known]
    again = random.sample([one for key, one in wanted.items() if key in known], min(sample, len(wanted) - len(missing))) if check else []
    table = {key: known[key] for key in wanted if key in known}
    wrong = []
    for one, finding in compile_all(missing + again):
        print(line(finding), flush=True)
        if one.key in table and table[one.key] != dataclasses.replace(finding, released=table[one.key].released):
            wrong.append(f"{line(table[one.key])} is committed, but the kernel now compiles to {line(finding)}")
        table[one.key] = finding
    wrong += [f"{line(finding)}: {fault}" for finding in table.values() for fault in faults(finding)]
    if check and missing:
        wrong.append(f"{len(missing)} configurations are not in {TABLE.name}: run python -m bench audit and commit what it writes")
    if not check and operations is None:
        write_table(TABLE, table)
        results.replace_section(PAGE, "audit", markdown(table))
    print(f"{len(wanted)} configurations, {len(missing) + len(again)} compiled now, {len(wrong)} faults", *wrong, sep="\n")
    return 1 if wrong else 0
