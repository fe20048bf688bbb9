import os

# Before torch and Triton are imported, which read them. The tensors of the tests are too small to gain from threads,
# and processes that each take all cores stand in each other's way. Kernels of Triton run in its interpreter, on a CPU;
# the package runs none there unless a test asks for it. Processes that tests start inherit the variables.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"

import pytest


@pytest.fixture(autouse=True)
def _no_seed_for_other_tests():
    """Runs in this process leave their seed in a variable, from which datamodules would take theirs."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
