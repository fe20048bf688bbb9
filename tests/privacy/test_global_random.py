import random

import numpy as np
import torch

from knlightning.privacy.global_random import seeded_generators

CPU = torch.device("cpu")


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_all_generators_are_seeded_and_set_back():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = [drawn(), drawn()]
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    assert drawn() == expected[0]
    seen = []
    for seed in (3, 3, 2**62 + 1):
        with seeded_generators(seed, CPU):
            seen.append(drawn())
    assert drawn() == expected[1]
    assert seen[0] == seen[1]
    assert not set(seen[0]) & set(seen[2])
