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


def operation(block: int, num_warps: int, num_stages: int = 1, precision: str = "tf32") -> Operation:
    def call(x: torch.Tensor, impl: str) -> torch.Tensor:
        tile = Tile({"BLOCK": block}, num_warps, num_stages)
        launch(product_kernel, (1,), tile, x_ptr=x, y_ptr=x, out_ptr=x, steps=9, PRECISION=precision)
        return x

    return Operation("faulty", call, call, None, (Case("only", lambda draw: {"x": draw.normal(4096)}),))


def faults(op: Operation) -> list[str]:
    one = next(one for one in audit.configurations([op]) if one.dtype == "float32" and one.architecture == 80)
    return audit.faults(audit.compile_one(one))


def main() -> None:
    assert faults(operation(32, 4)) == []
    assert any("spills" in fault for fault in faults(operation(128, 1)))
    assert any("shared memory" in fault for fault in faults(operation(128, 8, 4)))
    assert any("without tensor cores" in fault for fault in faults(operation(32, 4, precision="ieee")))

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
