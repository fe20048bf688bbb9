"""Canaries in a private run: gradients of the full bound, some of which take part, for an attack on the run itself.

A canary takes the place of a training sample. Its gradient is the clipping bound in a coordinate of its own. It is
added in each step that draws this sample, if the canary takes part at all; otherwise the place stays empty, as the
zero-out relation has it. The attack sees the noisy sum of each step, less what real samples have added, and knows the
mechanism, so it is as strong as the proof of privacy supposes. If canaries are told apart more often than epsilon
allows, steps are drawn, noised or counted in another way than is accounted for.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from knlightning.checks import ArgumentError
from knlightning.internals.lightning import overridden
from knlightning.privacy.callback import DifferentialPrivacy
from knlightning.privacy.one_run import epsilon_lower_bound, guessing_p_value

SHARES = (1.0, 0.5, 0.25, 0.125)
"""Shares of the canaries that are guessed, the surest ones; the level is divided among all ways to guess."""


class Attack(NamedTuple):
    """How well the canaries of a run were told apart.

    Attributes:
        bound: A lower bound on epsilon, with the confidence that was asked for.
        guesses: Number of guesses it rests on.
        right: Number of these that are right.
        p_value: Bound on the probability of such guesses, if the claimed epsilon holds.
    """

    bound: float
    guesses: int
    right: int
    p_value: float


class Canaries:
    """Put canaries into the steps of a private run, and note what the steps tell of each.

    Args:
        count: Number of canaries, each of which takes part with probability 1/2.
        privacy: The callback, after its `on_train_start`.

    Attributes:
        included: Whether each canary takes part; bool [count].
        scores: Logarithm of how much more probable the noisy sums are if it does; float64 [count].

    Raises:
        ArgumentError: If there are more canaries than training samples or parameters.
        ValueError: If the run has several processes, or no noise.
    """

    def __init__(self, count: int, privacy: DifferentialPrivacy) -> None:
        loader, parameters = privacy.loader, sum(parameter.numel() for parameter in privacy.sums.parameters)
        assert privacy.plan is not None
        if count > (most := min(loader.num_samples, parameters)):
            hint = f"there are {loader.num_samples} training samples and {parameters} parameters"
            raise ArgumentError("canaries", count, f"at most {most}", hint)
        if loader.world_size > 1:
            raise ValueError("canaries need a run of one process: set the trainer's devices to 1")
        if privacy.plan.noise_multiplier == 0:
            raise ValueError("noise_multiplier is 0: canaries have nothing to hide in")
        self.privacy = privacy
        generator = np.random.default_rng()  # neither the seed of the run nor its key
        self.samples = torch.from_numpy(generator.permutation(loader.num_samples)[:count])
        self.included = torch.from_numpy(generator.random(count) < 0.5)
        self.scores = torch.zeros(count, dtype=torch.float64)

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """Let them take part in the run."""
        privacy, draw = self.privacy, self.privacy.loader.draw
        with (
            overridden(privacy.loader, "draw", partial(self._draw_others, draw)),
            overridden(privacy, "noisy_gradient", partial(self._step, draw, privacy.noisy_gradient)),
        ):
            yield

    def attack(self, claimed: float, delta: float, level: float = 0.05) -> Attack:
        """Guess which canaries take part, from their scores.

        Args:
            claimed: Epsilon of the run.
            delta: Probability with which it may fail.
            level: Probability with which the bound is above the true epsilon, at most.
        """
        count, found = len(self.scores), []
        # as the scores themselves say; and the upper half against the lower one, whatever they say
        for scores in (self.scores, self.scores.argsort().argsort() - (count - 1) / 2):
            right = ((scores > 0) == self.included)[scores.abs().argsort(descending=True)]
            for share in SHARES:
                guesses, tries = math.ceil(share * count), 2 * len(SHARES)
                correct = int(right[:guesses].sum())
                bound = epsilon_lower_bound(count, guesses, correct, delta, level / tries)
                p_value = guessing_p_value(count, guesses, correct, claimed, delta) if math.isfinite(claimed) else 1.0
                found.append(Attack(bound, guesses, correct, min(1.0, p_value * tries)))
        return max(found)._replace(p_value=min(each.p_value for each in found))

    def _draw_others(self, draw: Any, step: int) -> Tensor:
        """Draw the samples of a step, without the places of canaries."""
        drawn: Tensor = draw(step)
        return drawn[~torch.isin(drawn, self.samples)]

    def _step(self, draw: Any, noisy_gradient: Any, trainer: Trainer, step: int) -> Tensor:
        """Add the canaries that the step draws to its sum, and score what it becomes."""
        privacy, count = self.privacy, len(self.samples)
        sums, plan, bound = privacy.sums, privacy.plan, privacy.sums.sensitivity
        assert plan is not None
        real = torch.zeros(count)

        def pop(original: Any = sums.pop) -> Tensor:
            nonlocal real
            total: Tensor = original()
            real = total[:count].clone()
            takes_part = (torch.isin(self.samples, draw(step)) & self.included).to(total)
            total[:count] += bound * takes_part
            return total

        with overridden(sums, "pop", pop):
            gradient: Tensor = noisy_gradient(trainer, step)
        seen = (gradient[:count] * plan.batch_size - real).cpu() / bound
        exponent = (seen - 0.5) / plan.noise_multiplier**2
        probability = plan.sampling_probability
        # log(1 - q + q e^exponent)
        stays = math.log1p(-probability) if probability < 1 else -math.inf
        self.scores += torch.logaddexp(torch.full_like(exponent, stays), exponent + math.log(probability))
        return gradient
