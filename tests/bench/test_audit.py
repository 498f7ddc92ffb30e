"""The compile audit: the committed table is up to date, and faulty kernels are found."""

import os
import subprocess
import sys

import pytest

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
from bench.audit import configurations
from granite_kernels import OPERATIONS
from tests.support import faulty_kernels
print([(one.architecture, one.dtype) for one in configurations([OPERATIONS["exponential_noise"]])])
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


def test_interpreted_kernels_are_refused():
    with pytest.raises(SystemExit, match="Run the audit without it"):
        audit.run(check=True, everything=False, operations=None)
