import os

# The tensors of the tests are too small to gain from threads, and processes that each take all cores stand in each
# other's way. Processes that tests start inherit the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# pytest imports torch before this file, for a filter of warnings in pyproject.toml: the variable comes too late for it
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
