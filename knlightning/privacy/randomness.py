"""Random numbers that cannot be foreseen or repeated: which samples a step takes, and the noise it adds.

They are functions of a key, of their purpose, and of the number of the step. They do not depend on the global seed: a
run whose noise could be computed again from its seed would have no privacy.
"""

import hashlib
import math
import secrets

import numpy as np
import torch
from torch import Tensor


class SecretRandom:
    """Draws from a secret key.

    Args:
        key: 32 bytes; `fresh_key()` for private runs, `known_key(seed)` for runs that are to be repeatable, which have
            no privacy.
        secure: Draw by a cryptographic generator (SHAKE-256 in counter mode) in place of a fast one (Philox), and sum
            four normal variates for each value, against attacks on the rounding of floating point noise (Holohan and
            Braghin, 2021). On the CPU, about 0.2 s for a million values.
    """

    def __init__(self, key: bytes, secure: bool = False) -> None:
        self.key = key
        self.secure = secure

    def normal(self, count: int, purpose: str, step: int, device: torch.device) -> Tensor:
        """Draw standard normal variates, in float64.

        In float32 they are exactly 0 once in ten million times, and their low bits are those of what they are added to.

        Args:
            count: Number of values.
            purpose: What they are for; other purposes get other numbers.
            step: Number of the step; other steps get other numbers.
            device: Device of the tensor.

        Returns:
            Float64 tensor [count]; on the CPU for devices without float64.
        """
        if not self.secure:
            if device.type != "cuda":
                return torch.from_numpy(self._generator(purpose, step).standard_normal(count))
            generator = torch.Generator(device).manual_seed(self.seed(purpose, step))
            return torch.randn(count, generator=generator, device=device, dtype=torch.float64)
        total = np.zeros(count)
        for part in range(4):
            # by Box and Muller; 1 - u is in (0, 1], so that the logarithm is finite
            first, second = self._uniform(2 * -(-count // 2), f"{purpose}, part {part}", step).reshape(2, -1)
            radius, angle = np.sqrt(-2.0 * np.log(1.0 - first)), 2.0 * math.pi * second
            total += np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
        values = torch.from_numpy(total / 2.0)
        return values.to(device) if device.type == "cuda" else values

    def chosen(self, count: int, probability: float, step: int) -> Tensor:
        """Choose each sample with the same probability, independently: Poisson sampling.

        Args:
            count: Number of samples to choose from.
            probability: Probability of each to be chosen.
            step: Number of the step.

        Returns:
            Numbers of the chosen samples in random order, int64.
        """
        draws = (
            self._uniform(count, "sampling", step) if self.secure else self._generator("sampling", step).random(count)
        )
        chosen = torch.from_numpy((draws < probability).nonzero()[0])
        return chosen[self.permutation(len(chosen), "order", step)]

    def permutation(self, count: int, purpose: str, step: int) -> Tensor:
        """Put `count` numbers into random order."""
        return torch.from_numpy(self._generator(purpose, step).permutation(count))

    def seed(self, purpose: str, step: int) -> int:
        """Draw a seed for a generator of another kind, at least 0 and below 2**63."""
        return int.from_bytes(self._bytes(8, purpose, step), "little") >> 1

    def _generator(self, purpose: str, step: int) -> np.random.Generator:
        """Return numpy's; torch's own on the CPU uses 32 bits of its seed, few enough to be tried out, or to recur."""
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self._bytes(16, purpose, step), "little")))

    def _uniform(self, count: int, purpose: str, step: int) -> np.ndarray:
        """Draw float64 in [0, 1) with 53 random bits each."""
        bits = np.frombuffer(self._bytes(8 * count, purpose, step), np.uint64)
        return (bits >> np.uint64(11)) * 2.0**-53

    def _bytes(self, count: int, purpose: str, step: int) -> bytes:
        return hashlib.shake_256(self.key + f"{purpose} {step}".encode()).digest(count)


def fresh_key() -> bytes:
    """Take a new key from the operating system."""
    return secrets.token_bytes(32)


def known_key(seed: int) -> bytes:
    """Make a key from a seed, for runs that are repeatable, and therefore not private."""
    return hashlib.sha256(f"known {seed}".encode()).digest()
