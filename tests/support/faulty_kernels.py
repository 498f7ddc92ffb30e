"""Checks that the audit finds each kind of fault in kernels made for that. Run it without TRITON_INTERPRET.

python -m tests.support.faulty_kernels
"""

import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from granite_kernels import OPERATIONS
from granite_kernels.launch import Tile, launch
from granite_kernels.op import Case, Operation
from granite_kernels.primitives import await_inputs

from bench import audit


@triton.jit
def product_kernel(x_ptr, y_ptr, out_ptr, steps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """out = Σ x·y over `steps` square tiles."""
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        moved = offsets + step * BLOCK * BLOCK
        acc += tl.dot(tl.load(x_ptr + moved), tl.load(y_ptr + moved), input_precision=PRECISION)
    tl.store(out_ptr + offsets, acc)


@triton.jit
def matvec_kernel(x_ptr, weight_ptr, out_ptr, BLOCK: tl.constexpr, FAULT: tl.constexpr, PDL: tl.constexpr):
    """out = x·weight for one row of the weight, with a fault in what is done before the wait."""
    k = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + k)
    if FAULT == "narrow":
        weight = tl.load(weight_ptr + k * 2)
    x = tl.load(x_ptr + k)
    if FAULT == "stores early":
        tl.store(out_ptr + 1, 0.0)
    if FAULT != "never waits":
        await_inputs(PDL)
    if FAULT != "reads early":
        x = tl.load(x_ptr + k, volatile=True)
    tl.store(out_ptr, tl.sum(x * weight, 0))


def matvec(fault: str) -> Operation:
    def call(x: torch.Tensor, impl: str) -> torch.Tensor:
        launch(matvec_kernel, (1,), Tile({"BLOCK": 512}, 4), x_ptr=x, weight_ptr=x, out_ptr=x, FAULT=fault)
        return x

    return Operation(audit.MATVECS[0], call, call, None, (Case("only", lambda draw: {"x": draw.normal(4096)}, released=True),))


def operation(block: int, num_warps: int, num_stages: int = 1, precision: str = "tf32") -> Operation:
    def call(x: torch.Tensor, impl: str) -> torch.Tensor:
        tile = Tile({"BLOCK": block}, num_warps, num_stages)
        launch(product_kernel, (1,), tile, x_ptr=x, y_ptr=x, out_ptr=x, steps=9, PRECISION=precision)
        return x

    return Operation("faulty", call, call, None, (Case("only", lambda draw: {"x": draw.normal(4096)}),))


def faults(op: Operation, architecture: int = 80) -> list[str]:
    one = next(one for one in audit.configurations([op]) if one.dtype == "float32" and one.architecture == architecture)
    return audit.faults(audit.compile_one(one))


def main() -> None:
    assert faults(operation(32, 4)) == []
    assert any("spills" in fault for fault in faults(operation(64, 1)))
    assert any("shared memory" in fault for fault in faults(operation(128, 8, 4)))
    assert any("without tensor cores" in fault for fault in faults(operation(32, 4, precision="ieee")))

    assert faults(matvec("none"), 90) == faults(matvec("none"), 80) == []
    expected = {"narrow": "128 bits", "stores early": "stores 1 times", "never waits": "does not wait", "reads early": "nothing after"}
    for fault, text in expected.items():
        assert any(text in one for one in faults(matvec(fault), 90)), (fault, faults(matvec(fault), 90))

    audit.ARCHITECTURES = (80,)  # what follows does not depend on it
    OPERATIONS.clear()
    OPERATIONS["faulty"] = operation(32, 4)
    with tempfile.TemporaryDirectory() as folder:
        audit.TABLE, audit.PAGE = Path(folder) / "audit.json", Path(folder) / "AUDIT.md"
        audit.PAGE.write_text("<!-- python -m bench audit -->\n<!-- end of audit -->\n")
        arguments = {"everything": False, "operations": None}
        assert audit.run(check=True, **arguments) == 1, "nothing is committed"
        assert not audit.TABLE.exists()
        assert audit.run(check=False, **arguments) == 0
        assert "product_kernel" not in audit.PAGE.read_text(), "no released shape uses it"
        assert audit.run(check=True, **arguments) == 0
        audit.TABLE.write_text(audit.TABLE.read_text().replace('"registers": ', '"registers": 1'))
        assert audit.run(check=True, **arguments) == 1, "the kernel compiles to something else"
        OPERATIONS["faulty"] = operation(64, 4)
        assert audit.run(check=True, **arguments) == 1, "another tile is not in the table"
    print("every fault was found")


if __name__ == "__main__":
    main()
