"""What every test needs before anything else is imported."""

import gc
import os

# The switch is read when a kernel is decorated, so it must be set before anything that decorates one is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# For the programs that tests start too: small tensors lose more in handing work to threads than they gain, and threads that wait for
# each other keep a busy machine busy.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.support.quick_interpreter import make_quick

make_quick()


def pytest_collection_finish() -> None:
    """What the imports made stays, a million objects: no collection of garbage need look at them again."""
    gc.collect()
    gc.freeze()
