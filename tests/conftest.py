"""What every test needs before anything else is imported."""

import os

# The switch is read when a kernel is decorated, so it must be set before anything that decorates one is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from tests.support.quick_interpreter import make_quick

make_quick()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors lose more in handing work to threads than they gain, above all on a busy machine."""
    torch.set_num_threads(1)
