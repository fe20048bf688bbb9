import os

# The tensors of the tests are too small to gain from threads, and processes that each take all cores stand in each
# other's way. Set before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
