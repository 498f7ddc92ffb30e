"""What the compile audit found: the committed table, its page, and a line for each finding."""

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

__all__ = ["Finding", "line", "markdown", "read_table", "write_table"]


@dataclass(frozen=True)
class Finding:
    """Properties of one compiled configuration.

    Attributes:
        registers: per thread.
        spilled: bytes per thread of local memory, to which registers spill.
        shared: bytes per program.
        products: number of tensor-core instructions by name.
        plain_products: number of `tl.dot`s that were compiled without tensor cores.
        loads: number of global loads by width in bits; "bulk" are those of the copy engine.
        early_loads: those before the kernel waits for the launches before it, if it begins early (PDL=1 in the tile).
        early_stores: number of stores and atomics before that; None if the kernel does not wait.
    """

    operation: str
    kernel: str
    dtype: str
    architecture: int
    tile: str
    released: bool
    registers: int
    spilled: int
    shared: int
    products: dict[str, int]
    plain_products: int
    loads: dict[str, int]
    early_loads: dict[str, int] = dataclasses.field(default_factory=dict)
    early_stores: int | None = None


def read_table(file: Path) -> dict[str, Finding]:
    """The committed findings, by key."""
    return {key: Finding(**entry) for key, entry in json.loads(file.read_text()).items()} if file.exists() else {}


def write_table(file: Path, table: dict[str, Finding]) -> None:
    ordered = sorted(table.items(), key=lambda item: (item[1].operation, item[1].kernel, item[1].dtype, item[1].architecture, item[1].tile))
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(asdict(finding))}" for key, finding in ordered)
    file.write_text(f"{{\n{lines}\n}}\n")


def line(finding: Finding) -> str:
    products = " ".join(f"{count} {name}" for name, count in finding.products.items())
    loads = " ".join(f"{count}x{width}" for width, count in finding.loads.items())
    return (
        f"sm_{finding.architecture} {finding.kernel} {finding.dtype} [{finding.tile}] {finding.registers} registers, "
        f"{finding.spilled} spilled, {finding.shared} shared; {products or 'no tensor cores'}; loads {loads}"
    )


def markdown(table: dict[str, Finding]) -> str:
    """A table of the released shapes' configurations: one row per kernel, dtype, tile and architecture."""
    rows = [
        "| kernel | dtype | sm | tile | registers | spilled, B | shared, KiB | tensor cores | loads by width in bits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    released = [finding for finding in table.values() if finding.released]
    for one in sorted(released, key=lambda one: (one.operation, one.kernel, one.dtype, one.tile, one.architecture)):
        products = ", ".join(f"{count} {name}" for name, count in one.products.items()) or "–"
        loads, early = (", ".join(f"{count} × {width}" for width, count in some.items()) for some in (one.loads, one.early_loads))
        loads += f"; {early or 'none'} before it waits" if one.early_stores is not None else ""
        figures = f"{one.registers} | {one.spilled} | {one.shared / 1024:.1f} | {products} | {loads}"
        rows.append(f"| `{one.kernel.strip('_')}` | {one.dtype} | {one.architecture} | {one.tile} | {figures} |")
    spilled = sum(finding.spilled > 0 for finding in table.values())
    head = (
        f"{len(table)} configurations compiled with Triton {triton.__version__}, {spilled} of them spill. "
        f"Released checkpoints use these {len(released)} (registers per thread, shared memory per program):"
    )
    return "\n".join([head, "", *rows])
