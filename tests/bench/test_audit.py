"""The compile audit: the committed table is up to date, and faulty kernels are found."""

import os
import subprocess
import sys

from tests.support.paths import ROOT


def compiled(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess:
    """Runs Python in a new process, because in this one kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_the_committed_table_has_every_configuration_and_no_faults():
    done = compiled("-m", "bench", "audit", "--check")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].endswith(", 0 faults")


def test_each_kind_of_fault_is_found():
    done = compiled("-m", "tests.support.faulty_kernels")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith("every fault was found\n")


def test_a_kernel_without_float_arguments_is_listed_once_with_the_dtype_of_its_result():
    program = (
        "from bench.audit import configurations\n"
        "from granite_kernels import OPERATIONS\n"
        "for one in configurations([OPERATIONS['exponential_noise']]):\n"
        "    print(one.architecture, one.dtype)\n"
    )
    assert compiled("-c", program).stdout.splitlines() == ["80 float32", "90 float32", "100 float32"]


def test_interpreted_kernels_are_refused():
    done = compiled("-m", "bench", "audit", interpret="1")
    assert done.returncode != 0
    assert "Run the audit without it" in done.stderr
