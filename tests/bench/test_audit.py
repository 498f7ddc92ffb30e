"""The compile audit: the committed table is up to date, and faulty kernels are found."""

import os
import subprocess
import sys

import pytest
from granite_kernels.tiles import TABLES

from bench import audit
from tests.support.paths import ROOT


def compiled(*arguments: str) -> subprocess.CompletedProcess:
    """Runs Python in a new process, because in this one kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_the_committed_table_has_every_configuration_and_no_faults():
    done = compiled("-m", "bench", "audit", "--check")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith(", 0 faults")


PROGRAM = """
from dataclasses import replace
from bench.audit import configurations
from granite_kernels import OPERATIONS
from tests.support import faulty_kernels
print([(one.architecture, one.dtype) for one in configurations([OPERATIONS["exponential_noise"]])])
op = OPERATIONS["block_attention"]
found = configurations([replace(op, cases=op.cases[:1])])
ours = [one for one in found if one.name == "_block_attention_fwd_kernel" and one.architecture == 90 and one.dtype == "bfloat16"]
print(sorted({one.tile for one in ours}))
faulty_kernels.main()
"""


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess:
    """One process, because starting takes seconds."""
    return compiled("-c", PROGRAM)


def test_each_kind_of_fault_is_found(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith("every fault was found\n")


def test_a_kernel_without_float_arguments_is_listed_once_with_the_dtype_of_its_result(done):
    assert done.stdout.splitlines()[0] == "[(80, 'float32'), (90, 'float32'), (100, 'float32')]", done.stderr[-2000:]


def test_alternatives_of_a_row_are_compiled_too(done):
    table = next(table for table in TABLES if table.operation == "block_attention" and table.part == "forward")
    tiles = [table.rows[90, 2].tile, *table.alternatives[90, 2]]
    listed = done.stdout.splitlines()[1]
    assert listed.count("FORM=") == len(tiles) >= 2
    assert all(f"FORM={tile.blocks['FORM']} BLOCK={tile.blocks['BLOCK']} KEYS={tile.blocks['KEYS']} " in listed for tile in tiles)


def test_interpreted_kernels_are_refused():
    with pytest.raises(SystemExit, match="Run the audit without it"):
        audit.run(check=True, everything=False, operations=None)
